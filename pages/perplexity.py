"""Perplexity against ratio: the dense model and every point measured in this session."""

import numpy as np
import pandas as pd
import streamlit as st

from pages.shared import curve_chart
from pages.shared.jobs import DONE
from pages.shared.options import GRANULARITY_HELP, IMPORTANCE_HELP, RECOVERY_HELP, STEPS_HELP
from pages.shared.progress import require_bench, show_dense, show_job
from pages.shared.workbench import first_look, points, start_curve, visit, workbench
from transact_core.bench import Bench, Choices
from transact_core.importance import IMPORTANCES
from transact_core.plan import GRANULARITIES, head_counts, widths
from transact_core.recovery import RECOVERIES

CURVES = ("MHA only", "MLP only", "Both")


def counts_heads(curve: str, granularity: str) -> bool:
    """Whether the curve's points are the numbers of whole heads."""
    return curve == "MHA only" and granularity not in ("head-dims", "auto")


def curve_ratios(
    bench: Bench, curve: str, largest: float, count: int, choices: Choices
) -> list[tuple[float, float]]:
    """Pairs of ratios to measure: every number of heads there is, or evenly spaced shares."""
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


def choose_curve(bench: Bench) -> None:
    with st.expander("Measure a whole curve", icon=":material/timeline:", expanded=True):
        columns = st.columns(3) + st.columns([3, 3, 3, 1])
        curve = columns[0].selectbox("Cut", CURVES, key="curve", persist_state="session")
        largest = columns[1].number_input(
            "Largest ratio", 0.05, 0.95, 0.7, 0.05, key="largest", persist_state="session"
        )
        granularity = columns[3].selectbox(
            "Granularity", [*GRANULARITIES, "auto"], key="curve_granularity",
            persist_state="session", help=GRANULARITY_HELP,
        )  # fmt: skip
        importance = columns[4].selectbox(
            "Importance", list(IMPORTANCES), key="curve_importance", persist_state="session",
            help=IMPORTANCE_HELP,
        )  # fmt: skip
        recovery = columns[5].selectbox(
            "Recovery", RECOVERIES, key="curve_recovery", persist_state="session",
            help=RECOVERY_HELP,
        )  # fmt: skip
        steps = columns[6].number_input(
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
            granularity=granularity, importance=importance, recovery=recovery, steps=int(steps)
        )
        ratios = curve_ratios(bench, curve, largest, int(count), choices)
        asked = ", ".join(f"{max(pair):g}" for pair in ratios)
        known = [
            point.seconds
            for point in points()
            if (point.plan.granularity, point.recovery) == (granularity, recovery)
            and choices.single_pass
        ]
        estimate = f" Points like these took {np.mean(known):.0f} s each." if known else ""
        st.caption(
            (f"Ratios: {asked}." if ratios else "No narrower width is within this ratio.")
            + estimate
        )
        if not bench.prepared(choices):
            st.caption(f"Scoring by {importance} comes first.")
        if st.button("Measure the curve", type="primary", disabled=not ratios):
            start_curve(bench, ratios, choices)
            st.rerun()


@st.fragment(run_every=1.0 if visit().visitor.unfinished_jobs else None)
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
        curve_chart.perplexity_curve(
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
        [{"recovery": point.recovery, "granularity": point.plan.granularity,
          "importance": point.plan.importance, **point.row()} for point in measured]
    )  # fmt: skip
    st.dataframe(
        frame[["mha_ratio", "mlp_ratio", "granularity", "importance", "recovery", "perplexity",
               "delta_nll", "delta_nll_se", "parameters", "mha_width", "mlp_width",
               "kv_bytes_per_token", "flops_per_token", "seconds"]],
        hide_index=True,
    )  # fmt: skip
    st.download_button(
        "Points (CSV)", frame.to_csv(index=False).encode(), "points.csv", "text/csv",
        icon=":material/download:", on_click="ignore",
    )  # fmt: skip


st.title("Perplexity against ratio")
bench = require_bench()
show_dense("curve")
show_job("curve", visit().request)
choose_curve(bench)
show_curve(bench)
