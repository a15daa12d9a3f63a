"""Measured GGUF files: the frontier of what they cost against perplexity, and their table."""

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.colors import qualitative

from pages.charts.common import DENSE, PERPLEXITY, laid_out
from pages.charts.curve_chart import PALETTE
from transact_core.data.corpus import short_name
from transact_core.export.gguf_points import FilePoint
from transact_core.forward.perplexity import paired_difference
from transact_core.planning.frontier import frontier

COSTS = {
    "Size": ("file size (MB)", "MB", False),
    "Prefill": ("prefill, times the dense F16 file", "prefill ×", True),
    "Decoding": ("decoding, times the dense F16 file", "decode ×", True),
    "Memory": ("peak memory (MB)", "peak MB", False),
}
"""For each thing that is drawn against perplexity: its axis, its column, whether more is better."""
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "pentagon", "star")


def files_table(points: Sequence[FilePoint]) -> pd.DataFrame:
    """One row per file; `on_frontier` marks those that no other is as small and as good as."""
    best = frontier([point.bytes for point in points], [point.perplexity for point in points])
    rows = [
        {
            "model": point.model,
            "type": point.quantization,
            "MB": point.bytes / 1e6,
            "perplexity": point.perplexity,
            "before quantising": point.stock_perplexity,
            "prefill ×": point.times and point.times.prefill_speedup,
            "decode ×": point.times and point.times.decode_speedup,
            "prefill tokens/s": point.times and point.times.prefill_tokens_per_second,
            "decode tokens/s": point.times and point.times.decode_tokens_per_second,
            "peak MB": point.times and point.times.peak_bytes and point.times.peak_bytes / 1e6,
            "load s": point.times and point.times.load_seconds,
            "on_frontier": row in best,
            "imatrix": point.imatrix,
            "recovery": point.recovery,
            "granularity": point.granularity,
            "importance": point.importance,
            "trained on": point.trained_on and short_name(point.trained_on),
            "threads": point.times and point.times.threads,
            "runtime": point.runtime,
            "measured": point.measured,
        }
        for row, point in enumerate(points)
    ]
    return pd.DataFrame(rows)


def difference_table(first: FilePoint, second: FilePoint) -> pd.DataFrame:
    """What the first file has more than the second, a row for each figure that both have."""
    table = files_table([first, second])
    columns = ["MB", "perplexity", "prefill ×", "decode ×", "peak MB", "load s"]
    rows = []
    for column in columns:
        one, other = table[column]
        if pd.isna(one) or pd.isna(other):
            continue
        rows.append(
            {
                "": column,
                first.name: one,
                second.name: other,
                "difference": one - other,
                "ratio": one / other,
            }
        )
    return pd.DataFrame(rows)


def difference_in_words(first: FilePoint, second: FilePoint) -> str:
    """The paired difference of losses with its 95 % interval, in a sentence."""
    mean, error = paired_difference(first.evaluation, second.evaluation)
    clear = "" if abs(mean) > 1.96 * error else ", which these tokens do not tell apart"
    return (
        f"The loss of {first.name} differs from that of {second.name} by {mean:+.4f} ± "
        f"{1.96 * error:.4f} nats a token{clear}."
    )


def file_frontier(points: Sequence[FilePoint], cost: str, logarithmic: bool = False) -> go.Figure:
    """Perplexity against what files cost, a colour for each model; the line is the frontier."""
    axis, column, more_is_better = COSTS[cost]
    table = files_table(points).dropna(subset=[column])
    sign = -1 if more_is_better else 1
    best = frontier(list(sign * table[column]), list(table["perplexity"]))
    figure = go.Figure()
    line = table.iloc[best]
    figure.add_scatter(
        x=line[column],
        y=line["perplexity"],
        mode="lines",
        line={"color": "#888888", "dash": "dot", "width": 1.5},
        name="frontier",
        hoverinfo="skip",
    )
    is_best = table.index.isin(table.index[best])
    others = [model for model in dict.fromkeys(table["model"]) if model != "dense"]
    palette = (*PALETTE[:6], *qualitative.Dark24)  # Not its yellow, too pale for text.
    styles = {
        "dense": (DENSE, "diamond"),
        **{
            model: (palette[place % len(palette)], SYMBOLS[place % len(SYMBOLS)])
            for place, model in enumerate(others)
        },
    }
    for model in [name for name in styles if name in set(table["model"])]:
        mine = table["model"] == model
        colour, symbol = styles[model]
        rows = table[mine]
        figure.add_scatter(
            x=rows[column],
            y=rows["perplexity"],
            mode="markers+text",
            name=model,
            text=rows["type"],
            textposition="top center",
            textfont={"size": 10},
            marker={
                "color": colour,
                "size": 10,
                "symbol": [symbol if unbeaten else f"{symbol}-open" for unbeaten in is_best[mine]],
                "line": {"color": colour, "width": 1.5},
            },
            hovertemplate=f"{model}, %{{text}}: %{{x:,.2f}}, perplexity %{{y:.3f}}<extra></extra>",
        )
    figure.update_xaxes(title=axis)
    figure.update_yaxes(title=PERPLEXITY, type="log" if logarithmic else "linear")
    figure = laid_out(figure, _title(table, is_best, cost), 520)
    return figure.update_layout(
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": -0.16, "yanchor": "top"}
    )


def _title(table: pd.DataFrame, is_best: pd.Series, cost: str) -> str:
    if table.empty:
        return f"No file is timed yet, which {cost.lower()} needs"
    pruned = int((table["model"] != "dense")[is_best].sum())
    return f"{cost}: {pruned} of the {int(is_best.sum())} files on the frontier are pruned"
