"""How large activations are, layer by layer: at the waists, and in the stream between modules."""

import streamlit as st

from pages.charts import activation_charts
from pages.parts.figure import show
from pages.parts.progress import require_bench

st.title("Activations")
bench = require_bench()
statistics = bench.statistics()
frame = statistics.to_frame()
st.caption(
    "The transitional activation is what passes a module's waist: the head outputs that `o_proj` "
    "reads, and `silu(gate) · up` that `down_proj` reads. This is where width is removed. Between "
    "modules runs the residual stream, which is left whole; it is looked at where it enters a "
    f"layer. Measured over {statistics.tokens:,} calibration tokens."
)
show(
    activation_charts.magnitude(frame),
    "magnitude",
    "where a line is low, little passes; the residual stream adds up what all layers before wrote.",
    lambda: frame,
)
show(
    activation_charts.spread(frame),
    "spread",
    "the solid line is the median channel, the band holds 90 % of channels, the dotted line is the "
    "largest one. A wide band is a waist in which many channels carry little.",
    lambda: frame,
)
show(
    activation_charts.outliers(frame),
    "outliers",
    "the higher a point, the more one value of one token stands out of its layer. Noise or a cut "
    "that hits such a value changes much; a waist without them can be cut more evenly.",
    lambda: frame,
)
