"""Perplexity against ratio, a point for each cut that was measured."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from pages.shared.charts import BOTH, DENSE, MHA, MLP, laid_out
from transact_core.bench import Measurement
from transact_core.evaluation import Evaluation

KINDS = {"MHA only": MHA, "MLP only": MLP, "both": BOTH}
RECOVERIES = {
    "least-squares": ("least-squares", "solid", ""),
    "bias": ("bias", "dash", "-open-dot"),
    "none": ("bare cut", "dot", "-open"),
}
"""Name, dash and filling of the markers."""
SHAPES = ("circle", "square", "triangle-up", "star", "hexagon", "cross", "triangle-down")
"""Of the markers, one for each importance and granularity that is told apart."""


def perplexity_curve(
    points: Sequence[Measurement],
    dense: Evaluation | None,
    widths: tuple[int, int],
    logarithmic: bool = False,
) -> go.Figure:
    """Perplexity against the share of width that was really removed.

    `widths` are the dense model's MHA and MLP widths. Bars are 95 % intervals of the paired
    difference from the dense model.
    """
    figure = go.Figure()
    series = _series(points, widths)
    variants = list(dict.fromkeys(variant for *_, variant in series))
    for (kind, recovery, variant), members in series.items():
        members.sort(key=lambda member: member[0])
        measured = [point for _, point in members]
        error = [point.perplexity * np.expm1(1.96 * point.delta_nll_se) for point in measured]
        lower = [-point.perplexity * np.expm1(-1.96 * point.delta_nll_se) for point in measured]
        name, dash, filling = RECOVERIES[recovery]
        shape = SHAPES[variants.index(variant) % len(SHAPES)]
        figure.add_scatter(
            x=[removed for removed, _ in members],
            y=[point.perplexity for point in measured],
            error_y={"type": "data", "array": error, "arrayminus": lower, "thickness": 1.2},
            mode="lines+markers", name=", ".join((kind, name, *variant)),
            line={"color": KINDS[kind], "dash": dash},
            marker={"symbol": shape + filling, "size": 10},
            customdata=[
                [cost.mha_width, cost.mlp_width, cost.parameters / 1e6,
                 plan.granularity, plan.importance]
                for plan, cost in ((point.plan, point.footprint) for point in measured)
            ],
            hovertemplate="perplexity %{y:.3f}<br>MHA width %{customdata[0]:,}, MLP width "
            "%{customdata[1]:,}<br>%{customdata[2]:.1f} M parameters<br>%{customdata[3]}, by "
            f"%{{customdata[4]}}, {name}<extra>{kind}</extra>",
        )  # fmt: skip
    if dense is not None:
        figure.add_hline(y=dense.perplexity, line={"color": DENSE, "dash": "dash", "width": 1})
        figure.add_scatter(
            x=[0], y=[dense.perplexity], mode="markers", name="dense",
            marker={"symbol": "diamond", "size": 12, "color": DENSE},
            hovertemplate="dense: perplexity %{y:.3f}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title="width removed (of both, the larger share)", tickformat=".0%")
    largest = max((removed for group in series.values() for removed, _ in group), default=0.5)
    figure.update_xaxes(range=[-0.03, largest + 0.05])
    figure.update_yaxes(title="perplexity", type="log" if logarithmic else "linear")
    figure = laid_out(figure, _curve_title(points, dense), 460)
    if len(series) > 3:
        figure.update_layout(
            height=460 + 24 * len(series),
            legend={"orientation": "v", "x": 0, "xanchor": "left", "y": -0.2, "yanchor": "top"},
        )
    return figure


def _series(
    points: Sequence[Measurement], widths: tuple[int, int]
) -> dict[tuple[str, str, tuple[str, ...]], list[tuple[float, Measurement]]]:
    """Points that a line may join, by what was cut, the recovery, and the choices to tell apart.

    Granularity and importance are told apart where there is more than one; granularity is nothing
    to a cut that leaves the heads whole.
    """
    importances = {point.plan.importance for point in points}
    granularities = {
        point.plan.granularity for point in points if point.footprint.mha_width < widths[0]
    }
    series = {}
    for point in points:
        removed = (
            1 - point.footprint.mha_width / widths[0],
            1 - point.footprint.mlp_width / widths[1],
        )
        if not any(removed):
            continue
        kind = "both" if all(removed) else "MHA only" if removed[0] else "MLP only"
        variant = ()
        if removed[0] and len(granularities) > 1:
            variant += (point.plan.granularity,)
        if len(importances) > 1:
            variant += (point.plan.importance,)
        series.setdefault((kind, point.recovery, variant), []).append((max(removed), point))
    return dict(sorted(series.items()))


def _curve_title(points: Sequence[Measurement], dense: Evaluation | None) -> str:
    if dense is None:
        return "Perplexity against ratio"
    if not points:
        return f"The dense model's perplexity is {dense.perplexity:.2f}; no cut is measured yet"
    within = [point for point in points if point.perplexity <= 1.2 * dense.perplexity]
    if not within:
        return f"Every measured cut costs more than 1.2 × the dense {dense.perplexity:.2f}"
    smallest = min(within, key=lambda point: point.footprint.parameters)
    return (
        f"Within 1.2 × the dense {dense.perplexity:.2f}, the smallest model measured has "
        f"{smallest.footprint.parameters / 1e6:,.1f} M parameters"
    )
