"""A page with only the live view, on random scores, for its tests and its benchmark.

The address says which model shape (`?shape=small`, `large` or `largest`) and whether there is a
prediction (`?predicted=1`). What the switch hides is drawn afresh when it is shown again.
"""

from dataclasses import asdict, replace

import streamlit as st
import torch

from pages.live import KEY, Measured, Position, live, predicted, tables
from pages.live.skyline import bar_tables
from transact_core.experiments.bench import Choices
from transact_core.forward.statistics import ActivationStatistics, ModuleStatistics
from transact_core.importance.scores import Scores
from transact_core.models.architecture import Architecture
from transact_core.planning.law import Ratio
from transact_core.planning.preview import energy_kept, maps, structure
from transact_core.pruning.plan import GRANULARITIES, Granularity

SHAPES = {
    "small": Architecture(96, 200, 4, 12, 4, 8, 320, True, False, False),
    "large": Architecture(4096, 11_008, 32, 32, 32, 128, 32_000, False, False, False),
    "largest": Architecture(8192, 14_336, 80, 64, 8, 128, 128_256, False, False, False),
}


@st.cache_resource
def made(shape: str, granularity: Granularity) -> tuple:
    architecture = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)

    def random(width: int) -> torch.Tensor:
        layers = architecture.num_hidden_layers
        return torch.rand(layers, width, generator=generator, dtype=torch.float64)

    width = architecture.mha_width
    scores = Scores(
        random(architecture.num_attention_heads),
        random(width),
        random(architecture.intermediate_size),
    )
    sums = [random(width), random(architecture.intermediate_size)]
    mha, mlp = (ModuleStatistics(values, values, values, 1) for values in sums)
    statistics = ActivationStatistics(mha, mlp, residual=mha)
    table = structure(architecture, granularity)
    energy = energy_kept(table, scores, statistics, architecture)
    drawn = maps(table, scores, architecture)
    bars = bar_tables(architecture, Choices(granularity=granularity))
    return table, tables(architecture, [table], drawn, energy, "float16", bars)


def restore() -> None:
    choices = st.session_state[KEY]["view"].get("choices")
    if choices:
        st.session_state["granularity"] = choices["granularity"]


@st.fragment
def view() -> None:
    granularity = st.selectbox("Granularity", GRANULARITIES, key="granularity")
    table, given = made(st.query_params.get("shape", "small"), granularity)
    prediction = None
    measured = []
    if "predicted" in st.query_params:
        pairs = [(mha, mlp) for mha in table.mha.options for mlp in table.mlp.options]
        prediction = {}
        for mha, mlp in pairs:
            cut = (
                2 - mha.width / table.mha.options[0].width - mlp.width / table.mlp.options[0].width
            )
            prediction[mha.width, mlp.width] = Ratio(1 + 0.8 * cut, 1 + cut, 1 + 1.3 * cut)
        measured = [Measured(table.mha.option_at[33], table.mlp.option_at[30], 1.7, 1.6, 1.8)]
    start, revision = st.session_state.setdefault("start", (Position(), 1))
    position = live(
        given,
        start,
        revision,
        {"granularity": granularity},
        20.0,
        prediction and predicted(table, prediction),
        measured,
        on_change=restore,
    )
    st.session_state["rested"] = position
    runs = st.session_state["runs"] = st.session_state.get("runs", 0) + 1
    said = {name: value for name, value in asdict(position).items() if value != ""}
    st.text(f"rests at {said}, run {runs}")
    if st.button("Put at 50"):
        st.session_state["start"] = (replace(position, mha=50, mlp=50), revision + 1)
        st.rerun(scope="fragment")


st.set_page_config(layout="wide")
if st.toggle("Shown", value=True):
    view()
else:
    for key in (KEY, "granularity", "rested", "runs"):
        st.session_state.pop(key, None)
    # Whatever the browser sent for an earlier revision counts no more.
    _, last = st.session_state.get("start", (Position(), 1))
    st.session_state["start"] = (Position(), last + 1)
