"""Prefill and decode time against the length of the prompt, dense and pruned."""

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pages.charts.common import DENSE, MHA, laid_out
from transact_core.forward.latency import LatencyPoint, Timing

STYLES = {"dense": (DENSE, "dash", "diamond"), "pruned": (MHA, "solid", "circle")}
PHASES = {
    "prefill": "Prefill: the whole prompt",
    "decode": "Decode: one token after it",
}


def latency_chart(points: Sequence[LatencyPoint]) -> go.Figure:
    """Milliseconds against prompt tokens: medians, with the interquartile range of the repeats."""
    figure = make_subplots(cols=2, subplot_titles=list(PHASES.values()), horizontal_spacing=0.1)
    for column, phase in enumerate(PHASES, start=1):
        for model, (colour, dash, symbol) in STYLES.items():
            mine = [point for point in points if point.model == model]
            timings = [getattr(point, phase) for point in mine]
            medians = [1e3 * timing.median for timing in timings]
            figure.add_scatter(
                x=[point.length for point in mine],
                y=medians,
                row=1,
                col=column,
                name=model,
                legendgroup=model,
                showlegend=column == 1,
                mode="lines+markers",
                line={"color": colour, "dash": dash},
                marker={"symbol": symbol, "size": 9},
                error_y={
                    "type": "data",
                    "thickness": 1.2,
                    "array": [
                        1e3 * timing.quartiles[1] - middle
                        for timing, middle in zip(timings, medians, strict=True)
                    ],
                    "arrayminus": [
                        middle - 1e3 * timing.quartiles[0]
                        for timing, middle in zip(timings, medians, strict=True)
                    ],
                },
                hovertemplate=f"{model}, %{{x:,}} tokens: %{{y:,.1f}} ms<extra></extra>",
            )
    lengths = sorted({point.length for point in points})
    figure.update_xaxes(
        title="prompt (tokens)",
        type="log",
        tickvals=lengths,
        ticktext=[f"{length:,}" for length in lengths],
    )
    figure.update_yaxes(title="ms", rangemode="tozero")
    figure = laid_out(figure, latency_title(points), 420)
    return figure.update_layout(
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": -0.2, "yanchor": "top"}
    )


def latency_title(points: Sequence[LatencyPoint]) -> str:
    """A title with the ratio of times at the longest prompt that was timed on both models."""
    by_model = {
        model: {point.length: point for point in points if point.model == model} for model in STYLES
    }
    both = by_model["dense"].keys() & by_model["pruned"].keys()
    if not both:
        return "No length is timed yet"
    dense, pruned = (by_model[model][max(both)] for model in STYLES)
    prefill, decode = (_times(getattr(pruned, phase), getattr(dense, phase)) for phase in PHASES)
    return (
        f"After {max(both):,} tokens the pruned model takes {prefill} the dense one's time in "
        f"prefill, {decode} in decode"
    )


def _times(pruned: Timing, dense: Timing) -> str:
    """The ratio of the medians, marked where the interquartile ranges overlap."""
    (low, high), (dense_low, dense_high) = pruned.quartiles, dense.quartiles
    unclear = " (within the spread)" if low <= dense_high and dense_low <= high else ""
    return f"{pruned.median / dense.median:.2f} ×{unclear}"


def latency_table(points: Sequence[LatencyPoint]) -> pd.DataFrame:
    """One row per model and prompt length; times in milliseconds."""
    rows = []
    for point in points:
        row = {"prompt_tokens": point.length, "model": point.model}
        for phase in PHASES:
            timing = getattr(point, phase)
            row[f"{phase}_ms"] = 1e3 * timing.median
            row[f"{phase}_ms_lower"], row[f"{phase}_ms_upper"] = (
                1e3 * seconds for seconds in timing.quartiles
            )
            row[f"{phase}_tokens_per_s"] = getattr(point, f"{phase}_tokens_per_second")
        rows.append(row | {"working_bytes": point.working_bytes})
    return pd.DataFrame(rows)
