"""Colours, axes and layout that all charts share, and the charts of importance scores.

Functions turn arrays into Plotly figures and compute no more than a chart and its title need.
Categories have the colours of Okabe and Ito, which colour-blind readers can tell apart; magnitudes
have the cividis scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from pages.charts.text import plain_in_chart
from transact_core.importance.shares import are_positions, relative

if TYPE_CHECKING:
    from transact_core.pruning.plan import PruningPlan

MHA, MLP, BOTH, DENSE = "#0072B2", "#E69F00", "#009E73", "#999999"
RESIDUAL = "#CC79A7"
COLOURS = {"mha": MHA, "mlp": MLP, "residual": RESIDUAL}
NAMES = {"mha": "MHA", "mlp": "MLP", "residual": "residual stream"}
MAGNITUDE = "cividis"
BEST = "share of the<br>layer's best"
"""Label of scores that are divided by the largest score of their layer."""
MAX_COLUMNS = 512
"""Most columns of a heatmap. A screen shows no more, so wider layers are binned."""
MAX_POINTS = 400
"""Most points of one sorted curve. A screen shows no more."""


def layer_axis(count: int, downwards: bool = False) -> dict:
    """Settings of an axis of layer indices, with ticks only where there is a layer."""
    ends = [-0.5, count - 0.5]
    step = next(step for step in (1, 5, 10, 20, 50) if count <= 10 * step or step == 50)
    return {
        "title": "layer",
        "tick0": 0,
        "dtick": step,
        "range": ends[::-1] if downwards else ends,
    }


def laid_out(figure: go.Figure, title: str, height: int = 380) -> go.Figure:
    """The figure with a title and with the margins and the legend that all charts have."""
    return figure.update_layout(
        title={
            "text": title,
            "font": {"size": 16},
            "x": 0,
            "xanchor": "left",
            "y": 1,
            "yanchor": "top",
            "pad": {"t": 12},
        },
        height=height,
        margin={"l": 10, "r": 10, "t": 70, "b": 10},
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 1, "xanchor": "right"},
    )


PERPLEXITY = "perplexity"
"""Title of axes of perplexity; `on_text` says of which text."""


def on_text(figure: go.Figure, text: str) -> go.Figure:
    """The figure with the text that perplexity was measured on in the titles of its axes."""
    name = plain_in_chart(text)
    for axis in figure.select_yaxes(lambda axis: axis.title.text == PERPLEXITY):
        axis.title.text = f"{PERPLEXITY} on {name}"
    for trace in figure.select_traces({"type": "scatter"}):
        bar = trace.marker.colorbar.title
        if bar.text and bar.text.endswith(PERPLEXITY):
            bar.text = f"{bar.text}<br>on {name}"
    return figure


# --- importance ------------------------------------------------------------------------------


def _shaded(share: np.ndarray, logarithmic: bool, label: str = BEST, **ticks: object) -> dict:
    """Values and colours of a heatmap of shares; a logarithmic scale ends at a thousandth."""
    if logarithmic:
        ticks = {"tickvals": [0, -1, -2, -3], "ticktext": ["1", "0.1", "0.01", "≤ 0.001"]}
    return {
        "z": (np.log10(np.maximum(share, 1e-4)) if logarithmic else share).astype(np.float32),
        "zmin": -3 if logarithmic else 0,
        "zmax": 0 if logarithmic else 1,
        "colorscale": MAGNITUDE,
        "colorbar": {"title": {"text": label, "side": "right"}, **ticks},
    }


def head_differences(scores: np.ndarray) -> str:
    """A title for a map of heads: the layer whose heads differ most."""
    weakest = relative(scores).min(axis=1)
    if weakest.min() > 1 - 1e-9 or not scores.any():
        return "All heads of a layer score alike"
    return f"Heads differ most in layer {int(weakest.argmin())}"


def head_map(
    scores: np.ndarray, plan: PruningPlan | None = None, title: str = "", height: int = 520
) -> go.Figure:
    """Heatmap of layer × head. The heads that `plan` removes are crossed out.

    `scores` has shape (layers, heads). Each score is shown as a share of the layer's best head, on
    a logarithmic scale where the median share is below a tenth.
    """
    share = relative(scores)
    heads = scores.shape[1]
    figure = go.Figure(
        go.Heatmap(
            **_shaded(share, np.median(share) < 0.1),
            xgap=1,
            ygap=1,
            customdata=np.stack([scores, share], axis=2),
            hovertemplate="layer %{y}, head %{x}<br>score %{customdata[0]:.4g} "
            "(%{customdata[1]:.2%} of the layer's best)<extra></extra>",
        )
    )
    if plan is not None:
        removed = [
            (layer, head)
            for layer, kept in enumerate(plan.layers)
            for head in sorted(set(range(heads)) - set(kept.kept_heads))
        ]
        figure.add_scatter(
            x=[head for _, head in removed],
            y=[layer for layer, _ in removed],
            mode="markers",
            marker={
                "symbol": "x",
                "color": "#ffffff",
                "size": 9,
                "line": {"color": "#000000", "width": 1.5},
            },
            name="removed",
            hovertemplate="layer %{y}, head %{x}: removed<extra></extra>",
        )
    figure.update_xaxes(
        title="head",
        tick0=0,
        dtick=1 if heads <= 16 else 4 if heads <= 64 else 16,
        tickangle=0,
        range=[-0.5, heads - 0.5],
        showgrid=False,
    )
    figure.update_yaxes(**layer_axis(len(scores), downwards=True), showgrid=False)
    return laid_out(figure, title, height)


def channel_map(
    scores: np.ndarray, ordered: bool, module: str = "MLP", height: int = 520
) -> go.Figure:
    """Heatmap of layer × channel, by channel index or sorted from the best to the worst.

    `scores` has shape (layers, width). Layers of more than `MAX_COLUMNS` channels are binned, and a
    bin shows its largest score. The scale is logarithmic where the median channel is below 30 % of
    its layer's best.
    """
    share = relative(scores)
    width = scores.shape[1]
    median, below = float(np.median(share)), float((share < 0.1).mean())
    shown, edges = _binned(-np.sort(-share, axis=1) if ordered else share)
    hover = "%{customdata:.3g} of the layer's best"
    if are_positions(scores):
        shades = _shaded(
            shown,
            False,
            "position in the<br>order of elimination",
            tickvals=[0, 1],
            ticktext=["first removed", "last"],
        )
        hover = "removed after %{customdata:.1%} of the others"
        title = f"{module} channels by their position in each layer's order of elimination"
    elif median < 0.3:
        shades = _shaded(shown, True)
        title = f"{below:.0%} of {module} channels score under a tenth of their layer's best"
    else:
        shades = _shaded(shown, False)
        title = f"Half of the {module} channels score under {median:.0%} of their layer's best"
    figure = go.Figure(
        go.Heatmap(
            **shades,
            x=edges,
            customdata=shown.astype(np.float32),
            hovertemplate=f"layer %{{y}}, channel %{{x}}: {hover}<extra></extra>",
        )
    )
    figure.update_xaxes(
        title=f"{module} channel, " + ("best first" if ordered else "by index"), range=[0, width]
    )
    figure.update_yaxes(**layer_axis(len(scores), downwards=True))
    return laid_out(figure, title, height)


def _binned(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest value of each bin of neighbouring columns, and each bin's first column."""
    width = values.shape[1]
    starts = np.unique(np.linspace(0, width, min(width, MAX_COLUMNS), endpoint=False).astype(int))
    return np.maximum.reduceat(values, starts, axis=1), starts


def concentration(shares: dict[str, np.ndarray], share: float) -> go.Figure:
    """For each layer, how small a share of its channels holds `share` of the energy."""
    figure = go.Figure()
    for module, values in shares.items():
        figure.add_bar(
            y=values,
            name=NAMES[module],
            marker_color=COLOURS[module],
            hovertemplate=f"{NAMES[module]} layer %{{x}}: %{{y:.1%}} of channels<extra></extra>",
        )
    layers = len(next(iter(shares.values())))
    figure.update_xaxes(**layer_axis(layers)).update_yaxes(
        title=f"channels that hold {share:.0%} of the energy", tickformat=".0%", range=[0, 1]
    )
    means = {NAMES[module]: values.mean() for module, values in shares.items()}
    concentrated = min(means, key=means.get)
    words = " and ".join(f"{mean:.0%} of {name} channels" for name, mean in means.items())
    return laid_out(
        figure,
        f"On average {words} hold {share:.0%} of the energy: {concentrated} is more concentrated",
    )


def sorted_curves(scores: np.ndarray, kept: float | None, module: str) -> go.Figure:
    """Scores of each layer from the best to the worst, as shares of the best; one line per layer.

    `scores` has shape (layers, width). At most `MAX_POINTS` ranks of a layer are drawn. `kept` is
    the share of channels that a cut keeps, for cuts that keep the best ones; the rest is shaded.
    """
    layers, width = scores.shape
    ranks = np.unique(np.linspace(0, width - 1, min(width, MAX_POINTS)).astype(int))
    share = -np.sort(-relative(scores), axis=1)
    x = (ranks + 1) / width
    drawn = np.maximum(share[:, ranks], 1e-6).astype(np.float32)
    shades = sample_colorscale(MAGNITUDE, np.linspace(0, 1, layers))
    figure = go.Figure()
    for layer, (row, colour) in enumerate(zip(drawn, shades, strict=True)):
        figure.add_scatter(
            x=x,
            y=row,
            mode="lines",
            line={"color": colour, "width": 1},
            showlegend=False,
            hovertemplate=f"layer {layer}: the best %{{x:.1%}} score over %{{y:.3g}} of the best"
            "<extra></extra>",
        )
    figure.add_scatter(
        x=[None],
        y=[None],
        mode="markers",
        showlegend=False,
        hoverinfo="skip",
        marker={
            "color": [0],
            "colorscale": MAGNITUDE,
            "cmin": 0,
            "cmax": max(1, layers - 1),
            "showscale": True,
            "colorbar": {"title": {"text": "layer", "side": "right"}},
        },
    )
    if kept is not None and kept < 1:
        figure.add_vrect(
            x0=kept,
            x1=1,
            fillcolor=DENSE,
            opacity=0.25,
            line_width=0,
            annotation_text="the cut",
            annotation_position="top right",
        )
    floor = max(float(np.quantile(share, 0.01)), 1e-4)
    if np.median(share) < 0.3:
        figure.update_yaxes(type="log", dtick=1, exponentformat="none")
        figure.update_yaxes(range=[np.log10(floor) - 0.1, 0.05])
    figure.update_xaxes(title=f"{module} channels, best first", tickformat=".0%", range=[0, 1])
    figure.update_yaxes(title=BEST.replace("<br>", " "))
    halves = share[:, width // 2]
    return laid_out(
        figure,
        f"A layer's median {module} channel has {halves.min():.1%} to {halves.max():.1%} of its "
        "best one's score",
    )


def layer_curve(scores: np.ndarray, kept: np.ndarray, layer: int, module: str) -> go.Figure:
    """Every score of one layer, from the best to the worst, coloured by whether it is kept.

    `scores` and `kept` have shape (width,).
    """
    order = np.argsort(-scores, kind="stable")
    ordered, stays = scores[order], kept[order]
    ranks = np.arange(1, len(order) + 1)
    figure = go.Figure()
    for name, shown, colour in (
        ("kept", stays, COLOURS[module.lower()]),
        ("removed", ~stays, DENSE),
    ):
        if shown.any():
            figure.add_scatter(
                x=ranks,
                y=np.where(shown, ordered, 0).astype(np.float32),
                name=name,
                mode="lines",
                line={"width": 0, "color": colour, "shape": "hvh"},
                fill="tozeroy",
                fillcolor=colour,
                hoverinfo="skip",
            )
    figure.add_scatter(
        x=ranks,
        y=ordered.astype(np.float32),
        mode="lines",
        showlegend=False,
        line={"color": "#000000", "width": 1},
        opacity=0.5,
        customdata=order,
        hovertemplate="rank %{x:,}: channel %{customdata:,}, score %{y:.4g}<extra></extra>",
    )
    figure.update_xaxes(title=f"{module} channels of layer {layer}, best first")
    figure.update_yaxes(title="score", rangemode="tozero")
    total = scores.sum()
    share = scores[kept].sum() / total if total > 0 else 1.0
    title = (
        f"Layer {layer} keeps {kept.sum():,} of {len(kept):,} {module} channels, "
        f"with {share:.1%} of the scores"
    )
    return laid_out(figure, title)
