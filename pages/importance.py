"""Which heads and channels matter, and how concentrated each layer is."""

import streamlit as st

from pages.shared import charts
from pages.shared.progress import require_bench
from transact_core.activations import MODULES, channels_holding
from transact_core.bench import Choices

SHARE = 0.9

st.title("Importance")
bench = require_bench()
importance = Choices().importance
scores = bench.scores(importance)
statistics = bench.statistics()
st.caption(
    "TransAct scores a channel by its activation's norm over the calibration tokens, "
    "`sqrt(Σ a²)`, and a head by the mean and the maximum of its channels. Low scores go first."
)

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

_, controls = st.columns([2, 3])
with controls.container(horizontal=True, vertical_alignment="center"):
    which = st.segmented_control(
        "Channels of", ["MLP", "MHA"], default="MLP", required=True, key="channels_of",
        persist_state="session", label_visibility="collapsed",
    )  # fmt: skip
    ordered = st.toggle("Best first", value=True, key="ordered", persist_state="session")
left, right = st.columns([2, 3])
with left:
    heads = scores.heads.numpy()
    weakest = (heads / heads.max(axis=1, keepdims=True)).min(axis=1)
    st.plotly_chart(
        charts.head_map(heads, title=f"Heads differ most in layer {int(weakest.argmin())}"),
        key="heads",
    )
    st.caption("How to read it: dark heads are those that a cut takes first.")
with right:
    shown = scores.channels if which == "MLP" else scores.head_channels
    st.plotly_chart(charts.channel_map(shown.numpy(), ordered, which), key="channels")
    st.caption(
        "How to read it: the sooner a row turns dark from the left, the longer the tail of weak "
        "channels."
    )

st.download_button(
    "Scores (CSV)",
    lambda: scores.to_frame(importance).to_csv(index=False).encode(),
    "scores.csv",
    "text/csv",
    icon=":material/download:",
    on_click="ignore",
)
