"""The method's premise as an experiment: which activations may be disturbed?"""

import pandas as pd
import streamlit as st

from pages.charts import exploring_charts
from pages.charts.common import on_text
from pages.parts.figure import show
from pages.parts.progress import require_bench, show_dense, show_job
from pages.server.exploring import findings, start_layers, start_strengths
from pages.server.visits import visit
from transact_core.data.corpus import short_name
from transact_core.experiments.bench import Bench
from transact_core.experiments.premise import DISTURBANCES, Disturbed
from transact_core.forward.perplexity import Evaluation
from transact_core.forward.waists import SITES

ALL, EACH = "All layers at once", "Layer by layer"
TOKENS = 1024
"""Evaluation tokens by default: enough to compare the sites, and a minute on the built-in model."""
STRENGTHS = (0.05, 0.1, 0.2, 0.4)
"""Relative strengths of the disturbance by default."""
LAYERS = 6
"""Number of layers that are disturbed one by one by default."""
HELP = (
    "`noise`: to every token's activation, Gaussian noise is added whose norm is this share of "
    "the activation's own. `zero at random`: a random share of the channels is set to zero. "
    "`zero the weakest`: this share of the channels, those of lowest RMS over the calibration "
    "text, is set to zero."
)


def spaced(layers: int, count: int) -> list[int]:
    """Indices of evenly spaced layers, the first and the last included."""
    return sorted({round(index * (layers - 1) / max(1, count - 1)) for index in range(count)})


def choose(bench: Bench) -> tuple[str, str, list[float], list[int], int]:
    """Experiment, disturbance, strengths, layers and number of windows."""
    num_hidden_layers = bench.loaded.architecture.num_hidden_layers
    experiment = st.segmented_control(
        "Where",
        [ALL, EACH],
        default=ALL,
        required=True,
        key="premise_where",
        persist_state="session",
    )
    columns = st.columns(3)
    disturbance = columns[0].selectbox(
        "Disturbance", DISTURBANCES, key="premise_disturbance", persist_state="session", help=HELP
    )
    layers: list[int] = []
    if experiment == ALL:
        chosen = columns[1].multiselect(
            "Strengths",
            [1, 2, 5, 10, 20, 30, 40, 50, 60, 80],
            default=[round(100 * strength) for strength in STRENGTHS],
            format_func=lambda percent: f"{percent} %",
            key="premise_strengths",
            persist_state="session",
        )
        strengths = sorted(percent / 100 for percent in chosen)
    else:
        percent = columns[1].number_input(
            "Strength in %", 1, 100, 20, 5, key="premise_strength", persist_state="session"
        )
        strengths = [int(percent) / 100]
        count = columns[2].number_input(
            "Layers",
            1,
            num_hidden_layers,
            min(LAYERS, num_hidden_layers),
            key="premise_layers",
            persist_state="session",
            help="Evenly spaced, the first and the last layer included.",
        )
        layers = spaced(num_hidden_layers, int(count))
    length, most = bench.evaluation.sequence_length, len(bench.evaluation)
    windows = columns[2 if experiment == ALL else 0].number_input(
        "Evaluation windows",
        1,
        most,
        min(most, max(2, TOKENS // length)),
        key="premise_windows",
        persist_state="session",
        help=f"The first windows of the evaluation text, {length:,} tokens each.",
    )
    return experiment, disturbance, strengths, layers, int(windows)


def undisturbed(dense: Evaluation, windows: int) -> float:
    """The dense model's perplexity on the first windows."""
    return Evaluation(dense.nll[:windows]).perplexity


def table(points: list[Disturbed]) -> pd.DataFrame:
    """A row for each measured point."""
    return pd.DataFrame(
        {
            "site": point.site,
            "layer": "all" if point.layer is None else point.layer,
            "disturbance": point.disturbance,
            "strength": point.strength,
            "perplexity": point.perplexity,
            "delta_nll": point.delta_nll,
            "delta_nll_se": point.delta_nll_se,
            "scored_tokens": point.evaluation.scored_tokens,
        }
        for point in points
    )


@st.fragment(run_every=1.0 if visit().visitor.unfinished_jobs else None)
def show_points(bench: Bench, dense: Evaluation, wanted: list[tuple]) -> None:
    found = findings().disturbed
    points = [found[key] for key in wanted if key in found]
    if not points:
        st.caption("The chart begins with the first measured point.")
        return
    windows, _, _, layer, _ = wanted[0]
    base = undisturbed(dense, windows)
    figure = (
        exploring_charts.strengths(points, base)
        if layer is None
        else exploring_charts.layers(points, base, bench.loaded.architecture.num_hidden_layers)
    )
    single = " With a single window there is no interval." if windows == 1 else ""
    show(
        on_text(figure, short_name(bench.evaluation.source)),
        "premise",
        "a line far above the dotted one is an activation that is sensitive to disturbances; one "
        "that stays near it has width to spare. Bars are 95 % intervals of the paired difference."
        f"{single} {points[0].evaluation.scored_tokens:,} scored tokens a point.",
        lambda: table(points),
    )


st.title("Premise")
st.caption(
    "The method cuts inside the modules and leaves the residual stream between them whole, because "
    "disturbances of the stream are said to cost most (Shen et al. 2024). This experiment applies "
    "the same relative disturbance to the waist of MHA, to the waist of MLP, and to the residual "
    "stream where it enters a layer, and compares the perplexities. A disturbance of the stream "
    "stays in it for all later layers; one of a waist reaches it through one output projection."
)
bench = require_bench()
dense = show_dense("premise")
experiment, disturbance, strengths, chosen_layers, windows = choose(bench)
places = [None] if experiment == ALL else chosen_layers
wanted = [
    (windows, disturbance, strength, layer, site)
    for strength in strengths
    for layer in places
    for site in SITES
]
missing = [key for key in wanted if key not in findings().disturbed]
tokens = windows * bench.evaluation.sequence_length
if dense is not None and not show_job("premise", visit().request):
    st.caption(
        f"{len(missing)} of {len(wanted)} points are not measured yet, each {tokens:,} tokens."
        if missing
        else "All points are measured."
    )
    if st.button("Run the experiment", type="primary", disabled=not missing):
        if experiment == ALL:
            start_strengths(disturbance, sorted({key[2] for key in missing}), windows)
        else:
            start_layers(disturbance, strengths[0], sorted({key[3] for key in missing}), windows)
        st.rerun()
if dense is not None and wanted:
    show_points(bench, dense, wanted)
