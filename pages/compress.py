"""Two sliders, what they mean at once, and the real cut behind a button."""

import math
from collections.abc import Sequence

import numpy as np
import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from pages.shared import charts, plan_charts
from pages.shared.options import GRANULARITY_HELP, IMPORTANCE_HELP, RECOVERY_HELP, STEPS_HELP
from pages.shared.progress import require_bench, require_prepared, show_dense, show_job
from pages.shared.workbench import (
    Cut,
    find_cut,
    find_point,
    plan_at,
    start_cut,
    visit,
)
from transact_core.architecture import Architecture
from transact_core.bench import Bench, Measurement
from transact_core.importance import IMPORTANCES
from transact_core.plan import GRANULARITIES, Decision, LayerPlan, PruningPlan, head_counts
from transact_core.recovery import RECOVERIES
from transact_core.surgery import head_rows


def choose() -> tuple[Cut, tuple[DeltaGenerator, DeltaGenerator]]:
    """The cut at the controls, and room below the two sliders."""
    left, right = st.columns(2, gap="large")
    mha = left.slider(
        "MHA ratio: attention width removed", 0, 95, 33, 1, format="%d%%",
        key="mha", bind="query-params",
    )  # fmt: skip
    mlp = right.slider(
        "MLP ratio: MLP width removed", 0, 95, 30, 1, format="%d%%",
        key="mlp", bind="query-params",
    )  # fmt: skip
    below = left.container(), right.container()
    columns = st.columns([3, 3, 3, 1])
    granularity = columns[0].selectbox(
        "Granularity", [*GRANULARITIES, "auto"], key="granularity", bind="query-params",
        help=GRANULARITY_HELP,
    )  # fmt: skip
    importance = columns[1].selectbox(
        "Importance", list(IMPORTANCES), key="importance", bind="query-params",
        help=IMPORTANCE_HELP,
    )  # fmt: skip
    recovery = columns[2].selectbox(
        "Recovery", RECOVERIES, key="recovery", bind="query-params", help=RECOVERY_HELP
    )
    steps = columns[3].number_input(
        "Steps", 1, 20, key="steps", bind="query-params", help=STEPS_HELP
    )
    cut = visit().cut = Cut(mha / 100, mlp / 100, granularity, importance, recovery, int(steps))
    return cut, below


def heads_in_words(plan: PruningPlan, shape: Architecture) -> str:
    """What stays of the heads, and which widths there are."""
    if plan.granularity == "head-dims":
        kept = plan.head_dim or shape.head_dim
        return (
            f"Every head keeps **{kept} of {shape.head_dim}** dims, {kept // 2} of "
            f"{shape.head_dim // 2} rotary pairs. Possible: any even number."
        )
    counts = ", ".join(str(count) for count in head_counts(shape, plan.granularity))
    return (
        f"**{plan.num_attention_heads} of {shape.num_attention_heads}** query heads stay, over "
        f"{plan.num_key_value_heads} of {shape.num_key_value_heads} KV heads. "
        f"Possible here: {counts}."
    )


def show_footprint(bench: Bench, plan: PruningPlan, recovery: str) -> None:
    dense, pruned = bench.dense_footprint, bench.footprint(plan, recovery)
    rows = (
        ("Parameters", dense.parameters, pruned.parameters, 1e6, "M"),
        ("Weights", dense.weight_bytes, pruned.weight_bytes, 1e6, "MB"),
        ("KV/token", dense.kv_bytes_per_token, pruned.kv_bytes_per_token, 1e3, "kB"),
        ("FLOPs/token", dense.flops_per_token, pruned.flops_per_token, 1e6, "M"),
        ("MHA width", dense.mha_width, pruned.mha_width, 1, ""),
        ("MLP width", dense.mlp_width, pruned.mlp_width, 1, ""),
    )
    details = {
        "KV/token": " bytes of KV cache for each token, keys and values of all layers.",
        "FLOPs/token": f"; attention at {dense.context_length:,} tokens.",
    }
    for column, (label, before, after, scale, unit) in zip(
        st.columns(len(rows), gap="xsmall"), rows, strict=True
    ):
        digits = 1 if scale > 1 and after < 100 * scale else 0
        change = after / before - 1
        column.metric(
            label,
            f"{after / scale:,.{digits}f} {unit}".strip(),
            f"{change:.1%}" if change else "unchanged",
            delta_color="inverse" if change else "off",
            delta_arrow="auto" if change else "off",
            help=f"Exactly {after:,}, of the dense model's {before:,}" + details.get(label, "."),
            border=True,
        )


def attention_channels(layer: LayerPlan, shape: Architecture) -> list[int]:
    if not layer.value_dims:
        return head_rows(layer.kept_heads, shape.head_dim).tolist()
    return [
        head * shape.head_dim + dim
        for head in layer.kept_heads
        for dim in layer.value_dims[head // shape.queries_per_group]
    ]


def energy_shares(bench: Bench, plan: PruningPlan) -> dict[str, np.ndarray]:
    statistics, shape = bench.statistics(), bench.loaded.architecture
    kept = {
        "mha": [attention_channels(layer, shape) for layer in plan.layers],
        "mlp": [list(layer.kept_channels) for layer in plan.layers],
    }
    shares = {}
    for module, indices in kept.items():
        energy = getattr(statistics, module).sum_of_squares
        shares[module] = np.array(
            [
                (row[columns].sum() / row.sum().clamp_min(1e-300)).item()
                for row, columns in zip(energy, indices, strict=True)
            ]
        )
    return shares


def show_heads(bench: Bench, plan: PruningPlan) -> None:
    shape = bench.loaded.architecture
    removed = shape.num_attention_heads - plan.num_attention_heads
    st.plotly_chart(
        charts.head_map(
            bench.scores(plan.importance).heads.numpy(),
            plan,
            f"{removed} of {shape.num_attention_heads} heads go in each layer (×)",
            height=660,
        ),
        key="plan-heads",
    )


def in_ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in words: 0–2, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def show_pairs(bench: Bench, plan: PruningPlan) -> None:
    pairs = bench.pairs()
    st.plotly_chart(
        plan_charts.pair_map(pairs.effects.numpy(), plan, pairs.inv_freq.numpy()),
        key="plan-pairs",
    )
    if plan.head_dim:
        st.caption(
            "Full cells stay, small pale ones go. All heads share the frequencies of the slots "
            f"(▾): those of pairs {in_ranges(plan.slots)}. Each KV head puts its own "
            "best pairs into them. This choice is by effect on attention, whatever the importance."
        )


def show_plan(bench: Bench, plan: PruningPlan) -> None:
    shape = bench.loaded.architecture
    narrower = plan.granularity == "head-dims"
    left, right = st.columns([1, 1] if narrower else [2, 3])
    with left:
        (show_pairs if narrower else show_heads)(bench, plan)
    with right:
        st.plotly_chart(plan_charts.energy_kept(energy_shares(bench, plan)), key="plan-energy")
        st.plotly_chart(
            plan_charts.kept_channels(plan, shape.intermediate_size), key="plan-channels"
        )
    st.caption(
        "Energy is `Σ a²` over the calibration tokens. It says which units are quiet, not what "
        "their loss costs: that is measured by the button above."
        + (
            " For narrower heads it is that of the dims of the values that the bare cut keeps; "
            "`least-squares` finds a better basis of as many."
            if narrower
            else ""
        )
    )


def show_point(point: Measurement) -> None:
    error = f" ± {point.delta_nll_se:.3f}" if math.isfinite(point.delta_nll_se) else ""
    with st.container(border=True):
        figures = st.columns(4)
        figures[0].metric("Perplexity, measured", f"{point.perplexity:.2f}")
        figures[1].metric("Of the dense model's", f"{math.exp(point.delta_nll):.2f} ×")
        figures[2].metric(
            "Δ NLL a token",
            f"{point.delta_nll:.3f}{error}",
            help="Mean per-token difference from the dense model in nats, with its standard "
            "error over evaluation windows (a single window has none).",
        )
        figures[3].metric("Took", f"{point.seconds:.0f} s")
        if point.fits:
            with st.expander("What the repair did in each layer"):
                st.plotly_chart(plan_charts.layer_fits(point.fits, point.recovery), key="fits")


def show_decision(decision: Decision | None, plan: PruningPlan) -> None:
    """How `auto` and steps decided, or what stands in for it until they have."""
    if decision is None:
        st.caption(
            f"What `auto` takes, and which units several steps keep, is found when the cut is "
            f"measured. Until then this is `{plan.granularity}` scored once."
        )
        return
    if decision.why:
        st.caption(decision.why)
    if decision.earlier_steps:
        st.caption(
            "On the way: "
            + "; ".join(
                f"{step.num_attention_heads} heads of {step.head_dim} and "
                f"{step.intermediate_size:,} channels, perplexity {step.perplexity:.2f}"
                for step in decision.earlier_steps
            )
            + "."
        )


@st.fragment
def workbench_view(bench: Bench) -> None:
    cut, (left, right) = choose()
    if not require_prepared(bench, cut.choices, "cut"):
        return
    decision, shape = find_cut(bench, cut), bench.loaded.architecture
    plan = decision.plan if decision else plan_at(bench, cut)
    left.caption(heads_in_words(plan, shape))
    right.caption(
        f"**{plan.intermediate_size:,} of {shape.intermediate_size:,}** channels stay "
        "in each layer."
    )
    show_footprint(bench, plan, cut.recovery)
    point = find_point(decision.plan, cut.recovery) if decision else None
    show_decision(decision, plan)
    show_dense("cut")
    busy = show_job("cut", visit().request, cut)
    if point is not None:
        show_point(point)
    elif not busy:
        nothing = not plan.cuts_anything(shape)
        if st.button(
            "Prune and measure perplexity", type="primary", icon=":material/content_cut:",
            disabled=nothing,
            help="Nothing is cut at these ratios." if nothing else
            f"Cuts the model, repairs it, and measures on {bench.evaluation.tokens:,} tokens.",
        ):  # fmt: skip
            start_cut(bench, cut)
            st.rerun()
    show_plan(bench, plan)


st.title("Compress")
st.caption("Move a slider: everything below follows at once. The address keeps the positions.")
workbench_view(require_bench())
