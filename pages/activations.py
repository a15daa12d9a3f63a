"""Magnitudes of activations by layer: at the waists, and in the residual stream."""

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
    "modules runs the residual stream, which is left whole; it is measured where it enters a "
    f"layer. All figures are over {statistics.tokens:,} calibration tokens."
)
show(
    activation_charts.magnitude(frame),
    "magnitude",
    "a low line is a small activation; the residual stream is the sum of all earlier outputs.",
    lambda: frame,
)
show(
    activation_charts.spread(frame),
    "spread",
    "the solid line is the median channel, the band holds 90 % of channels, and the dotted line is "
    "the largest one. A wide band is a waist in which many channels carry little energy.",
    lambda: frame,
)
show(
    activation_charts.outliers(frame),
    "outliers",
    "the higher a point, the further one value of one token stands out in its layer. Removing such "
    "a value changes the output much; a waist without outliers can be cut more evenly.",
    lambda: frame,
)
