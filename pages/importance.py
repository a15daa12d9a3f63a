"""The Importance page: the scores of all channels, their concentration, and what a cut removes."""

import pandas as pd
import streamlit as st

from pages.charts import common as charts
from pages.charts import plan_charts
from pages.parts.figure import show
from pages.parts.help_texts import IMPORTANCE_HELP, measures
from pages.parts.progress import require_bench, require_prepared
from pages.server.visits import visit
from transact_core.experiments.bench import Bench
from transact_core.forward.statistics import channels_holding
from transact_core.forward.waists import MODULES
from transact_core.importance.scores import IMPORTANCES, Scores
from transact_core.planning.redundancy import kept_channels, kept_share

SHARE = 0.9
"""Share of the activation energy whose channels are counted in the first chart."""


def by_layer(values: dict) -> pd.DataFrame:
    return pd.DataFrame(values).rename_axis("layer").reset_index()


def show_map(scores: Scores, module: str, ordered: bool) -> None:
    of_module = scores.channels if module == "MLP" else scores.head_channels
    show(
        charts.channel_map(of_module.numpy(), ordered, module, height=420),
        "channels",
        "the earlier a row turns dark from the left, the more weak channels the layer has."
        if ordered
        else "dark channels are those that a cut removes first.",
        lambda: scores.to_frame(visit().cut.importance),
    )


@st.fragment
def show_tail(bench: Bench, scores: Scores, module: str, in_order: bool) -> None:
    cut, shape = visit().cut, bench.loaded.architecture
    plan = bench.plan(cut.mha_ratio, cut.mlp_ratio, cut.choices)
    kept = kept_channels(plan, shape)
    statistics = bench.statistics()
    of_module = (scores.channels if module == "MLP" else scores.head_channels).numpy()
    mask = kept[module.lower()].numpy()
    words, choice = st.columns([3, 1], vertical_alignment="bottom")
    words.subheader("What the cut removes")
    words.caption(
        f"At the Compress page's cut: MHA {cut.mha_ratio:.0%}, MLP {cut.mlp_ratio:.0%}, by "
        f"{cut.granularity} and {cut.importance}."
    )
    if st.session_state.get("curve_layer", 0) >= shape.num_hidden_layers:
        st.session_state["curve_layer"] = 0
    layer = choice.selectbox(
        "Layer", range(shape.num_hidden_layers), key="curve_layer", persist_state="session"
    )
    left, right = st.columns(2)
    with left:
        if in_order:
            st.info(
                "These scores are positions in an order of elimination, so the curve of every "
                "layer is the same straight line."
            )
        else:
            show(
                charts.sorted_curves(of_module, mask.mean() if module == "MLP" else None, module),
                "sorted",
                "in a layer whose line falls early, few channels have most of the score; a layer "
                "with a flat line has no weak channels.",
                lambda: scores.to_frame(cut.importance),
                narrow=True,
            )
    with right:
        show(
            charts.layer_curve(of_module[layer], mask[layer], layer, module),
            "layer-curve",
            "grey is what the cut removes. Whole heads take strong channels along with weak ones."
            if module == "MHA"
            else "grey is what the cut removes.",
            lambda: pd.DataFrame(
                {
                    "channel": range(len(of_module[layer])),
                    "score": of_module[layer],
                    "stays": mask[layer],
                }
            ),
            narrow=True,
        )
    shares = {
        name: kept_share(getattr(statistics, name).sum_of_squares, kept[name]).numpy()
        for name in MODULES
    }
    show(
        plan_charts.energy_kept(shares),
        "energy",
        "the share of `Σ a²` over the calibration tokens that is in the units that are kept. Where "
        "a line dips, the same cut removes more of that layer's energy.",
        lambda: by_layer(shares),
    )


st.title("Importance")
bench = require_bench()
statistics = bench.statistics()
held = {module: channels_holding(getattr(statistics, module), SHARE).numpy() for module in MODULES}
show(
    charts.concentration(held, SHARE),
    "concentration",
    "in a layer with a short bar, few channels hold most of the energy.",
    lambda: by_layer(held),
)
left, right = st.columns([2, 3], vertical_alignment="bottom")
# This is the Compress page's choice of importance too: both pages show the same one.
importance = left.selectbox(
    "Importance", list(IMPORTANCES), key="importance", bind="query-params", help=IMPORTANCE_HELP
)
visit().cut = visit().cut.by(importance)
st.caption(
    f"`{importance}` measures {measures(importance)}. Units with low scores are removed first."
)
if not require_prepared(bench, visit().cut.choices, "importance"):
    st.stop()
scores = bench.scores(importance)
in_order = charts.are_positions(scores.channels.numpy())
with right.container(horizontal=True, vertical_alignment="center"):
    module = st.segmented_control(
        "Channels of",
        ["MLP", "MHA"],
        default="MLP",
        required=True,
        key="channels_of",
        persist_state="session",
        label_visibility="collapsed",
    )
    ordered = st.toggle(
        "Best first",
        value=True,
        key="ordered",
        persist_state="session",
        disabled=in_order,
        help="These scores are positions in an order of elimination. Sorted, all layers look alike."
        if in_order
        else None,
    )
show_map(scores, module, ordered and not in_order)
show_tail(bench, scores, module, in_order)
