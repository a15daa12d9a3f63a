"""Which module is more redundant: the same share removed from each, the damage side by side."""

from dataclasses import replace

import numpy as np
import pandas as pd
import streamlit as st

from pages.charts import exploring_charts
from pages.parts.figure import show
from pages.parts.help_texts import GRANULARITY_HELP, IMPORTANCE_HELP
from pages.parts.progress import (
    estimate_in_words,
    require_bench,
    require_prepared,
    show_dense,
    show_job,
)
from pages.server.estimates import cuts_seconds, pace_in_words
from pages.server.points import find_point
from pages.server.start_jobs import start_curve
from pages.server.visits import visit
from transact_core.experiments.bench import Bench, Choices
from transact_core.forward.perplexity import Evaluation
from transact_core.importance.scores import IMPORTANCES
from transact_core.planning.redundancy import lost_by
from transact_core.pruning.plan import GRANULARITIES, PruningPlan

SHARES = tuple(tenths / 10 for tenths in range(1, 10))


def plans_of(bench: Bench, choices: Choices) -> dict[str, list[PruningPlan]]:
    """The different cuts of one module alone that the shares ask for."""
    shape = bench.loaded.architecture
    plans: dict[str, list[PruningPlan]] = {"mha": [], "mlp": []}
    for module, mine in plans.items():
        for share in SHARES:
            pair = (share, 0.0) if module == "mha" else (0.0, share)
            plan = bench.plan(*pair, choices)
            widths = [earlier.widths for earlier in mine]
            if plan.cuts_anything(shape) and plan.widths not in widths:
                mine.append(plan)
    return plans


def removed(bench: Bench, plan: PruningPlan, module: str) -> float:
    shape = bench.loaded.architecture
    cut = plan.widths.applied_to(shape)
    if module == "mha":
        return 1 - cut.mha_width / shape.mha_width
    return 1 - cut.intermediate_size / shape.intermediate_size


def lost_table(bench: Bench, plans: dict[str, list[PruningPlan]]) -> pd.DataFrame:
    written = bench.scores("activation-weight")
    rows = []
    for module, mine in plans.items():
        rows.append({"module": module, "removed": 0.0, "lost": 0.0, "least": 0.0, "most": 0.0})
        for plan in mine:
            lost = lost_by(plan, written, bench.loaded.architecture)[module]
            rows.append(
                {
                    "module": module,
                    "removed": removed(bench, plan, module),
                    "lost": lost.mean().item(),
                    "least": lost.min().item(),
                    "most": lost.max().item(),
                }
            )
    return pd.DataFrame(rows)


def measured_table(bench: Bench, plans: dict[str, list[PruningPlan]]) -> pd.DataFrame:
    rows = []
    for module, mine in plans.items():
        for plan in mine:
            point = find_point(plan, "none")
            if point is not None:
                half = np.nan_to_num(1.96 * point.delta_nll_se)
                rows.append(
                    {
                        "module": module,
                        "removed": removed(bench, plan, module),
                        "perplexity": point.perplexity,
                        "low": point.perplexity * np.exp(-half),
                        "high": point.perplexity * np.exp(min(half, 20)),
                    }
                )
    return pd.DataFrame(rows, columns=["module", "removed", "perplexity", "low", "high"])


@st.fragment(run_every=1.0 if visit().visitor.unfinished_jobs else None)
def show_measured(bench: Bench, plans: dict[str, list[PruningPlan]], dense: Evaluation) -> None:
    frame = measured_table(bench, plans)
    if frame.empty:
        st.caption("The chart begins with the first measured point.")
        return
    show(
        exploring_charts.bare_perplexities(frame, dense.perplexity),
        "redundancy-measured",
        "the lower line is the module that loses less at the same share removed; bars are 95 % "
        "intervals of the paired "
        f"difference from the dense model, over {bench.evaluation.tokens:,} tokens. The points "
        "are on the Perplexity page too.",
        lambda: frame,
    )


st.title("Redundancy")
bench = require_bench()
left, right = st.columns(2)
importance = left.selectbox(
    "Importance", list(IMPORTANCES), key="importance", bind="query-params", help=IMPORTANCE_HELP
)
granularity = right.selectbox(
    "Granularity", GRANULARITIES, key="granularity", bind="query-params", help=GRANULARITY_HELP
)
visit().cut = replace(visit().cut, importance=importance, granularity=granularity)
choices = Choices(granularity=granularity, importance=importance, recovery="none")
ready = require_prepared(bench, choices, "redundancy")
if not (ready and require_prepared(bench, Choices(importance="activation-weight"), "written")):
    st.stop()
plans = plans_of(bench, choices)
show(
    exploring_charts.lost_energy(table := lost_table(bench, plans)),
    "redundancy",
    "the lower line is the module whose removed channels wrote less. Lines are means over layers, "
    "bands the range of layers.",
    lambda: table,
)
st.caption(
    "Written energy is `Σ a² · ‖W‖²` over the calibration tokens, of the removed channels as a "
    "share of all: `a` is the channel's transitional activation, `W` its column of the output "
    "projection. It would be the relative squared error of the bare cut's output if channels were "
    "uncorrelated; it takes no account of the repair, nor of how later layers change the error."
    + (" Of narrower heads it counts the values' dims alone." if granularity == "head-dims" else "")
)
dense = show_dense("redundancy")
if dense is not None:
    st.subheader("Measured")
    missing = [
        (plan.mha_ratio, plan.mlp_ratio)
        for mine in plans.values()
        for plan in mine
        if find_point(plan, "none") is None
    ]
    if not show_job("curve", visit().request):
        estimate = ""
        if missing:
            seconds = cuts_seconds(bench, visit().request, missing, choices)
            estimate = f" Measuring them takes {estimate_in_words(seconds)}."
        st.caption(
            f"{len(missing)} of {sum(map(len, plans.values()))} cuts are not measured yet."
            f"{estimate}",
            help=pace_in_words(visit().request),
        )
        if st.button("Measure both curves", type="primary", disabled=not missing):
            start_curve(bench, missing, choices)
            st.rerun()
    show_measured(bench, plans, dense)
