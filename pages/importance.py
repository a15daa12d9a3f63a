"""Which heads and channels matter, and how concentrated each layer is."""

import streamlit as st

from pages.shared import charts
from pages.shared.progress import require_bench
from transact_core.activations import MODULES, channels_holding
from transact_core.sweep import Choices

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
st.caption("Read it so: a short bar is a layer whose signal needs few of its channels.")

left, right = st.columns([2, 3])
with left:
    heads = scores.heads.numpy()
    weakest = (heads / heads.max(axis=1, keepdims=True)).min(axis=1)
    st.plotly_chart(
        charts.head_map(
            heads, title=f"Layer {int(weakest.argmin())} has the weakest head beside its best"
        ),
        key="heads",
    )
    st.caption("Read it so: dark heads are those that a cut takes first.")
with right:
    which = st.segmented_control(
        "Channels of", ["MLP", "MHA"], default="MLP", required=True, key="channels_of",
        persist_state="session",
    )  # fmt: skip
    ordered = st.toggle("Best first", value=True, key="ordered", persist_state="session")
    shown = scores.channels if which == "MLP" else scores.head_channels
    st.plotly_chart(charts.channel_map(shown.numpy(), ordered, which, height=440), key="channels")
    st.caption(
        "Read it so: the sooner a row turns dark from the left, the longer the tail that can go."
    )

st.download_button(
    "Scores (CSV)",
    lambda: scores.to_frame(importance).to_csv(index=False).encode(),
    "scores.csv",
    "text/csv",
    icon=":material/download:",
    on_click="ignore",
)
