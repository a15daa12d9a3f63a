"""How large the transitional activations are, layer by layer."""

import streamlit as st

from pages.shared import charts
from pages.shared.progress import require_bench
from transact_core.activations import MODULES

st.title("Activations")
st.caption(
    "The transitional activation is what passes a module's waist: the head outputs that `o_proj` "
    "reads, and `silu(gate) · up` that `down_proj` reads. This is where width is removed."
)
bench = require_bench()
statistics = bench.statistics()
by_module = {module: getattr(statistics, module) for module in MODULES}

st.plotly_chart(charts.magnitude_by_layer(by_module), key="magnitude")
st.caption(
    "How to read it: where a line is low, little passes the module's waist. "
    f"Measured over {statistics.tokens:,} calibration tokens."
)
st.plotly_chart(charts.spread_by_layer(by_module), key="spread")
st.caption(
    "How to read it: the further the dotted line is above the solid one, the more a layer's signal "
    "sits in few channels, and the more of the others may go."
)
