"""Which heads and channels matter, and how concentrated each layer is."""

from dataclasses import replace

import streamlit as st

from pages.shared import charts
from pages.shared.options import IMPORTANCE_HELP, measures
from pages.shared.progress import require_bench, require_prepared
from pages.shared.workbench import visit
from transact_core.activations import MODULES, channels_holding
from transact_core.bench import Choices
from transact_core.importance import IMPORTANCES

SHARE = 0.9

st.title("Importance")
bench = require_bench()
statistics = bench.statistics()
st.plotly_chart(
    charts.concentration(
        {
            module: channels_holding(getattr(statistics, module), SHARE).numpy()
            for module in MODULES
        },
        SHARE,
    ),
    key="concentration",
)
st.caption("How to read it: a short bar is a layer whose signal needs few of its channels.")

left, right = st.columns([2, 3], vertical_alignment="bottom")
# The Compress page's own choice: what is looked at here is cut by there.
importance = left.selectbox(
    "Importance", list(IMPORTANCES), key="importance", bind="query-params", help=IMPORTANCE_HELP
)
visit().cut = replace(visit().cut, importance=importance)
st.caption(f"`{importance}` measures {measures(importance)}. Low scores go first.")
if not require_prepared(bench, Choices(importance=importance), "importance"):
    st.stop()
scores = bench.scores(importance)
in_order = charts.are_positions(scores.channels.numpy())
with right.container(horizontal=True, vertical_alignment="center"):
    which = st.segmented_control(
        "Channels of", ["MLP", "MHA"], default="MLP", required=True, key="channels_of",
        persist_state="session", label_visibility="collapsed",
    )  # fmt: skip
    ordered = st.toggle(
        "Best first", value=True, key="ordered", persist_state="session", disabled=in_order,
        help="These scores are positions: in that order all layers look the same."
        if in_order else None,
    )  # fmt: skip
left, right = st.columns([2, 3])
with left:
    heads = scores.heads.numpy()
    st.plotly_chart(charts.head_map(heads, title=charts.head_differences(heads)), key="heads")
    st.caption("How to read it: dark heads are those that a cut takes first.")
with right:
    shown = scores.channels if which == "MLP" else scores.head_channels
    st.plotly_chart(
        charts.channel_map(shown.numpy(), ordered and not in_order, which), key="channels"
    )
    st.caption(
        "How to read it: the sooner a row turns dark from the left, the longer the tail of weak "
        "channels."
        if ordered and not in_order
        else "How to read it: dark channels are those that a cut takes first."
    )

st.download_button(
    "Scores (CSV)",
    lambda: scores.to_frame(importance).to_csv(index=False).encode(),
    "scores.csv",
    "text/csv",
    icon=":material/download:",
    on_click="ignore",
)
