"""How much faster the pruned model is on this machine, in prefill and in decode."""

import os

import streamlit as st

from pages.charts.latency_chart import latency_chart, latency_table
from pages.charts.text import counted
from pages.parts.cut_picker import in_words, require_cut
from pages.parts.figure import show
from pages.parts.progress import show_job
from pages.parts.runtime_picker import choose_runtime, usable
from pages.server.request import Cut
from pages.server.side_by_side import LatencyRun, last_latency, start_latency
from pages.server.visits import visit
from transact_core.experiments.bench import Bench

USUAL_LENGTHS = (64, 128, 256, 512)
LENGTHS = (16, 32, *USUAL_LENGTHS, 1024, 2048, 4096, 8192, 16384, 32768)
"""Tokens of the prompts that are offered; those chosen by default are the usual ones."""
DECODE = 16
"""Tokens that are decoded after each prompt."""


def choose_and_start(bench: Bench, cut: Cut) -> None:
    left, right, _ = st.columns([5, 2, 3], vertical_alignment="bottom")
    longest = bench.loaded.model.config.max_position_embeddings - DECODE
    possible = [length for length in LENGTHS if length <= longest]
    lengths = left.multiselect(
        "Prompt lengths in tokens",
        possible,
        [length for length in USUAL_LENGTHS if length in possible] or possible[-1:],
        key="lengths",
        persist_state="session",
    )
    repeats = right.number_input(
        "Repeats",
        1,
        50,
        5,
        1,
        key="repeats",
        persist_state="session",
        help="Of each model at each length, after one warm-up repeat that is not counted.",
    )
    quantization = choose_runtime("latency")
    ready = usable(quantization) and bool(lengths)
    if show_job("latency", visit().request):
        return
    if st.button("Time both models", type="primary", icon=":material/timer:", disabled=not ready):
        start_latency(cut, sorted(lengths), DECODE, int(repeats), quantization)
        st.rerun()


@st.fragment(run_every=1.0 if visit().visitor.unfinished_jobs else None)
def show_run(bench: Bench) -> None:
    run = last_latency()
    if run is None or not run.points:
        st.info(
            "Nothing is timed yet. If this cut was not measured before, the pruned model is made "
            "and measured first.",
            icon=":material/info:",
        )
        return
    points = list(run.points)
    table = latency_table(points)
    st.caption(f"Pruned: {in_words(run.cut)}")
    show(
        latency_chart(points),
        "latency-chart",
        f"marks are medians of {run.repeats} repeats, bars their interquartile range; decode is "
        f"the mean over the {run.decode} tokens after the prompt. Both models take turns "
        f"{how(run, bench)} with {counted(run.threads, 'thread')} of this machine's "
        f"{counted(os.cpu_count() or 1, 'core')}, batch 1; other jobs waited, the pages did not.",
        lambda: table,
    )
    st.dataframe(
        table.dropna(axis="columns", how="all"),
        hide_index=True,
        column_config={
            name: st.column_config.NumberColumn(format="%.1f")
            for name in table.columns
            if name.endswith(("ms", "lower", "upper", "per_s"))
        },
    )
    if run.quantization:
        show_files(run)
    elif table["working_bytes"].isna().all():
        st.caption(
            "Memory is not measured: this device does not report how much a pass takes. The "
            "Compress page has the exact size of the KV cache."
        )


def how(run: LatencyRun, bench: Bench) -> str:
    """In which runtime and which numbers the models computed."""
    if run.quantization:
        return f"in llama.cpp as {run.quantization}"
    return f"in {str(bench.loaded.dtype)[6:]} on {bench.loaded.device.type}"


def show_files(run: LatencyRun) -> None:
    """Size, memory and load time of both files."""
    rows = [
        {
            "model": name,
            "file MB": figures.file_bytes / 1e6,
            "peak memory MB": figures.peak_bytes and figures.peak_bytes / 1e6,
            "load s": figures.load_seconds,
            "threads": figures.threads,
        }
        for name, figures in run.files.items()
    ]
    if rows:
        number = st.column_config.NumberColumn(format="%.1f")
        columns = {"file MB": number, "peak memory MB": number}
        st.dataframe(rows, hide_index=True, column_config=columns)
        st.caption(
            f"In {next(iter(run.files.values())).runtime}, with its defaults. Peak memory is that "
            "of the whole process, its weights included."
        )


st.title("Latency")
st.caption(
    "Time of the dense and of the pruned model on this machine, against the length of the prompt."
)
bench, cut = require_cut("latency")
choose_and_start(bench, cut)
show_run(bench)
