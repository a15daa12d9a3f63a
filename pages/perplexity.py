"""Perplexity against ratio: the dense model and every point measured in this session."""

import numpy as np
import pandas as pd
import streamlit as st

from pages.shared import charts
from pages.shared.jobs import DONE
from pages.shared.progress import require_bench, show_dense, show_job
from pages.shared.workbench import points, start_curve, visit, workbench
from transact_core.bench import Bench, Choices
from transact_core.plan import GRANULARITIES, head_counts
from transact_core.recovery import RECOVERIES

CURVES = ("MHA only", "MLP only", "Both")


def curve_ratios(
    bench: Bench, curve: str, largest: float, count: int, choices: Choices
) -> list[tuple[float, float]]:
    """Pairs of ratios to measure: every number of heads there is, or evenly spaced shares."""
    if curve == "MHA only":
        shape = bench.loaded.architecture
        shares = [
            1 - heads / shape.num_attention_heads
            for heads in reversed(head_counts(shape, choices.granularity))
        ]
        within = [round(share, 4) for share in shares if 0 < share <= largest]
        return [(ratio, 0.0) for ratio in within]
    steps = [round(float(step), 2) for step in np.linspace(0, largest, count + 1)[1:]]
    pairs = [(0.0 if curve == "MLP only" else step, step) for step in steps]
    return list({bench.plan(*pair, choices).widths: pair for pair in pairs}.values())


def choose_curve(bench: Bench) -> None:
    with st.expander("Measure a whole curve", icon=":material/timeline:", expanded=True):
        columns = st.columns(5, vertical_alignment="bottom")
        curve = columns[0].selectbox("Cut", CURVES, key="curve", persist_state="session")
        largest = columns[1].number_input(
            "Largest ratio", 0.05, 0.95, 0.7, 0.05, key="largest", persist_state="session"
        )
        count = columns[2].number_input(
            "Points",
            1,
            20,
            5,
            key="count",
            persist_state="session",
            disabled=curve == "MHA only",
            help="MHA alone has only as many points as there are numbers of heads.",
        )
        granularity = columns[3].selectbox(
            "Granularity", GRANULARITIES, key="curve_granularity", persist_state="session"
        )
        recovery = columns[4].selectbox(
            "Recovery", RECOVERIES, key="curve_recovery", persist_state="session"
        )
        choices = Choices(granularity=granularity, recovery=recovery)
        ratios = curve_ratios(bench, curve, largest, int(count), choices)
        asked = ", ".join(f"{max(pair):g}" for pair in ratios)
        known = [point.seconds for point in points() if point.recovery == recovery]
        estimate = f" Points like these took {np.mean(known):.0f} s each." if known else ""
        st.caption(
            (f"Ratios: {asked}." if ratios else "No narrower width is within this ratio.")
            + estimate
        )
        if st.button("Measure the curve", type="primary", disabled=not ratios):
            start_curve(bench, ratios, choices)
            st.rerun()


@st.fragment(run_every=1.0 if visit().job and not visit().job.finished else None)
def show_curve(bench: Bench) -> None:
    dense_job = workbench().open(visit().request).dense
    dense = bench.dense() if dense_job.state == DONE else None
    shape = bench.loaded.architecture
    measured = list(points())
    if dense is None and not measured:
        st.caption("The chart begins once the dense model is measured.")
        return
    logarithmic = st.toggle("Log scale", key="log", persist_state="session")
    st.plotly_chart(
        charts.perplexity_curve(
            measured, dense, (shape.mha_width, shape.intermediate_size), logarithmic
        ),
        key="curve-chart",
    )
    st.caption(
        f"Evaluated on {bench.evaluation.tokens:,} tokens in windows of "
        f"{bench.evaluation.sequence_length}. Bars are 95 % intervals of the paired difference "
        "from the dense model: two points whose bars overlap are not told apart by this text."
    )
    if not measured:
        st.info(
            "No cut is measured yet. Measure one on the Compress page, or a whole curve above.",
            icon=":material/info:",
        )
        return
    frame = pd.DataFrame(
        [{"recovery": point.recovery, "granularity": point.plan.granularity, **point.row()}
         for point in measured]
    )  # fmt: skip
    st.dataframe(
        frame[["mha_ratio", "mlp_ratio", "granularity", "recovery", "perplexity", "delta_nll",
               "delta_nll_se", "parameters", "mha_width", "mlp_width", "kv_bytes_per_token",
               "flops_per_token", "seconds"]],
        hide_index=True,
    )  # fmt: skip
    st.download_button(
        "Points (CSV)", frame.to_csv(index=False).encode(), "points.csv", "text/csv",
        icon=":material/download:", on_click="ignore",
    )  # fmt: skip


st.title("Perplexity against ratio")
bench = require_bench()
show_dense("curve")
if not show_job("curve"):
    choose_curve(bench)
show_curve(bench)
