"""A training as it goes on: its loss, and the divergence from the dense model on held-out texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from pages.charts.common import DENSE, MAX_POINTS, MHA, laid_out
from pages.charts.curve_chart import PALETTE, SHAPES
from pages.charts.text import counted, plain_in_chart
from transact_core.data.corpus import short_name

if TYPE_CHECKING:
    import pandas as pd

    from transact_core.training.loop import Curve, Evaluated

HEIGHT, ABOVE = 330, 48
"""Of each chart and of what is above its axes, in pixels. A title fits on one line of half a page,
so that nothing moves while a training goes on."""
BELOW = {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.24, "yanchor": "top"}
"""The legend: names of texts may be long."""
SMOOTHED = 20
"""The smooth line of the loss is a mean over one in so many of the steps."""
ENDS = 10
"""The title compares the first and the last of so many parts of the steps."""
FEW = 2
"""Steps in such a part from which on they are compared."""


def text_names(sources: Iterable[str]) -> dict[str, str]:
    """A label for each held-out text: its short name, or the source where two have the same."""
    short = {source: short_name(source) for source in sources}
    names = list(short.values())
    return {source: name if names.count(name) == 1 else source for source, name in short.items()}


def loss_frame(curve: Curve, tokens_a_step: int) -> pd.DataFrame:
    """A row for each step."""
    import pandas as pd

    steps = np.arange(1, len(curve.losses) + 1)
    return pd.DataFrame(
        {"step": steps, "tokens": steps * tokens_a_step, "loss_nats": list(curve.losses)}
    )


def divergence_frame(curve: Curve, tokens_a_step: int) -> pd.DataFrame:
    """A row for each held-out text at each look."""
    import pandas as pd

    return pd.DataFrame(
        [
            {
                "step": found.step,
                "tokens": found.step * tokens_a_step,
                "text": name,
                "kl_nats": text.kl,
                "nll_nats": text.nll,
                "dense_nll_nats": curve.dense_nll.get(name),
                "share_back": curve.share_back(found, name),
            }
            for found in list(curve.evaluated)
            for name, text in found.texts.items()
        ]
    )


def loss_chart(curve: Curve, tokens_a_step: int, steps: int | None) -> go.Figure:
    """The loss of each step and its running mean against the tokens trained on."""
    losses = np.array(list(curve.losses))
    figure = go.Figure()
    if len(losses):
        window = max(1, len(losses) // SMOOTHED)
        sums = np.cumsum(np.concatenate([[0.0], losses]))
        ends = np.arange(1, len(losses) + 1)
        starts = np.maximum(0, ends - window)
        smooth = (sums[ends] - sums[starts]) / (ends - starts)
        drawn = np.unique(np.linspace(0, len(losses) - 1, min(len(losses), MAX_POINTS)).astype(int))
        x = (drawn + 1) * tokens_a_step
        mode = "lines+markers" if len(losses) == 1 else "lines"
        figure.add_scatter(
            x=x,
            y=losses[drawn],
            mode=mode,
            name="each step",
            line={"color": DENSE, "width": 1},
            hovertemplate="%{x:,} tokens: %{y:.4f} nats<extra></extra>",
        )
        if window > 1:
            figure.add_scatter(
                x=x,
                y=smooth[drawn],
                mode="lines",
                name=f"mean of {window} steps",
                line={"color": MHA, "width": 2.5},
                hovertemplate="mean at %{x:,} tokens: %{y:.4f} nats<extra></extra>",
            )
    _tokens_axis(figure, tokens_a_step, steps)
    figure.update_yaxes(title="training loss, nats a token")
    return _laid_out(figure, _loss_title(losses))


def _loss_title(losses: np.ndarray) -> str:
    if not len(losses):
        return "The loss is known after the first step"
    part = len(losses) // ENDS
    if part < FEW:
        # Steps have other windows each, so that a few of them show no direction.
        return f"Loss {losses.mean():.3f} nats a token so far"
    first, last = losses[:part].mean(), losses[-part:].mean()
    verb = "fell" if last < first else "rose"
    return f"Loss {verb} from {first:.3f} to {last:.3f} nats a token"


def divergence_chart(curve: Curve, tokens_a_step: int, steps: int | None) -> go.Figure:
    """The divergence on each held-out text against the tokens trained on; the best look marked."""
    evaluated = list(curve.evaluated)
    figure = go.Figure()
    names = text_names(evaluated[0].texts) if evaluated else {}
    x = [found.step * tokens_a_step for found in evaluated]
    for place, (source, name) in enumerate(names.items()):
        figure.add_scatter(
            x=x,
            y=[found.texts[source].kl for found in evaluated],
            mode="lines+markers",
            name=plain_in_chart(name),
            line={"color": PALETTE[place % len(PALETTE)], "width": 2},
            marker={"symbol": SHAPES[place % len(SHAPES)], "size": 8},
            customdata=[_share_in_words(curve, found, source) for found in evaluated],
            hovertemplate="%{x:,} tokens: %{y:.4f} nats%{customdata}"
            f"<extra>{plain_in_chart(name)}</extra>",
        )
    if len(evaluated) > 1:
        figure.add_vline(
            x=curve.best.step * tokens_a_step,
            line={"color": DENSE, "dash": "dash", "width": 1.5},
        )
    _tokens_axis(figure, tokens_a_step, steps)
    figure.update_yaxes(title="KL from dense, nats a token", rangemode="tozero")
    return _laid_out(figure, _divergence_title(evaluated))


def _share_in_words(curve: Curve, found: Evaluated, source: str) -> str:
    share = curve.share_back(found, source)
    return "" if share is None else f"<br>{share:.0%} of the lost nats back"


def _divergence_title(evaluated: Sequence[Evaluated]) -> str:
    if not evaluated:
        return "Held-out texts are looked at first"
    first, last = evaluated[0].texts, evaluated[-1].texts
    if len(evaluated) == 1:
        farthest = max(text.kl for text in first.values())
        return f"Untrained: up to {farthest:.2f} nats a token away"
    nearer = sum(last[source].kl < first[source].kl for source in first)
    return f"Nearer to the dense model on {nearer} of {counted(len(first), 'text')}"


def _laid_out(figure: go.Figure, title: str) -> go.Figure:
    return laid_out(figure, title, HEIGHT).update_layout(legend=BELOW, margin_t=ABOVE)


def _tokens_axis(figure: go.Figure, tokens_a_step: int, steps: int | None) -> None:
    """The same range from the beginning, so that what is drawn stays where it is."""
    figure.update_xaxes(title="tokens trained on")
    if steps:
        figure.update_xaxes(range=[-0.02 * steps * tokens_a_step, 1.02 * steps * tokens_a_step])
