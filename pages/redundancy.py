"""The Redundancy page: what MHA and MLP lose when the same share of their width is removed."""

import numpy as np
import pandas as pd
import streamlit as st

from pages.charts import exploring_charts
from pages.charts.common import on_text
from pages.parts.figure import show
from pages.parts.help_texts import GRANULARITY_HELP, IMPORTANCE_HELP
from pages.parts.progress import (
    estimate_in_words,
    require_bench,
    require_prepared,
    show_dense,
    show_job,
)
from pages.parts.texts import text_in_words
from pages.server.estimates import cuts_seconds, pace_in_words
from pages.server.points import find_point
from pages.server.start_jobs import start_curve
from pages.server.visits import visit
from transact_core.data.corpus import short_name
from transact_core.experiments.bench import Bench, Choices
from transact_core.forward.perplexity import Evaluation
from transact_core.importance.scores import IMPORTANCES
from transact_core.planning.redundancy import lost_by
from transact_core.pruning.plan import GRANULARITIES, PruningPlan

SHARES = tuple(tenths / 10 for tenths in range(1, 10))
"""Shares of a module's width whose removal is compared."""


def plans_of(bench: Bench, choices: Choices) -> dict[str, list[PruningPlan]]:
    """Cuts of one module alone at each share; shares that give the same widths make one cut."""
    shape = bench.loaded.architecture
    plans: dict[str, list[PruningPlan]] = {"mha": [], "mlp": []}
    for module, found in plans.items():
        for share in SHARES:
            pair = (share, 0.0) if module == "mha" else (0.0, share)
            plan = bench.plan(*pair, choices)
            widths = [earlier.widths for earlier in found]
            if plan.cuts_anything(shape) and plan.widths not in widths:
                found.append(plan)
    return plans


def removed(bench: Bench, plan: PruningPlan, module: str) -> float:
    """The share of the module's width that a plan removes."""
    shape = bench.loaded.architecture
    cut = plan.widths.applied_to(shape)
    if module == "mha":
        return 1 - cut.mha_width / shape.mha_width
    return 1 - cut.intermediate_size / shape.intermediate_size


def lost_table(bench: Bench, plans: dict[str, list[PruningPlan]]) -> pd.DataFrame:
    written = bench.scores("activation-weight")
    rows = []
    for module, of_module in plans.items():
        rows.append({"module": module, "removed": 0.0, "lost": 0.0, "least": 0.0, "most": 0.0})
        for plan in of_module:
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
    for module, of_module in plans.items():
        for plan in of_module:
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
        on_text(
            exploring_charts.bare_perplexities(frame, dense.perplexity),
            short_name(bench.evaluation.source),
        ),
        "redundancy-measured",
        "the module with the lower line loses less at the same share removed. Bars are 95 % "
        "intervals of the paired "
        f"difference from the dense model, over {text_in_words(bench)}. The points "
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
visit().cut = visit().cut.by(importance, granularity)
choices = Choices(granularity=granularity, importance=importance, recovery="none")
ready = require_prepared(bench, choices, "redundancy")
if not (ready and require_prepared(bench, Choices(importance="activation-weight"), "written")):
    st.stop()
plans = plans_of(bench, choices)
show(
    exploring_charts.lost_energy(table := lost_table(bench, plans)),
    "redundancy",
    "the removed channels of the module with the lower line wrote less. Lines are means over "
    "layers; bands are the range over layers.",
    lambda: table,
)
st.caption(
    "Written energy is `Σ a² · ‖W‖²` over the calibration tokens, where `a` is a channel's "
    "transitional activation and `W` its column of the output projection. The chart shows the "
    "removed channels' share of it. If channels were uncorrelated, this share would be the "
    "relative squared error of the bare cut's output. It leaves out the repair, and how later "
    "layers change the error."
    + (" For narrower heads it counts the value dims only." if granularity == "head-dims" else "")
)
dense = show_dense("redundancy")
if dense is not None:
    st.subheader("Measured")
    missing = [
        (plan.mha_ratio, plan.mlp_ratio)
        for of_module in plans.values()
        for plan in of_module
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
