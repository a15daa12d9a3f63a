"""Accuracies of the dense and the pruned model on tasks, and their paired differences."""

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pages.charts.common import DENSE, MHA, MLP, laid_out
from pages.charts.text import plain_in_chart
from transact_core.experiments.tasks import Standing

ACCURACIES = ("acc", "acc_norm")
"""Metrics that are shares of questions; what else there is stands in the table alone."""
CERTAIN = 1.96
"""Standard errors on each side of a 95 % interval."""
ROW, AROUND = 44, 170
"""Pixels of a row of the chart, and of what is around the rows."""
APART = 0.14
"""How far the marks of the two models are from the middle of a row, in rows."""


def tasks_frame(standings: Sequence[Standing]) -> pd.DataFrame:
    """A row for each metric of each task; differences are pruned minus dense, paired."""
    rows = []
    for result in standings:
        pruned, dense = (result.model, result.against) if result.against else (None, result.model)
        for metric in result.model.values:
            row: dict[str, object] = {
                "task": result.task,
                "metric": metric,
                "questions": result.asked,
                "of": result.total,
                "few_shot": result.shots,
                "chance": result.chance if metric == "acc" else None,
            }
            for name, figures in (
                ("dense", dense),
                ("pruned", pruned),
                ("difference", result.difference),
            ):
                if figures is not None:
                    row[name] = figures.values[metric]
                    row[f"{name}_stderr"] = figures.errors[metric]
            row["at_chance"] = at_chance(result) if metric == "acc" else ""
            rows.append(row)
    return pd.DataFrame(rows)


def shown_frame(standings: Sequence[Standing]) -> pd.DataFrame:
    """The same in few columns, to be read: each figure with its standard error."""
    frame = tasks_frame(standings)
    shown = frame[["task", "metric"]].copy()
    shown["questions"] = [
        f"{row.questions:,} of {row.of:,}" + (f", {row.few_shot}-shot" if row.few_shot else "")
        for row in frame.itertuples()
    ]
    for name in ("dense", "pruned", "difference"):
        if name in frame:
            sign = "+" if name == "difference" else ""
            shown["pruned − dense" if name == "difference" else name] = [
                f"{value:{sign}.3g} ± {error:.2g}"
                if abs(value) >= 1
                else f"{value:{sign}.3f} ± {error:.3f}"
                for value, error in zip(frame[name], frame[f"{name}_stderr"], strict=True)
            ]
    shown["chance"] = [
        "" if pd.isna(chance) else f"{chance:.3f}" for chance in frame["chance"].astype(float)
    ]
    return shown.assign(**{"at chance": frame["at_chance"]})


def at_chance(result: Standing) -> str:
    """Which of the models is at chance: `dense`, `pruned`, `both`, or nothing."""
    sides = {"dense": result.model}
    if result.against is not None:
        sides = {"dense": result.against, "pruned": result.model}
    names = [name for name, figures in sides.items() if result.at_chance(figures)]
    return "both" if len(names) == 2 else "".join(names)


def tasks_chart(standings: Sequence[Standing]) -> go.Figure:
    """Accuracies with 95 % intervals, the first task on top; beside them the paired differences."""
    rows = [
        (result, metric)
        for result in standings
        for metric in ACCURACIES
        if metric in result.model.values
    ]
    labels = [f"{plain_in_chart(result.task)} · {metric}" for result, metric in rows]
    paired = any(result.against for result in standings)
    figure = make_subplots(
        cols=2 if paired else 1,
        shared_yaxes=True,
        horizontal_spacing=0.04,
        column_titles=["accuracy", "pruned − dense, in points"][: 2 if paired else 1],
    )
    sides = [("dense", DENSE, "diamond", lambda result: result.against or result.model)]
    if paired:
        sides.append(("pruned", MHA, "circle", lambda result: result.model))
    shifts = (-APART, APART) if paired else (0.0,)
    for (name, colour, symbol, figures_of), shift in zip(sides, shifts, strict=True):
        figures = [figures_of(result) for result, _ in rows]
        figure.add_scatter(
            x=[side.values[metric] for side, (_, metric) in zip(figures, rows, strict=True)],
            y=[row + shift for row in range(len(rows))],
            error_x=_bars([side.errors[m] for side, (_, m) in zip(figures, rows, strict=True)]),
            mode="markers",
            name=name,
            marker={"color": colour, "symbol": symbol, "size": 10},
            customdata=[
                [label, result.asked] for label, (result, _) in zip(labels, rows, strict=True)
            ],
            hovertemplate=f"{name}, %{{customdata[0]}}: %{{x:.1%}} of %{{customdata[1]:,}} "
            "questions<extra></extra>",
            row=1,
            col=1,
        )
    guessed = [
        (result.chance, row)
        for row, (result, metric) in enumerate(rows)
        if result.chance is not None and metric == "acc"
    ]
    figure.add_scatter(
        x=[chance for chance, _ in guessed],
        y=[row for _, row in guessed],
        mode="markers",
        name="guessing",
        marker={"symbol": "line-ns-open", "size": 18, "color": MLP, "line": {"width": 2}},
        hovertemplate="guessing: %{x:.1%}<extra></extra>",
        row=1,
        col=1,
    )
    if paired:
        differences = [result.difference.values[metric] for result, metric in rows]
        errors = [result.difference.errors[metric] for result, metric in rows]
        figure.add_scatter(
            x=[100 * value for value in differences],
            y=list(range(len(rows))),
            error_x=_bars([100 * error for error in errors]),
            mode="markers",
            name="paired difference",
            showlegend=False,
            marker={"color": MHA, "size": 10},
            customdata=[[label, 100 * error] for label, error in zip(labels, errors, strict=True)],
            hovertemplate="%{customdata[0]}: %{x:+.1f} points, standard error "
            "%{customdata[1]:.1f}<extra></extra>",
            row=1,
            col=2,
        )
        figure.add_vline(x=0, line={"color": DENSE, "dash": "dash", "width": 1}, row=1, col=2)
        figure.update_xaxes(ticksuffix=" ", row=1, col=2)
    figure.update_xaxes(tickformat=".0%", row=1, col=1)
    figure.update_yaxes(
        range=[len(rows) - 0.5, -0.5], tickvals=list(range(len(rows))), ticktext=labels
    )
    figure = laid_out(figure, tasks_title(standings), AROUND + ROW * max(2, len(rows)))
    return figure.update_layout(
        margin_t=76,
        margin_b=64,
        legend={
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "yref": "container",
            "y": 0.01,
            "yanchor": "bottom",
        },
    )


def _bars(errors: Sequence[float]) -> dict:
    return {"type": "data", "array": [CERTAIN * error for error in errors], "thickness": 1.4}


def tasks_title(standings: Sequence[Standing]) -> str:
    """On how many tasks the cut's accuracy is lower beyond the 95 % interval of the difference."""
    scored = [result for result in standings if "acc" in result.model.values]
    if not scored:
        return "No accuracy is measured yet"
    count = f"{len(scored)} task{'' if len(scored) == 1 else 's'}"
    if any(result.difference is None for result in scored):
        above = sum(not result.at_chance(result.model) for result in scored if result.chance)
        guessed = [result for result in scored if result.chance]
        return f"The dense model is above chance in {above} of {len(guessed)} tasks of choices"
    lower = sum(
        result.difference.values["acc"] + CERTAIN * result.difference.errors["acc"] < 0
        for result in scored
    )
    return f"The cut lowers accuracy beyond the 95 % interval in {lower} of {count}"


def narrowing_chart(history: dict[str, list[Standing]]) -> go.Figure:
    """The paired difference of accuracy with its 95 % interval as questions come in, by task."""
    shown = {
        task: [each for each in after if each.difference and "acc" in each.difference.values]
        for task, after in history.items()
    }
    shown = {task: after for task, after in shown.items() if after}
    count = max(1, len(shown))
    figure = make_subplots(
        cols=count,
        shared_yaxes=True,
        horizontal_spacing=0.02,
        subplot_titles=[plain_in_chart(task) for task in shown],
    )
    for column, (task, after) in enumerate(shown.items(), start=1):
        asked = [each.asked for each in after]
        middle = [100 * each.difference.values["acc"] for each in after]
        reach = [100 * CERTAIN * each.difference.errors["acc"] for each in after]
        figure.add_scatter(
            x=asked,
            y=middle,
            error_y={"type": "data", "array": reach, "thickness": 1.4},
            mode="lines+markers",
            name=plain_in_chart(task),
            showlegend=False,
            line={"color": MHA, "width": 1.5},
            marker={"size": 7},
            customdata=reach,
            hovertemplate="%{x:,} questions: %{y:+.1f} ± %{customdata:.1f} points<extra></extra>",
            row=1,
            col=column,
        )
        figure.add_hline(y=0, line={"color": DENSE, "dash": "dash", "width": 1}, row=1, col=column)
        figure.update_xaxes(title="questions", rangemode="tozero", row=1, col=column)
    figure.update_yaxes(title="points", row=1, col=1)
    widest = [
        (after[0].difference.errors["acc"], after[-1].difference.errors["acc"])
        for after in shown.values()
    ]
    title = "No difference is measured yet"
    if widest:
        first, last = max(widest, key=lambda pair: pair[1])
        title = (
            f"The widest interval is ± {100 * CERTAIN * last:.1f} points by now"
            f"; after the first block ± {100 * CERTAIN * first:.1f}"
        )
    return laid_out(figure, title, 300).update_layout(margin_t=76)
