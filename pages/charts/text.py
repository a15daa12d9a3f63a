"""Plurals, and the escaping of untrusted text for Markdown and for charts."""

import re
from html import escape

# Characters with a meaning in Markdown, in Streamlit's directives (`:red[…]`) or in formulas.
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#!|~$:&])")
_ADDRESS = re.compile(r"(?i)(?:(?<=[a-z])(?=://)|(?<=www)(?=\.)|(?<=\w)(?=@))")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\u202a-\u202e\u2066-\u2069]+")
NO_BREAK = "\u2060"
"""The invisible word joiner. Markdown makes no link of an address that contains it."""


def counted(number: int, noun: str) -> str:
    """1 thread, 2 threads."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def plain(words: object) -> str:
    """Escapes text so that Markdown shows it as it is, without markup, images, links or formulas.

    For names of models, files and datasets, for sentences that contain such names, and for
    generated text.
    """
    one_line = _CONTROL.sub(" ", str(words))
    return _SPECIAL.sub(r"\\\1", _ADDRESS.sub(NO_BREAK, one_line))


def plain_in_chart(words: object) -> str:
    """Escapes text for Plotly's titles, labels and hover texts, which render some HTML."""
    return escape(_CONTROL.sub(" ", str(words)), quote=False)
