"""Perplexity against the share of width removed, one point per measured cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from pages.charts.common import BOTH, DENSE, MHA, MLP, PERPLEXITY, laid_out
from pages.charts.text import plain_in_chart

if TYPE_CHECKING:
    import pandas as pd

    from transact_core.experiments.bench import Measurement
    from transact_core.forward.perplexity import Evaluation

KINDS = {"MHA only": MHA, "MLP only": MLP, "both": BOTH}
RECOVERIES = {
    "least-squares": ("least-squares", "solid", ""),
    "bias": ("bias", "dash", "-open-dot"),
    "none": ("bare cut", "dot", "-open"),
}
"""For each recovery: its name, the dash of its line, and the suffix of its marker symbol. One that
is not here is drawn as `OTHER`."""
OTHER = ("dashdot", "-dot")
"""Dash and marker suffix of a recovery that is not in `RECOVERIES`."""
SHAPES = ("circle", "square", "triangle-up", "star", "hexagon", "cross", "triangle-down")
"""Marker symbols, one for each combination of importance and granularity in the chart."""
PALETTE = (MHA, MLP, BOTH, "#CC79A7", "#D55E00", "#56B4E9", "#F0E442")
"""Colours for the values of choices other than what is cut."""
WIDTHS = {
    "uniform": "",
    "allocated": ", allocated: means",
    "traded": ", traded: means",
    "by-hand": ", by hand: means",
}
"""What is said of a cut's two widths, by how they were given to layers."""
TOLERATED = 1.2
"""Titles call the loss small up to this multiple of the dense perplexity."""

COLOURED_BY = {
    "what is cut": lambda kind, point: kind,
    "granularity": lambda kind, point: point.plan.granularity,
    "importance": lambda kind, point: point.plan.importance,
    "recovery": lambda kind, point: point.recovery,
    "widths": lambda kind, point: point.decision.widths,
}
"""What colours can stand for, and how its value is read from a point."""


def removed_shares(point: Measurement, widths: tuple[int, int]) -> tuple[float, float]:
    """Shares of the MHA and MLP width that were removed; widths are rounded, ratios are not."""
    return (
        1 - point.footprint.mha_width / widths[0],
        1 - point.footprint.mlp_width / widths[1],
    )


def what_is_cut(point: Measurement, widths: tuple[int, int]) -> str | None:
    """One of `KINDS`, or None where nothing is removed."""
    removed = removed_shares(point, widths)
    if not any(removed):
        return None
    return "both" if all(removed) else "MHA only" if removed[0] else "MLP only"


def interval(point: Measurement) -> tuple[float, float]:
    """How far the 95 % interval of perplexity reaches up and down; NaN for a single window."""
    return (
        point.perplexity * np.expm1(1.96 * point.delta_nll_se),
        -point.perplexity * np.expm1(-1.96 * point.delta_nll_se),
    )


def points_table(points: Sequence[Measurement]) -> pd.DataFrame:
    """One row per point: its choices, then the fields of `points.csv`."""
    import pandas as pd

    return pd.DataFrame(
        [
            {
                "granularity": point.plan.granularity,
                "importance": point.plan.importance,
                "recovery": point.recovery,
                "widths": point.decision.widths,
                **point.row(),
            }
            for point in points
        ]
    )


def perplexity_curve(
    points: Sequence[Measurement],
    dense: Evaluation | None,
    widths: tuple[int, int],
    logarithmic: bool = False,
    coloured_by: str = "what is cut",
) -> go.Figure:
    """Perplexity against the share of width that was removed.

    `widths` are the dense model's MHA and MLP widths. Bars are 95 % intervals of the paired
    difference from the dense model. `coloured_by` is one of `COLOURED_BY`.
    """
    figure = go.Figure()
    series = _series(points, widths)
    variants = list(dict.fromkeys(variant for *_, variant in series))
    colours = _colours(series, coloured_by)
    for (kind, recovery, variant), members in series.items():
        members.sort(key=lambda member: member[0])
        measured = [point for _, point in members]
        # Cuts of both modules can share an x value; a line through them would mean nothing.
        line = len({removed for removed, _ in members}) == len(members)
        error, lower = zip(*map(interval, measured), strict=True)
        name, dash, filling = RECOVERIES.get(recovery, (recovery, *OTHER))
        shape = SHAPES[variants.index(variant) % len(SHAPES)]
        figure.add_scatter(
            x=[removed for removed, _ in members],
            y=[point.perplexity for point in measured],
            error_y={"type": "data", "array": error, "arrayminus": lower, "thickness": 1.2},
            mode="lines+markers" if line else "markers",
            name=", ".join((kind, name, *variant)),
            line={"color": colours[COLOURED_BY[coloured_by](kind, measured[0])], "dash": dash},
            marker={"symbol": shape + filling, "size": 10},
            customdata=[
                [
                    cost.mha_width,
                    cost.mlp_width,
                    cost.parameters / 1e6,
                    plan.granularity,
                    plan.importance,
                    WIDTHS[point.decision.widths],
                ]
                for point, plan, cost in (
                    (point, point.plan, point.footprint) for point in measured
                )
            ],
            hovertemplate="perplexity %{y:.3f}<br>MHA width %{customdata[0]:,}, MLP width "
            "%{customdata[1]:,}%{customdata[5]}<br>%{customdata[2]:.1f} M parameters<br>"
            f"%{{customdata[3]}}, by %{{customdata[4]}}, {name}<extra>{kind}</extra>",
        )
    if dense is not None:
        figure.add_hline(y=dense.perplexity, line={"color": DENSE, "dash": "dash", "width": 1})
        figure.add_scatter(
            x=[0],
            y=[dense.perplexity],
            mode="markers",
            name="dense",
            marker={"symbol": "diamond", "size": 12, "color": DENSE},
            hovertemplate="dense: perplexity %{y:.3f}<extra></extra>",
        )
    figure.update_xaxes(title="width removed (of both, the larger share)", tickformat=".0%")
    largest = max((removed for group in series.values() for removed, _ in group), default=0.5)
    figure.update_xaxes(range=[-0.03, largest + 0.05])
    figure.update_yaxes(title=PERPLEXITY, type="log" if logarithmic else "linear")
    figure = laid_out(figure, _curve_title(points, dense), 460)
    if len(series) > 3:
        figure.update_layout(
            height=460 + 24 * len(series),
            legend={"orientation": "v", "x": 0, "xanchor": "left", "y": -0.2, "yanchor": "top"},
        )
    return figure


def other_texts_chart(on_texts: Sequence[tuple[str, Sequence[Measurement]]]) -> go.Figure:
    """What each cut costs on other texts, against what it costs on the first; × dense.

    `on_texts` are the names of the texts, each with the same cuts as measured on it, in one order.
    """
    (first, reference), *others = on_texts
    figure = go.Figure()
    times = {name: np.exp([point.delta_nll for point in points]) for name, points in on_texts}
    for (name, points), colour in zip(others, PALETTE, strict=False):
        figure.add_scatter(
            x=times[first],
            y=times[name],
            mode="markers",
            name=plain_in_chart(name),
            marker={"color": colour, "size": 10},
            error_y={
                "type": "data",
                "array": times[name] * np.expm1([1.96 * point.delta_nll_se for point in points]),
                "arrayminus": times[name]
                * -np.expm1([-1.96 * point.delta_nll_se for point in points]),
                "thickness": 1.2,
            },
            customdata=[[point.plan.mha_ratio, point.plan.mlp_ratio] for point in reference],
            hovertemplate="MHA −%{customdata[0]:.0%}, MLP −%{customdata[1]:.0%}<br>"
            "%{y:.3f} × dense here, %{x:.3f} × there<extra></extra>",
        )
    highest = max((float(values.max()) for values in times.values() if len(values)), default=2.0)
    figure.add_scatter(
        x=[1, highest],
        y=[1, highest],
        mode="lines",
        name="as much on both",
        line={"color": DENSE, "dash": "dash", "width": 1},
        hoverinfo="skip",
    )
    axis = {"type": "log", "exponentformat": "none"}
    figure.update_xaxes(title=f"times dense on {plain_in_chart(first)}", **axis)
    figure.update_yaxes(title="times dense on the other text", **axis)
    worst = max(
        (
            (times[name][place] / times[first][place], name, place)
            for name, points in others
            for place in range(len(points))
        ),
        default=None,
    )
    title = "No cut is measured on another text yet"
    if worst is not None:
        _, name, place = worst
        title = (
            f"A cut that costs {times[first][place]:.2f} × on {plain_in_chart(first)} costs "
            f"{times[name][place]:.2f} × on {plain_in_chart(name)}"
        )
    return laid_out(figure, title, 420)


def _series(
    points: Sequence[Measurement], widths: tuple[int, int]
) -> dict[tuple[str, str, tuple[str, ...]], list[tuple[float, Measurement]]]:
    """Groups the points that one line may join: same modules, recovery and other choices.

    Granularity, importance and widths are part of a group's key where points differ in them.
    Granularity does not matter to a cut that leaves the attention whole.
    """
    importances = {point.plan.importance for point in points}
    granularities = {
        point.plan.granularity for point in points if point.footprint.mha_width < widths[0]
    }
    widths_given = {point.decision.widths for point in points}
    series = {}
    for point in points:
        kind = what_is_cut(point, widths)
        if kind is None:
            continue
        variant = ()
        if kind != "MLP only" and len(granularities) > 1:
            variant += (point.plan.granularity,)
        if len(importances) > 1:
            variant += (point.plan.importance,)
        if len(widths_given) > 1:
            variant += (point.decision.widths,)
        removed = max(removed_shares(point, widths))
        series.setdefault((kind, point.recovery, variant), []).append((removed, point))
    return dict(sorted(series.items()))


def _colours(series: dict, coloured_by: str) -> dict[str, str]:
    if coloured_by == "what is cut":
        return KINDS
    values = sorted(
        {
            COLOURED_BY[coloured_by](kind, point)
            for (kind, *_), members in series.items()
            for _, point in members
        }
    )
    return {value: PALETTE[index % len(PALETTE)] for index, value in enumerate(values)}


def _curve_title(points: Sequence[Measurement], dense: Evaluation | None) -> str:
    if dense is None:
        return "Perplexity against ratio"
    if not points:
        return f"The dense model's perplexity is {dense.perplexity:.2f}; no cut is measured yet"
    within = [point for point in points if point.perplexity <= TOLERATED * dense.perplexity]
    if not within:
        return f"Every measured cut costs more than {TOLERATED} × the dense {dense.perplexity:.2f}"
    smallest = min(within, key=lambda point: point.footprint.parameters)
    return (
        f"Within {TOLERATED} × the dense {dense.perplexity:.2f}, the smallest model measured has "
        f"{smallest.footprint.parameters / 1e6:,.1f} M parameters"
    )
