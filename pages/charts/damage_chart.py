"""Damage to the predictions on each of several texts."""

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go

from pages.charts.common import DENSE, MHA, laid_out
from pages.charts.text import plain_in_chart
from transact_core.data.corpus import short_name
from transact_core.experiments.text_damage import DamagedPiece, TextDamage

ROW, AROUND = 46, 150
"""Pixels of a row of the chart, and of what is around the rows."""


def texts_frame(texts: Sequence[TextDamage]) -> pd.DataFrame:
    """A row for each text."""
    return pd.DataFrame(
        {
            "text": text.source,
            "tokens": text.tokens,
            "damage_nats": text.mean,
            "damage_stderr": text.error,
            "worst_fifth_share": text.worst_share,
        }
        for text in texts
    )


def pieces_frame(text: TextDamage) -> pd.DataFrame:
    """A row for each token of a text, the worst first; the best guess of each model beside it."""

    def row(piece: DamagedPiece) -> dict[str, object]:
        dense, pruned = piece.dense_guesses[0], piece.pruned_guesses[0]
        return {
            "token": piece.text,
            "damage_nats": piece.damage,
            "dense_guess": dense[0],
            "dense_probability": dense[1],
            "pruned_guess": pruned[0],
            "pruned_probability": pruned[1],
            "dense_nll": piece.dense_nll,
            "pruned_nll": piece.pruned_nll,
            "window": piece.window,
        }

    return pd.DataFrame(map(row, sorted(text.pieces, key=lambda piece: -piece.damage)))


def texts_chart(texts: Sequence[TextDamage]) -> go.Figure:
    """Mean damage on each text, with 95 % intervals over windows."""
    # An invisible number keeps apart two files that have the same name.
    figure = go.Figure(
        go.Bar(
            y=list(range(len(texts))),
            x=[text.mean for text in texts],
            orientation="h",
            marker_color=MHA,
            width=0.6,
            error_x={
                "type": "data",
                "array": [1.96 * text.error for text in texts],
                "thickness": 1.4,
                "color": DENSE,
            },
            customdata=[[text.tokens, text.worst_share] for text in texts],
            hovertemplate="%{x:.3f} nats a token over %{customdata[0]:,} tokens; the worst fifth "
            "carries %{customdata[1]:.0%}<extra></extra>",
        )
    )
    figure.update_yaxes(
        tickvals=list(range(len(texts))),
        ticktext=[plain_in_chart(short_name(text.source)) for text in texts],
        range=[len(texts) - 0.5, -0.5],
    )
    figure.update_xaxes(title="damage: KL divergence from the dense model, nats a token")
    return laid_out(figure, texts_title(texts), AROUND + ROW * max(2, len(texts)))


def texts_title(texts: Sequence[TextDamage]) -> str:
    """How much more the most damaged text suffers than the least damaged one."""
    most, least = (choose(texts, key=lambda text: text.mean) for choose in (max, min))
    name = plain_in_chart(short_name(most.source))
    if len(texts) == 1 or not least.mean:
        return f"Damage on {name}: {most.mean:.3f} nats a token"
    return (
        f"The cut damages {name} {most.mean / least.mean:.1f} × as much as "
        f"{plain_in_chart(short_name(least.source))}"
    )
