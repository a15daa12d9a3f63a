"""Charts of experiments on the dense model: disturbances, single heads, redundancy."""

from collections.abc import Iterable, Sequence
from itertools import groupby

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from pages.charts.common import (
    COLOURS,
    DENSE,
    MAGNITUDE,
    NAMES,
    PERPLEXITY,
    head_map,
    laid_out,
    layer_axis,
)
from pages.charts.text import plain_in_chart
from transact_core.experiments.premise import Disturbed
from transact_core.forward.waists import MODULES, SITES

WAISTS = {"mha": "MHA waist", "mlp": "MLP waist", "residual": "residual stream"}
SYMBOLS = {"mha": "circle", "mlp": "square", "residual": "diamond"}
LARGEST = 1e12
"""Larger perplexities are drawn at this value; the hover text has the measured one."""


def _add_level(figure: go.Figure, value: float, words: str) -> None:
    """A dotted line across a logarithmic chart. Plotly places annotations there by exponents."""
    figure.add_hline(value, line={"color": DENSE, "dash": "dot"})
    figure.add_annotation(
        text=words,
        x=1,
        xref="paper",
        xanchor="right",
        y=np.log10(value),
        yanchor="top",
        showarrow=False,
    )


def _perplexity_axis(figure: go.Figure) -> go.Figure:
    """A logarithmic axis; where it spans two decades or more, with ticks at powers of ten only."""
    drawn = [value for trace in figure.data for value in trace.y]
    return figure.update_yaxes(
        title=PERPLEXITY,
        type="log",
        exponentformat="power",
        dtick=1 if drawn and max(drawn) > 100 * min(drawn) else None,
    )


# --- premise ---------------------------------------------------------------------------------


def _perplexities(
    points: Sequence[Disturbed], across: str, undisturbed: float, names: dict[str, str]
) -> go.Figure:
    """Perplexity of each point against one of its attributes, one line per site."""
    figure = go.Figure()
    ordered = sorted(points, key=lambda point: (SITES.index(point.site), getattr(point, across)))
    for site, members in groupby(ordered, key=lambda point: point.site):
        rows = list(members)
        ratios = np.array([np.exp(min(point.delta_nll, 500)) for point in rows])
        errors = np.nan_to_num([1.96 * point.delta_nll_se for point in rows])
        y = np.minimum(undisturbed * ratios, LARGEST)
        figure.add_scatter(
            x=[getattr(point, across) for point in rows],
            y=y,
            name=names[site],
            mode="lines+markers",
            line_color=COLOURS[site],
            marker={"size": 8, "symbol": SYMBOLS[site]},
            error_y={
                "type": "data",
                "thickness": 1.2,
                "array": y * np.expm1(np.minimum(errors, 20)),
                "arrayminus": -y * np.expm1(-errors),
            },
            customdata=np.column_stack([ratios, undisturbed * ratios]),
            hovertemplate=f"{names[site]}: perplexity %{{customdata[1]:.4g}}, "
            "%{customdata[0]:.4g} × undisturbed<extra></extra>",
        )
    _add_level(figure, undisturbed, "undisturbed")
    return _perplexity_axis(figure)


def _costs(points: Iterable[Disturbed]) -> dict[str, float]:
    """Mean added loss of each site that has points, in nats per token."""
    losses: dict[str, list[float]] = {}
    for point in points:
        losses.setdefault(point.site, []).append(point.delta_nll)
    return {site: float(np.mean(added)) for site, added in losses.items()}


def _verdict(points: Iterable[Disturbed], where: str) -> str:
    """A title that ranks the sites by their mean added loss."""
    costs = _costs(points)
    if set(costs) != set(SITES):
        return f"Disturbed {where}"
    least, middle, most = sorted(costs, key=costs.get)
    return (
        f"Disturbed {where}, the {WAISTS[most]} costs most: {costs[most]:.2f} nats a token, "
        f"{WAISTS[middle]} {costs[middle]:.2f}, {WAISTS[least]} {costs[least]:.2f}"
    )


def strengths(points: Sequence[Disturbed], undisturbed: float) -> go.Figure:
    """Perplexity against the strength of a disturbance of all layers at once."""
    figure = _perplexities(points, "strength", undisturbed, WAISTS)
    noise = points[0].disturbance == "noise"
    figure.update_xaxes(
        title="noise relative to the activation" if noise else "share of channels set to zero",
        tickformat=".0%",
        rangemode="tozero",
    )
    strongest = max(
        (point.strength for point in points),
        default=0,
        key=lambda strength: (sum(point.strength == strength for point in points), strength),
    )
    compared = [point for point in points if point.strength == strongest]
    return laid_out(figure, _verdict(compared, f"by {strongest:.0%} in all layers"), 440)


def layers(points: Sequence[Disturbed], undisturbed: float, count: int) -> go.Figure:
    """Perplexity against the one layer that was disturbed."""
    figure = _perplexities(points, "layer", undisturbed, WAISTS)
    figure.update_xaxes(**layer_axis(count))
    return laid_out(figure, _verdict(points, "in one layer, on average"), 440)


# --- heads -----------------------------------------------------------------------------------


def clickable_heads(scores: np.ndarray, chosen: tuple[int, int], title: str) -> go.Figure:
    """The map of heads with a clickable invisible square on each head; the chosen head is framed.

    Streamlit reports clicks on points but not on heatmaps. A point's x is its head index, its y is
    its layer index.
    """
    count = len(scores)
    height = max(420, min(900, 22 * count + 110))
    figure = head_map(scores, title=title, height=height)
    below = figure.data[0]
    grid = np.indices(scores.shape).reshape(2, -1)
    figure.add_scatter(
        x=grid[1],
        y=grid[0],
        mode="markers",
        showlegend=False,
        customdata=np.asarray(below.customdata).reshape(-1, 2),
        marker={"symbol": "square", "opacity": 0, "size": max(5, (height - 110) / count)},
        selected_marker_opacity=0,
        unselected_marker_opacity=0,
        hovertemplate=below.hovertemplate,
    )
    below.update(hoverinfo="skip", hovertemplate=None)
    layer, head = chosen
    figure.add_shape(
        type="rect",
        x0=head - 0.5,
        x1=head + 0.5,
        y0=layer - 0.5,
        y1=layer + 0.5,
        line={"color": "#D55E00", "width": 3},
    )
    return figure.update_layout(clickmode="event+select", dragmode=False)


def head_channels(scores: np.ndarray, layer: int, head: int) -> go.Figure:
    """Scores of one head's channels, shape (head_dim,), by index."""
    figure = go.Figure(
        go.Bar(
            x=np.arange(len(scores)),
            y=scores,
            marker_color=COLOURS["mha"],
            hovertemplate="channel %{x}: %{y:.4g}<extra></extra>",
        )
    )
    figure.update_xaxes(title="channel of the head").update_yaxes(title="score", rangemode="tozero")
    best = int(scores.argmax())
    share = scores[best] / scores.sum() if scores.sum() > 0 else 0
    return laid_out(
        figure,
        f"Layer {layer}, head {head}: channel {best} alone has {share:.0%} of its channels' scores",
        300,
    )


def attention(pattern: np.ndarray, tokens: Sequence[str], layer: int, head: int) -> go.Figure:
    """Attention weights of one head, shape (queries, keys); `tokens` are their labels."""
    positions = np.arange(len(tokens))
    shown = [plain_in_chart(token.replace("\n", "⏎").replace("\t", "⇥")) for token in tokens]
    seen = np.tril(np.ones_like(pattern, dtype=bool))
    names = np.array(shown, dtype=object)
    figure = go.Figure(
        go.Heatmap(
            z=np.where(seen, pattern, np.nan),
            colorscale=MAGNITUDE,
            zmin=0,
            zmax=max(0.05, float(np.quantile(pattern[seen], 0.99))),
            customdata=np.dstack(
                [np.repeat(names[:, None], len(names), 1), np.repeat(names[None], len(names), 0)]
            ),
            colorbar={"title": {"text": "attention", "side": "right"}},
            hovertemplate="%{customdata[0]} (%{y}) attends to %{customdata[1]} (%{x}): %{z:.1%}"
            "<extra></extra>",
            hoverongaps=False,
        )
    )
    axis = {"tickvals": positions, "ticktext": shown, "tickfont": {"size": 10}, "showgrid": False}
    figure.update_xaxes(**axis, title="key: the token attended to", tickangle=-60)
    figure.update_yaxes(**axis, title="query: the token that attends", autorange="reversed")
    first = float(pattern[1:, 0].mean()) if len(tokens) > 1 else 1.0
    own = float(np.diagonal(pattern)[1:].mean()) if len(tokens) > 1 else 1.0
    before = float(np.diagonal(pattern, -1).mean()) if len(tokens) > 1 else 0.0
    return laid_out(
        figure,
        f"Layer {layer}, head {head}: {first:.0%} first token, {own:.0%} itself, "
        f"{before:.0%} token before",
        max(420, 13 * len(tokens) + 180),
    )


# --- redundancy ------------------------------------------------------------------------------


def lost_energy(frame: pd.DataFrame) -> go.Figure:
    """Energy lost against width removed; columns module, removed, lost, least and most."""
    figure = go.Figure()
    for module in MODULES:
        rows = frame[frame["module"] == module]
        colour = COLOURS[module]
        edge = {
            "x": rows["removed"],
            "mode": "lines",
            "line": {"color": colour, "width": 0},
            "hoverinfo": "skip",
            "showlegend": False,
        }
        figure.add_scatter(**edge, y=rows["least"])
        figure.add_scatter(**edge, y=rows["most"], fill="tonexty")
        figure.add_scatter(
            x=rows["removed"],
            y=rows["lost"],
            name=NAMES[module],
            mode="lines+markers",
            line_color=colour,
            customdata=rows[["least", "most"]],
            hovertemplate=f"{NAMES[module]}: %{{x:.0%}} removed, %{{y:.2%}} lost<br>layers from "
            "%{customdata[0]:.2%} to %{customdata[1]:.2%}<extra></extra>",
        )
    figure.update_xaxes(title="share of the width removed", tickformat=".0%", range=[-0.02, 1])
    figure.update_yaxes(title="written energy lost", tickformat=".0%", range=[-0.02, 1.02])
    return laid_out(figure, _compared(frame), 420)


def _compared(frame: pd.DataFrame) -> str:
    """A title that compares both modules at the computed share of MHA that is nearest to half."""
    at = {
        module: {
            round(row.removed, 2): row.lost
            for row in frame[frame["module"] == module].itertuples()
            if row.removed > 0
        }
        for module in MODULES
    }
    share = min(at["mha"], key=lambda removed: abs(removed - 0.5), default=None)
    if share is None:
        return "MHA cannot be narrower with these choices"
    lost = np.interp(share, list(at["mlp"]), list(at["mlp"].values()))
    return (
        f"Without {share:.0%} of its width MHA loses {at['mha'][share]:.0%} of what it writes, "
        f"MLP {lost:.0%}"
    )


def bare_perplexities(frame: pd.DataFrame, dense: float) -> go.Figure:
    """Perplexity against width removed; columns module, removed, perplexity, low and high."""
    figure = go.Figure()
    for module in MODULES:
        rows = frame[frame["module"] == module].sort_values("removed")
        figure.add_scatter(
            x=[0, *rows["removed"]],
            y=[dense, *rows["perplexity"]],
            name=NAMES[module],
            mode="lines+markers",
            line_color=COLOURS[module],
            error_y={
                "type": "data",
                "thickness": 1.2,
                "array": [0, *(rows["high"] - rows["perplexity"])],
                "arrayminus": [0, *(rows["perplexity"] - rows["low"])],
            },
            hovertemplate=f"{NAMES[module]}: %{{x:.0%}} removed, perplexity %{{y:.4g}}"
            "<extra></extra>",
        )
    _add_level(figure, dense, "dense")
    figure.update_xaxes(title="share of the width removed", tickformat=".0%", range=[-0.02, 1])
    _perplexity_axis(figure)
    title = "Measured: perplexity of bare cuts of one module"
    if set(frame["module"]) == set(MODULES):
        shares = frame[frame["module"] == "mha"]["removed"]
        share = min(shares, key=lambda removed: abs(removed - 0.5))
        near = {
            module: min(
                frame[frame["module"] == module].itertuples(),
                key=lambda row: abs(row.removed - share),
            )
            for module in MODULES
        }
        words = " and ".join(
            f"{row.perplexity / dense:,.1f} × without {row.removed:.0%} of {NAMES[module]}"
            for module, row in near.items()
        )
        title = f"Measured, without repair: perplexity is {words}"
    return laid_out(figure, title, 420)
