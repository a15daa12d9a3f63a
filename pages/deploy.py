"""The Deploy page: dense and pruned models as GGUF files of every type, and which to take away."""

from collections.abc import Sequence

import streamlit as st

from pages.charts.common import on_text
from pages.charts.file_charts import (
    COSTS,
    difference_in_words,
    difference_table,
    file_frontier,
    files_table,
)
from pages.charts.text import counted
from pages.parts.cut_picker import in_words, model_in_words
from pages.parts.figure import show
from pages.parts.progress import require_bench, show_job
from pages.parts.runtime_picker import usable
from pages.server.gguf_files import known_file, start_files
from pages.server.request import Cut
from pages.server.trainings import trained_cuts
from pages.server.visits import points, visit
from transact_core.data.corpus import short_name
from transact_core.experiments.bench import Bench
from transact_core.experiments.trained_cut import Subject
from transact_core.export.gguf_points import (
    NEW,
    PROMPT,
    FilePoint,
    bench_command,
    cut_in_words,
    is_complete,
    kept_points,
    verdict,
)
from transact_core.export.gguf_types import QUANTIZATIONS

USUAL = ("F16", "Q8_0", "Q4_K_M", "Q4_0")
"""Types that are measured unless others are chosen."""
DENSE = "dense"


def choose_and_start(bench: Bench) -> None:
    """Which models in which types, and the button that measures those that are missing."""
    shape = bench.loaded.architecture
    cuts: dict[str, Subject | None] = {DENSE: None}
    for point in reversed(points()):
        cuts[f"{cut_in_words(shape, point.plan)} · {in_words(Cut.of(point))}"] = point
    for run, trained in trained_cuts():
        label = f"{cut_in_words(shape, trained.plan)} · {model_in_words(run.cut, trained)}"
        # Trained otherwise, on as many tokens of the same text.
        cuts[f"{label} · {run.folder.name[:6]}" if label in cuts else label] = trained
    left, right = st.columns([3, 2], vertical_alignment="bottom")
    chosen = left.multiselect(
        "Models",
        list(cuts),
        list(cuts),
        key="deploy_models",
        help="The dense model, and the cuts that you measured or trained; the pages Compress and "
        "Recover make more.",
    )
    types = right.multiselect(
        "Types", list(QUANTIZATIONS), USUAL, key="deploy_types", persist_state="session"
    )
    timed = st.toggle(
        "Time them too",
        value=True,
        key="deploy_timed",
        persist_state="session",
        help=f"Prefill of {PROMPT} tokens and {NEW} decoded ones, in turns with the dense F16 "
        "file. Perplexity alone is quicker.",
    )
    if len(cuts) == 1:
        st.caption("No cut is measured yet. Measure some on the Compress page to compare with.")
    missing = {
        label: [
            kind for kind in types if not is_complete(known_file(bench, cuts[label], kind), timed)
        ]
        for label in chosen
    }
    count = sum(map(len, missing.values()))
    ready = usable(USUAL[0])
    if show_job("deploy", visit().request):
        return
    words = f"Measure {counted(count, 'file')}" if count else "All of these are measured"
    if st.button(words, type="primary", icon=":material/speed:", disabled=not (ready and count)):
        start_files(
            [cuts[label] for label in chosen if missing[label]],
            [kind for kind in types if any(kind in kinds for kinds in missing.values())],
            timed,
            "deploy",
        )
        st.rerun()


@st.fragment(run_every=2.0 if visit().visitor.unfinished_jobs else None)
def show_files(bench: Bench) -> None:
    kept = kept_points(bench)
    if not kept:
        st.info(
            "Nothing is measured in llama.cpp yet on this model and text.", icon=":material/info:"
        )
        return
    if sentences := verdict(kept):
        st.info("\n\n".join(sentences), icon=":material/lightbulb:")
    columns = st.columns([5, 2, 4], vertical_alignment="bottom")
    cost = columns[0].segmented_control(
        "Against perplexity", list(COSTS), default="Size", required=True, key="deploy_cost"
    )
    logarithmic = columns[1].toggle("Log scale", key="deploy_log")
    show(
        on_text(file_frontier(kept, cost, logarithmic), short_name(bench.evaluation.source)),
        f"files-{cost.lower()}",
        "each mark is one file. For a full one no other is as good on both axes; an open one has "
        "another that is no worse on both. Times are ratios measured in turns with the dense F16 "
        f"file on this machine; perplexity is over {bench.evaluation.tokens:,} tokens.",
        lambda: files_table(kept),
    )
    show_table(kept)


def show_table(kept: Sequence[FilePoint]) -> None:
    """All kept files of this model on this text: filtered, sorted by a click, subtracted."""
    st.subheader("All measured files")
    columns = st.columns([3, 3, 2], vertical_alignment="bottom")
    models = columns[0].multiselect(
        "Only models", list(dict.fromkeys(each.model for each in kept)), key="files_models"
    )
    kinds = [name for name in QUANTIZATIONS if any(each.quantization == name for each in kept)]
    types = columns[1].multiselect("Only types", kinds, key="files_types")
    best = columns[2].toggle("Only on the frontier", key="files_best")
    table = files_table(kept)
    shown = (
        table[
            (table["model"].isin(models) if models else True)
            & (table["type"].isin(types) if types else True)
            & (table["on_frontier"] if best else True)
        ]
        if models or types or best
        else table
    )
    number = st.column_config.NumberColumn
    st.dataframe(
        shown.dropna(axis="columns", how="all"),
        hide_index=True,
        column_config={
            **{name: number(format="%.1f") for name in ("MB", "peak MB", "load s")},
            **{name: number(format="%.1f") for name in ("prefill tokens/s", "decode tokens/s")},
            **{name: number(format="%.2f") for name in ("prefill ×", "decode ×")},
            **{name: number(format="%.3f") for name in ("perplexity", "before quantising")},
        },
    )
    with st.container(horizontal=True, vertical_alignment="center"):
        st.caption(
            f"{counted(len(shown), 'file')} of {len(table)}, kept on this server for this model "
            "and this text. A click on a column sorts by it.",
            width="stretch",
        )
        st.download_button(
            "CSV",
            shown.to_csv(index=False).encode(),
            "gguf-files.csv",
            "text/csv",
            key="files-csv",
            type="tertiary",
            icon=":material/download:",
            on_click="ignore",
        )
    if len(kept) > 1:
        show_difference(kept)


def show_difference(kept: Sequence[FilePoint]) -> None:
    """One file against another: every figure, and the paired difference of their losses."""
    named = {
        f"{each.name} · {each.bytes / 1e6:,.1f} MB · perplexity {each.perplexity:.3f}"
        + (f" · {each.recovery}, {each.importance}" if each.recovery else "")
        + (f" · on {short_name(each.trained_on)}" if each.trained_on else ""): each
        for each in kept
    }
    left, right = st.columns(2)
    labels = list(named)
    first = named[left.selectbox("Difference of", labels, len(labels) - 1, key="files_first")]
    second = named[right.selectbox("from", labels, 0, key="files_second")]
    st.dataframe(difference_table(first, second), hide_index=True)
    st.caption(difference_in_words(first, second))


def show_command() -> None:
    st.subheader("On a phone or a board")
    st.write(
        f"The paper times a prompt of {PROMPT} tokens and {NEW} generated ones. With llama.cpp "
        "built for the device and the file from the Export page copied there:"
    )
    st.code(bench_command(), language="bash")
    st.caption(
        f"`pp{PROMPT}` is prefill and `tg{NEW}` decoding, in tokens a second. Time the dense and "
        "the pruned file in turns."
    )


st.title("Deploy")
st.caption(
    "Which file to take to a phone or a laptop: dense, pruned and trained, in each type, measured "
    "in llama.cpp on this machine."
)
bench = require_bench()
choose_and_start(bench)
show_files(bench)
show_command()
