"""Text of models and users as HTML that is nothing but text, its tokens marked by their losses."""

from collections.abc import Sequence
from html import escape

import pandas as pd
import torch

from transact_core.experiments.text_damage import DamagedPiece, Guesses

WORSE, BETTER = "213, 94, 0", "0, 114, 178"
"""Vermilion and blue of Okabe and Ito's palette, which colour-blind readers can tell apart; RGB."""
FULL_AT = 3.0
"""Difference of the losses in nats at which the colour is strongest."""
FULL_DAMAGE = 2.0
"""Damage in nats at which the colour is strongest."""
STRONGEST = 0.6
"""Opacity of the strongest colour; text stays readable on it in light and dark themes."""
STYLE = "white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.7"


def plain(text: str) -> str:
    """Text as it is, line breaks kept."""
    return f'<div style="{STYLE}">{escape(text)}</div>'


def losses_of_pieces(
    pieces: Sequence[tuple[str, int]], dense: torch.Tensor, pruned: torch.Tensor, start: int
) -> pd.DataFrame:
    """A row for each piece from token `start` on: its text and both models' losses on it.

    `pieces` are texts and their numbers of tokens; `dense` and `pruned`, of shape (tokens − 1,),
    are the losses of all tokens but the first. A piece of several tokens has their sum.
    """
    rows, at = [], 0
    for text, count in pieces:
        first, at = max(at, start, 1), at + count
        if first < at:
            losses = [nll[first - 1 : at - 1].sum().item() for nll in (dense, pruned)]
            rows.append(
                {
                    "token": text,
                    "tokens": at - first,
                    "dense_nll": losses[0],
                    "pruned_nll": losses[1],
                }
            )
    table = pd.DataFrame(rows, columns=["token", "tokens", "dense_nll", "pruned_nll"])
    return table.assign(change=table["pruned_nll"] - table["dense_nll"])


def marked(table: pd.DataFrame) -> str:
    """The tokens, coloured by how their losses changed, with the numbers on hover."""
    spans = []
    for row in table.itertuples():
        colour = WORSE if row.change > 0 else BETTER
        strength = STRONGEST * min(1.0, abs(row.change) / FULL_AT)
        numbers = (
            f"dense {row.dense_nll:.3f}, pruned {row.pruned_nll:.3f}, change {row.change:+.3f} nats"
        )
        spans.append(
            f'<span title="{escape(repr(row.token))}: {numbers}" '
            f'style="background-color:rgba({colour},{strength:.2f})">{escape(row.token)}</span>'
        )
    return f'<div style="{STYLE}">{"".join(spans)}</div>'


def damaged(pieces: Sequence[DamagedPiece]) -> str:
    """The tokens of a text, coloured by their damage, with both models' best guesses on hover."""
    spans = []
    for piece in pieces:
        strength = STRONGEST * min(1.0, piece.damage / FULL_DAMAGE)
        hover = (
            f"{piece.text!r}: {piece.damage:.3f} nats\n"
            f"dense: {in_words(piece.dense_guesses)}\npruned: {in_words(piece.pruned_guesses)}"
        )
        spans.append(
            f'<span title="{escape(hover)}" '
            f'style="background-color:rgba({WORSE},{strength:.2f})">{escape(piece.text)}</span>'
        )
    return f'<div style="{STYLE}">{"".join(spans)}</div>'


def in_words(guesses: Guesses) -> str:
    """Next tokens and their probabilities."""
    return ", ".join(f"{text!r} {probability:.0%}" for text, probability in guesses)


def damage_scale() -> str:
    """The legend of the colours of damage."""
    return _legend(
        [
            (WORSE, share, f"{share * FULL_DAMAGE:g}" + (" nats and more" if share == 1 else ""))
            for share in (0.0, 0.25, 0.5, 1.0)
        ]
    )


def scale() -> str:
    """The legend of the colours, from lower to higher loss."""
    steps = [
        (BETTER, 1.0, f"−{FULL_AT:g} nats and less"),
        (BETTER, 0.4, "better"),
        (WORSE, 0.0, "same"),
        (WORSE, 0.4, "worse"),
        (WORSE, 1.0, f"+{FULL_AT:g} nats and more"),
    ]
    return _legend(steps)


def _legend(steps: Sequence[tuple[str, float, str]]) -> str:
    """Colours, their shares of the strongest, and what they mean."""
    return "".join(
        f'<span style="background-color:rgba({colour},{STRONGEST * share:.2f});'
        f'padding:0.15rem 0.6rem;font-size:0.85rem">{words}</span>'
        for colour, share, words in steps
    )
