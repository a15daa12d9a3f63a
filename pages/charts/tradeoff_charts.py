"""Perplexity against what is saved: the Pareto frontier, and a map over both ratios."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from pages.charts.common import BOTH, DENSE, MAGNITUDE, MHA, MLP, PERPLEXITY, laid_out
from pages.charts.curve_chart import (
    KINDS,
    TOLERATED,
    interval,
    points_table,
    removed_shares,
    what_is_cut,
)
from transact_core.experiments.bench import Measurement
from transact_core.forward.perplexity import Evaluation
from transact_core.models.footprint import Footprint
from transact_core.planning.frontier import frontier

COSTS = {
    "parameters": ("parameters (M)", 1e6, "M parameters", "parameters"),
    "kv_bytes_per_token": ("KV cache per token (kB)", 1e3, "kB KV/token", "KV cache"),
}
"""For each field of a footprint: axis title, divisor of the axis, unit, and what is saved."""
MAP_TICKS = (1, 1.1, 1.2, 1.5, 2, 3, 5, 10, 30, 100)
"""Ticks of the map's colour bar, as multiples of the dense perplexity."""


def frontier_table(
    points: Sequence[Measurement], dense: tuple[Footprint, Evaluation], field: str
) -> pd.DataFrame:
    """One row per point and a last one for the dense model; `on_frontier` marks the best ones."""
    cost, evaluation = dense
    best = frontier(
        [getattr(point.footprint, field) for point in points] + [getattr(cost, field)],
        [point.perplexity for point in points] + [evaluation.perplexity],
    )
    table = points_table(points)
    whole = pd.DataFrame(
        [
            {
                "granularity": "dense",
                "mha_ratio": 0.0,
                "mlp_ratio": 0.0,
                "parameters": cost.parameters,
                "kv_bytes_per_token": cost.kv_bytes_per_token,
                "perplexity": evaluation.perplexity,
            }
        ]
    )
    table = pd.concat([table, whole], ignore_index=True)
    return table.assign(on_frontier=[row in best for row in range(len(table))])


def frontier_chart(
    points: Sequence[Measurement],
    dense: tuple[Footprint, Evaluation],
    widths: tuple[int, int],
    field: str,
    logarithmic: bool = False,
) -> go.Figure:
    """Perplexity against a field of the footprint; a line joins the Pareto-optimal points.

    `dense` is the dense model's footprint and evaluation; the dense model is one of the points.
    """
    axis, scale, unit, _ = COSTS[field]
    table = frontier_table(points, dense, field)
    best = table[table["on_frontier"]].sort_values(field)
    figure = go.Figure()
    figure.add_scatter(
        x=best[field] / scale,
        y=best["perplexity"],
        mode="lines",
        name="best for its size",
        line={"color": DENSE, "width": 2, "shape": "hv"},
        hoverinfo="skip",
    )
    for kind, colour in KINDS.items():
        members = [
            (point, unbeaten)
            for point, unbeaten in zip(points, table["on_frontier"], strict=False)
            if what_is_cut(point, widths) == kind
        ]
        if not members:
            continue
        measured = [point for point, _ in members]
        upper, lower = zip(*map(interval, measured), strict=True)
        figure.add_scatter(
            x=[getattr(point.footprint, field) / scale for point in measured],
            y=[point.perplexity for point in measured],
            error_y={"type": "data", "array": upper, "arrayminus": lower, "thickness": 1},
            mode="markers",
            name=kind,
            marker={
                "color": colour,
                "size": 10,
                "symbol": ["circle" if unbeaten else "circle-open" for _, unbeaten in members],
                "line": {"color": colour, "width": 1.5},
            },
            customdata=[
                [
                    *removed_shares(point, widths),
                    point.plan.granularity,
                    point.plan.importance,
                    point.recovery,
                ]
                for point in measured
            ],
            hovertemplate=f"%{{x:,.1f}} {unit}, perplexity %{{y:.3f}}<br>"
            "MHA −%{customdata[0]:.0%}, MLP −%{customdata[1]:.0%}<br>%{customdata[2]}, "
            "by %{customdata[3]}, %{customdata[4]}<extra></extra>",
        )
    cost, evaluation = dense
    figure.add_scatter(
        x=[getattr(cost, field) / scale],
        y=[evaluation.perplexity],
        mode="markers",
        name="dense",
        marker={"symbol": "diamond", "size": 12, "color": DENSE},
        hovertemplate=f"dense: %{{x:,.1f}} {unit}, perplexity %{{y:.3f}}<extra></extra>",
    )
    figure.update_xaxes(title=axis).update_yaxes(
        title=PERPLEXITY, type="log" if logarithmic else "linear"
    )
    figure = laid_out(figure, _frontier_title(table, field), 450)
    return figure.update_layout(
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": -0.3, "yanchor": "top"}
    )


def _frontier_title(table: pd.DataFrame, field: str) -> str:
    _, scale, unit, saved = COSTS[field]
    dense = table.iloc[-1]
    within = table[table["perplexity"] <= TOLERATED * dense["perplexity"]]
    least = within[field].min()
    if least >= dense[field]:
        return f"Within {TOLERATED} × dense no measured cut saves {saved}"
    return f"Within {TOLERATED} × dense: {least / scale:,.1f} of {dense[field] / scale:,.1f} {unit}"


WIDTHS_STYLE = {
    "uniform": (DENSE, "circle", "dash"),
    "allocated": (MLP, "square", "solid"),
    "traded": (BOTH, "diamond", "solid"),
    "by-hand": (MHA, "star", "dot"),
}
"""Colour, mark and line of points by how their widths were given to layers."""
EQUAL = 0.005
"""Share of its parameters by which two models may differ and count as equally large."""


def equal_parameters_chart(points: Sequence[Measurement], logarithmic: bool = False) -> go.Figure:
    """Perplexity against parameters, one line for each way in which widths were given to layers."""
    figure = go.Figure()
    for widths, (colour, symbol, dash) in WIDTHS_STYLE.items():
        members = sorted(
            (point for point in points if point.decision.widths == widths),
            key=lambda point: point.footprint.parameters,
        )
        if not members:
            continue
        upper, lower = zip(*map(interval, members), strict=True)
        # Only cuts that differ in nothing but their ratios make a line.
        alike = {(each.plan.granularity, each.plan.importance, each.recovery) for each in members}
        figure.add_scatter(
            x=[point.footprint.parameters / 1e6 for point in members],
            y=[point.perplexity for point in members],
            error_y={"type": "data", "array": upper, "arrayminus": lower, "thickness": 1.2},
            mode="lines+markers" if len(alike) == 1 and widths != "by-hand" else "markers",
            name=widths,
            line={"color": colour, "dash": dash},
            marker={"symbol": symbol, "size": 11, "color": colour},
            customdata=[
                [
                    point.plan.mha_ratio,
                    point.plan.mlp_ratio,
                    point.plan.granularity,
                    point.plan.importance,
                    point.recovery,
                ]
                for point in members
            ],
            hovertemplate="%{x:,.2f} M parameters, perplexity %{y:.3f}<br>"
            "MHA −%{customdata[0]:.1%}, MLP −%{customdata[1]:.1%}<br>%{customdata[2]}, by "
            f"%{{customdata[3]}}, %{{customdata[4]}}<extra>{widths}</extra>",
        )
    sizes = [point.footprint.parameters / 1e6 for point in points]
    around = [0.97 * min(sizes), 1.03 * max(sizes)]
    figure.update_xaxes(title="parameters (M)", range=around).update_yaxes(
        title=PERPLEXITY, type="log" if logarithmic else "linear"
    )
    return laid_out(figure, _equal_title(points), 420)


def _equal_title(points: Sequence[Measurement]) -> str:
    """The pair of equally large cuts that differ only in their widths, where they differ most."""
    pairs = [
        (one, other)
        for one in points
        for other in points
        if one.decision.widths == "uniform" != other.decision.widths
        and (one.recovery, one.plan.importance) == (other.recovery, other.plan.importance)
        and abs(one.footprint.parameters / other.footprint.parameters - 1) <= EQUAL
    ]
    if not pairs:
        return "No uniform cut was measured that is as large as one with widths of its own"
    one, other = max(pairs, key=lambda pair: abs(pair[0].delta_nll - pair[1].delta_nll))
    size = other.footprint.parameters / 1e6
    return (
        f"At {size:,.1f} M parameters {other.decision.widths} costs "
        f"{math.exp(other.delta_nll):.2f} × the dense perplexity, uniform "
        f"{math.exp(one.delta_nll):.2f} ×"
    )


def best_at_each_pair(
    points: Sequence[Measurement], widths: tuple[int, int]
) -> list[tuple[tuple[float, float], Measurement]]:
    """For each measured pair of widths, the shares removed and the point of lowest perplexity."""
    best: dict[tuple[float, float], Measurement] = {}
    for point in points:
        removed = removed_shares(point, widths)
        if any(removed) and (removed not in best or point.delta_nll < best[removed].delta_nll):
            best[removed] = point
    return sorted(best.items(), key=lambda item: item[0])


def ratio_map(points: Sequence[Measurement], widths: tuple[int, int]) -> go.Figure:
    """Map of MHA × MLP share removed: measured perplexity as a multiple of the dense model's."""
    best = best_at_each_pair(points, widths)
    times = np.exp([point.delta_nll for _, point in best])
    shade = np.log(np.clip(times, 1, None))
    top = max(math.log(2), float(shade.max(initial=0.0)))
    ticks = [tick for tick in MAP_TICKS if math.log(tick) <= top]
    figure = go.Figure(
        go.Scatter(
            x=[mha for (mha, _), _ in best],
            y=[mlp for (_, mlp), _ in best],
            mode="markers+text",
            text=[_times_in_few_digits(ratio) for ratio in times],
            textfont={
                "size": 11,
                "color": ["#000000" if depth < 0.55 * top else "#ffffff" for depth in shade],
            },
            marker={
                "symbol": "square",
                "size": 36,
                "color": shade,
                "cmin": 0,
                "cmax": top,
                "colorscale": MAGNITUDE,
                "reversescale": True,
                "colorbar": {
                    "title": {"text": "times the dense perplexity", "side": "right"},
                    "tickvals": np.log(ticks),
                    "ticktext": [f"{tick:g}" for tick in ticks],
                },
            },
            customdata=[
                [
                    value,
                    point.perplexity,
                    point.plan.granularity,
                    point.plan.importance,
                    point.recovery,
                ]
                for value, (_, point) in zip(times, best, strict=True)
            ],
            hovertemplate="MHA −%{x:.1%}, MLP −%{y:.1%}<br>%{customdata[0]:.3f} × dense, "
            "perplexity %{customdata[1]:.3f}<br>%{customdata[2]}, "
            "by %{customdata[3]}, %{customdata[4]}<extra></extra>",
        )
    )
    figure.update_xaxes(title="MHA width removed", tickformat=".0%", range=_around(best, 0))
    figure.update_yaxes(title="MLP width removed", tickformat=".0%", range=_around(best, 1))
    within = int((times <= TOLERATED).sum())
    title = (
        f"{within} of {len(best)} measured pairs cost at most {TOLERATED} × the dense perplexity"
        if best
        else "No pair of ratios is measured yet"
    )
    return laid_out(figure, title, 460)


def _times_in_few_digits(times: float) -> str:
    return f"{times:.2f}" if times < 9.995 else f"{times:.0f}" if times < 9999 else "≫"


def _around(best: list[tuple[tuple[float, float], Measurement]], axis: int) -> list[float]:
    """Range of an axis around the measured shares, with room for the markers."""
    return [-0.06, max([shares[axis] for shares, _ in best] + [0.3]) + 0.08]
