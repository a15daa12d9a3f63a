"""Counted words, and words that are not ours, made safe to stand in markdown and in charts."""

import re
from html import escape

# Markdown's own characters, and those of Streamlit's directives (`:red[…]`) and formulas.
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#!|~$:&])")
_ADDRESS = re.compile(r"(?i)(?:(?<=[a-z])(?=://)|(?<=www)(?=\.)|(?<=\w)(?=@))")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\u202a-\u202e\u2066-\u2069]+")
NO_BREAK = "\u2060"
"""Invisible; what it stands in is no address, and no link is made of it."""


def counted(number: int, noun: str) -> str:
    """1 thread, 2 threads."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def plain(words: object) -> str:
    """Words that show as they are: no markup, image, link, formula or icon comes of them.

    For names of models, files and datasets, sentences that hold such names, and generated text.
    """
    one_line = _CONTROL.sub(" ", str(words))
    return _SPECIAL.sub(r"\\\1", _ADDRESS.sub(NO_BREAK, one_line))


def plain_in_chart(words: object) -> str:
    """The same for Plotly's titles, labels and hovers, which render a little HTML."""
    return escape(_CONTROL.sub(" ", str(words)), quote=False)
