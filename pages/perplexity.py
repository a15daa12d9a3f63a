"""Perplexity against ratio: the dense model and every point that this visitor measured.

Until there is one, the recorded curve of the built-in model stands in its place.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import streamlit as st

from pages.charts import curve_chart, tradeoff_charts
from pages.charts.common import on_text
from pages.charts.text import counted, plain
from pages.parts.example import Example, example
from pages.parts.figure import show
from pages.parts.help_texts import (
    GRANULARITY_HELP,
    IMPORTANCE_HELP,
    RECOVERY_HELP,
    STEPS_HELP,
    WIDTHS_HELP,
)
from pages.parts.progress import (
    estimate_in_words,
    follow,
    show_dense_end,
    show_end,
    show_opening,
    unfinished,
    watch_in_one_line,
)
from pages.parts.runtime_picker import choose_runtime, usable
from pages.parts.texts import choose_text, kind_warning, text_in_words
from pages.parts.trained_cuts import trained_table
from pages.server.estimates import cuts_seconds, pace_in_words
from pages.server.gguf_files import known_file, start_files
from pages.server.jobs import DONE, Job
from pages.server.open_models import workbench
from pages.server.request import first_look
from pages.server.settings import settings
from pages.server.start_jobs import said_of_cluster, start_curve
from pages.server.trainings import trainings
from pages.server.visits import points, visit
from transact_core.base.errors import TransActError
from transact_core.data.corpus import short_name
from transact_core.experiments.allocate import require_allocatable
from transact_core.experiments.bench import Bench, Choices, Measurement
from transact_core.experiments.sweep import Pair
from transact_core.forward.perplexity import Evaluation, paired_difference
from transact_core.importance.scores import IMPORTANCES
from transact_core.pruning.closed_form import RECOVERIES
from transact_core.pruning.plan import GRANULARITIES, head_counts, widths
from transact_core.workers.process import worker_threads

CURVES = ("MHA only", "MLP only", "Both")
# What the points on the charts may be chosen by.
SHOWN_BY = {
    "Granularities": lambda point: point.plan.granularity,
    "Scored by": lambda point: point.plan.importance,
    "Recoveries": lambda point: point.recovery,
    "Widths": lambda point: point.decision.widths,
}


def counts_heads(curve: str, granularity: str) -> bool:
    """Whether the curve's points are the numbers of whole heads."""
    return curve == "MHA only" and granularity not in ("head-dims", "auto")


def curve_ratios(
    bench: Bench, curve: str, largest: float, count: int, choices: Choices
) -> list[tuple[float, float]]:
    """Pairs of ratios to measure: every possible number of heads, or evenly spaced ratios."""
    shape, granularity = bench.loaded.architecture, first_look(choices).granularity
    if counts_heads(curve, choices.granularity):
        shares = [
            1 - heads / shape.num_attention_heads
            for heads in reversed(head_counts(shape, granularity))
        ]
        within = [round(share, 4) for share in shares if 0 < share <= largest]
        return [(ratio, 0.0) for ratio in within]
    steps = [round(float(step), 2) for step in np.linspace(0, largest, count + 1)[1:]]
    pairs = [
        (0.0 if curve == "MLP only" else step, 0.0 if curve == "MHA only" else step)
        for step in steps
    ]
    if choices.granularity == "auto":
        return pairs
    return list({widths(shape, *pair, granularity): pair for pair in pairs}.values())


def choose_curve(bench: Bench, measuring: Job | None, under_way: Sequence[Job]) -> None:
    """The controls of a curve, its button, and beside it the progress of the one under way."""
    with st.expander("Measure a whole curve", icon=":material/timeline:", expanded=True):
        columns = st.columns([2.6, 2.4, 2.1, 3, 3.2, 3, 2.8, 1.9], gap="small")
        curve = columns[0].selectbox("Cut", CURVES, key="curve", persist_state="session")
        largest = columns[1].number_input(
            "Largest ratio", 0.05, 0.95, 0.7, 0.05, key="largest", persist_state="session"
        )
        granularity = columns[3].selectbox(
            "Granularity",
            [*GRANULARITIES, "auto"],
            key="curve_granularity",
            persist_state="session",
            help=GRANULARITY_HELP,
        )
        importance = columns[4].selectbox(
            "Importance",
            list(IMPORTANCES),
            key="curve_importance",
            persist_state="session",
            help=IMPORTANCE_HELP,
        )
        recovery = columns[5].selectbox(
            "Recovery",
            RECOVERIES,
            key="curve_recovery",
            persist_state="session",
            help=RECOVERY_HELP,
        )
        widths_name = columns[6].selectbox(
            "Widths",
            ("uniform", "allocated", "traded"),
            key="curve_widths",
            persist_state="session",
            help=WIDTHS_HELP,
        )
        steps = columns[7].number_input(
            "Steps", 1, 20, key="curve_steps", persist_state="session", help=STEPS_HELP
        )
        count = columns[2].number_input(
            "Points",
            1,
            20,
            5,
            key="count",
            persist_state="session",
            disabled=counts_heads(curve, granularity),
            help="Whole heads alone have only as many points as there are numbers of them.",
        )
        choices = Choices(
            granularity=granularity,
            importance=importance,
            recovery=recovery,
            steps=int(steps),
            widths=widths_name,
        )
        refused = why_refused(bench, choices)
        if refused:
            st.warning(refused)
            choices = choices.of_uniform
        ratios = curve_ratios(bench, curve, largest, int(count), choices)
        asked = ", ".join(f"{max(pair):g}" for pair in ratios)
        if ratios:
            words = f"Ratios: {asked}. {takes(bench, ratios, choices)}"
        else:
            words = "No narrower width is within this ratio."
        if not bench.prepared(choices):
            words += f" Scoring by {importance} comes first."
        st.caption(words, help=pace_in_words(visit().request))
        if (cluster := settings().ray) is not None:
            st.caption(
                f":material/hub: The points are measured on the Ray cluster at `{cluster}`, by "
                f"workers with {counted(worker_threads(), 'thread')} each, several at a time; the "
                "time above is that of one worker."
            )
        for sentence in said_of_cluster():
            st.caption(f":material/warning: {plain(sentence)}")
        with st.container(key="curve-bar"):
            button, beside = st.columns([3, 11], vertical_alignment="center", gap="medium")
            with button:
                if st.button(
                    "Measure the curve",
                    type="primary",
                    disabled=not ratios or bool(refused),
                    width="stretch",
                ):
                    start_curve(bench, ratios, choices)
                    st.rerun()
            with beside:
                if under_way:
                    follow("curve", under_way)
                elif not points():
                    offer_recorded_cuts(bench, example())
                show_end(measuring)


def why_refused(bench: Bench, choices: Choices) -> str | None:
    """Why layers cannot have widths of their own with these choices; None where they can."""
    try:
        require_allocatable(bench.loaded.architecture, 0.0, 0.0, choices)
    except TransActError as error:
        return str(error)
    return None


def takes(bench: Bench, ratios: Sequence[Pair], choices: Choices) -> str:
    """How long it takes to measure these cuts, in a sentence."""
    seconds = cuts_seconds(bench, visit().request, ratios, choices)
    return f"Measuring {counted(len(ratios), 'cut')} takes {estimate_in_words(seconds)}."


def offer_recorded_cuts(bench: Bench, recorded: Example) -> None:
    """The button that measures the cuts of the recorded curve on the model in view."""
    first = recorded.points[0]
    # On another model several ratios may come to the same widths.
    shape, granularity = bench.loaded.architecture, first.plan.granularity
    pairs = [(point.plan.mha_ratio, point.plan.mlp_ratio) for point in recorded.points]
    ratios = list({widths(shape, *pair, granularity): pair for pair in pairs}.values())
    choices = Choices(
        granularity=granularity,
        importance=first.plan.importance,
        recovery=first.recovery,
    )
    with st.container(horizontal=True, vertical_alignment="center"):
        if st.button(
            "Measure the recorded cuts here",
            icon=":material/replay:",
            help="The cuts of the chart below, on the model and the texts in the sidebar. "
            + pace_in_words(visit().request),
        ):
            start_curve(bench, ratios, choices)
            st.rerun()
        st.caption(takes(bench, ratios, choices))


def show_recorded(recorded: Example) -> None:
    """The recorded curve of the built-in model, marked as what it is; computes nothing."""
    threads = counted(recorded.environment.threads, "thread")
    st.caption(
        f":material/history: **Recorded, not measured here**: the built-in model {recorded.name}, "
        f"on {recorded.recorded:%d %B %Y}, {recorded.processor} ({threads}); "
        f"{recorded.evaluation.tokens:,} tokens of {recorded.text} in windows of "
        f"{recorded.sequence_length}. Your own points take its place as soon as there is one."
    )
    shape = recorded.architecture
    figure = curve_chart.perplexity_curve(
        recorded.points, recorded.dense, (shape.mha_width, shape.intermediate_size), True
    )
    title = figure.layout.title.text
    show(
        on_text(
            figure.update_layout(title_text=f"Recorded: {title[:1].lower()}{title[1:]}"),
            recorded.text.partition(" (")[0],
        ),
        "recorded-curve",
        "the further right, the more width is removed; the higher, the worse the model predicts "
        "the text. Bars are 95 % intervals of the paired difference from the dense model, over "
        f"{recorded.scored_tokens:,} scored tokens.",
        lambda: curve_chart.points_table(recorded.points),
    )


def choose_shown(measured: Sequence[Measurement]) -> tuple[list[Measurement], str, bool]:
    """The points to show, what their colours stand for, and whether perplexity is logarithmic."""
    columns = st.columns([3, 3, 3, 3, 2.4, 2], vertical_alignment="bottom")
    shown = list(measured)
    for column, (name, value_of) in zip(columns, SHOWN_BY.items(), strict=False):
        values = sorted({value_of(point) for point in measured})
        chosen = column.multiselect(
            name,
            values,
            key=f"shown_{name}",
            persist_state="session",
            placeholder=values[0] if len(values) == 1 else "all",
            disabled=len(values) < 2,
        )
        shown = [point for point in shown if not chosen or value_of(point) in chosen]
    coloured_by = columns[4].selectbox(
        "Colour by", list(curve_chart.COLOURED_BY), key="coloured_by", persist_state="session"
    )
    logarithmic = columns[5].toggle("Log scale", key="log", persist_state="session")
    return shown, coloured_by, logarithmic


def in_llama_cpp(
    bench: Bench, measured: Sequence[Measurement], quantization: str
) -> tuple[list[Measurement], Evaluation | None]:
    """The points as llama.cpp computes them in a type, as far as measured, and the dense model.

    Shows a button for those that are missing.
    """
    files = {point.identity: known_file(bench, point, quantization) for point in measured}
    whole = known_file(bench, None, quantization)
    subjects = [point for point in measured if files[point.identity] is None]
    missing = len(subjects) + (whole is None)
    job = visit().latest_job(("files", visit().request))
    if missing and job and not job.finished:
        st.caption(
            f"{counted(missing, 'file')} of {len(measured) + 1} to measure; see the jobs in the "
            "sidebar."
        )
    elif missing and usable(quantization):
        if st.button(f"Measure {counted(missing, 'file')} as {quantization} in llama.cpp"):
            start_files(
                [*([None] if whole is None else []), *subjects], [quantization], False, "files"
            )
            st.rerun()
        show_end(job)
    if whole is None:
        return [], None
    found = []
    for point in measured:
        if file := files[point.identity]:
            mean, error = paired_difference(file.evaluation, whole.evaluation)
            found.append(
                replace(point, evaluation=file.evaluation, delta_nll=mean, delta_nll_se=error)
            )
    if found:
        st.caption(
            f"Every perplexity below is that of a {quantization} file in llama.cpp, and the dense "
            "model is such a file too."
        )
    return found, whole.evaluation


@st.fragment(run_every=2.0 if visit().visitor.unfinished_jobs else None)
def show_charts(bench: Bench) -> None:
    dense_job = workbench().open(visit().request).dense
    dense = bench.dense() if dense_job.state == DONE else None
    shape = bench.loaded.architecture
    widths_of_dense = (shape.mha_width, shape.intermediate_size)
    measured = list(points())
    if not measured:
        if dense is not None:
            st.caption(
                f"The dense model's perplexity here is **{dense.perplexity:.2f}**, on "
                f"{text_in_words(bench)}. No cut of it is measured yet: measure a "
                "curve above, or one cut on the Compress page."
            )
        show_recorded(example())
        return
    place = choose_text(bench, "perplexity")
    if place and not bench.dense_known(bench.evaluated[place]):
        st.caption("The dense model is not measured on this text yet.")
        return
    if warning := kind_warning(bench, place):
        st.caption(warning)
    if dense is not None:
        dense = bench.dense(windows=bench.evaluated[place])
    on_first, text = measured, short_name(bench.evaluated[place].source)
    measured = [point.on_text(bench, place) for point in on_first]
    # Files are measured on the first text alone.
    quantization = None if place else choose_runtime("curve")
    if quantization:
        measured, dense = in_llama_cpp(bench, measured, quantization)
        if not measured:
            return
    shown, coloured_by, logarithmic = choose_shown(measured)
    show(
        on_text(
            curve_chart.perplexity_curve(shown, dense, widths_of_dense, logarithmic, coloured_by),
            text,
        ),
        "curve-chart",
        "bars are 95 % intervals of the paired difference from the dense model; two points whose "
        f"bars overlap are not told apart by these {text_in_words(bench, place)}.",
        lambda: curve_chart.points_table(shown),
    )
    if bench.others and not quantization and all(map(bench.dense_known, bench.evaluated)):
        on_texts = [
            (short_name(windows.source), [point.on_text(bench, other) for point in on_first])
            for other, windows in enumerate(bench.evaluated)
        ]
        show(
            curve_chart.other_texts_chart(on_texts),
            "other-texts-chart",
            "each mark is a cut; above the dashed line it costs more on the other text than on the "
            "first one. Bars are 95 % intervals.",
            lambda: pd.concat(
                curve_chart.points_table(found).assign(text=name) for name, found in on_texts
            ),
        )
    if any(point.decision.widths != "uniform" for point in shown):
        show(
            on_text(tradeoff_charts.equal_parameters_chart(shown, logarithmic), text),
            "equal-parameters",
            "marks above each other are equally large; the lower one gives its layers better "
            "widths. Bars are 95 % intervals of the paired difference from the dense model.",
            lambda: curve_chart.points_table(shown),
        )
    best = tradeoff_charts.best_at_each_pair(shown, widths_of_dense)
    show(
        on_text(tradeoff_charts.ratio_map(shown, widths_of_dense), text),
        "ratio-map",
        "each square is a pair of ratios that was measured, the best of what is shown above, in "
        "times the dense perplexity; between the squares nothing is known.",
        lambda: curve_chart.points_table([point for _, point in best]),
    )
    if dense is not None:
        whole = bench.dense_footprint, dense
        for column, field in zip(st.columns(2, gap="large"), tradeoff_charts.COSTS, strict=True):
            with column:
                show(
                    on_text(
                        tradeoff_charts.frontier_chart(
                            shown, whole, widths_of_dense, field, logarithmic
                        ),
                        text,
                    ),
                    f"frontier-{field}",
                    "full marks on the line are the best measured for their size; for each open "
                    "one there is another no larger and no worse.",
                    lambda field=field: tradeoff_charts.frontier_table(shown, whole, field),
                    narrow=True,
                )
    st.subheader("All points")
    st.caption(f"Measured on {text_in_words(bench, place)}.")
    st.dataframe(
        curve_chart.points_table(measured)[
            [
                "mha_ratio",
                "mlp_ratio",
                "granularity",
                "importance",
                "recovery",
                "widths",
                "perplexity",
                "delta_nll",
                "delta_nll_se",
                "parameters",
                "mha_width",
                "mlp_width",
                "kv_bytes_per_token",
                "flops_per_token",
                "seconds",
            ]
        ],
        hide_index=True,
    )
    if trained := [run for run in trainings() if run.done]:
        st.subheader("Trained cuts")
        trained_table(trained)


st.title("Perplexity against ratio")
bench = show_opening()
if bench is None:
    if not points():
        show_recorded(example())
    st.stop()
measuring = visit().latest_job(("curve", visit().request))
under_way = unfinished(measuring)
dense_under_way = unfinished(workbench().open(visit().request).dense)
choose_curve(bench, measuring, under_way)
if dense_under_way:
    watch_in_one_line("dense", *dense_under_way)
show_dense_end("curve")
show_charts(bench)
