"""The first page: one cut of the built-in model, worked through with recorded numbers.

It is drawn at once: nothing that it imports at the top brings torch with it. What needs torch, the
progress of the opening and the visitor's own measurement, is drawn once the libraries are imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import streamlit as st

from pages.charts import common as charts
from pages.charts import curve_chart, waist_chart
from pages.charts.text import counted
from pages.parts.example import Concentration, Example, example
from pages.parts.figure import show
from pages.parts.navigation import link
from pages.parts.sizes import SIZES, times_dense
from pages.server.visits import points, require_entered, visit, visit_has_begun

if TYPE_CHECKING:
    import pandas as pd

    from transact_core.experiments.bench import Measurement

SIZES_SHOWN = ("parameters", "kv_bytes_per_token", "flops_per_token")
"""Fields of `Footprint`."""


def step(number: int, question: str, answer: str) -> None:
    st.subheader(f"{number}. {question}", anchor=False)
    st.write(answer)


def links(*names: str) -> None:
    with st.container(horizontal=True, gap="small"):
        for name in names:
            link(name)


def concentration_table(found: Concentration) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame({"mha": found.mha, "mlp": found.mlp}).rename_axis("layer")


def show_waste(recorded: Example) -> None:
    found = recorded.concentration
    step(
        1,
        "Where is the waste?",
        "Every layer has two inner activations, its waists: the outputs of the attention heads, "
        "and the activation inside the MLP. Their energy is not spread evenly over their width.",
    )
    shares = {"mha": np.array(found.mha), "mlp": np.array(found.mlp)}
    show(
        charts.concentration(shares, found.share),
        "example-concentration",
        f"each pair of bars is a layer, each bar the share of a waist's channels that hold "
        f"{found.share:.0%} of its energy; the width above a bar carries little.",
        lambda: concentration_table(found),
        narrow=True,
    )
    links("activations", "importance", "heads", "redundancy")


def show_cut(recorded: Example) -> None:
    dense, left = recorded.architecture, recorded.left
    heads = f"{left.num_attention_heads} of {dense.num_attention_heads} heads"
    channels = f"{left.intermediate_size:,} of {dense.intermediate_size:,} channels"
    step(
        2,
        "What may I cut?",
        "Width at the waists: heads and MLP channels, chosen for each layer. The residual stream "
        "between the modules, the norms and the embeddings stay whole.",
    )
    show(
        waist_chart.section(dense, left, f"{heads}, {channels} stay", 380),
        "example-section",
        "one layer from left to right, all widths to scale: each module reads the stream, narrows "
        "to its waist and adds its output to the stream; the removed width is grey.",
    )
    with st.container(horizontal=True, gap="medium"):
        link("compress", "Open this very cut on the Compress page", **recorded.address)
        link("premise")


def show_cost(recorded: Example) -> None:
    alone = sum(not (p.plan.mha_ratio and p.plan.mlp_ratio) for p in recorded.points)
    step(
        3,
        "What will it cost me?",
        "Sizes are known exactly before anything is cut. Perplexity is predicted from the error "
        "that the cut makes in each layer, and from cuts that were measured before: here "
        f"{alone} cuts of one module, and none of both.",
    )
    before, after, said = recorded.dense.footprint, recorded.cut.footprint, recorded.predicted
    columns = st.columns(len(SIZES_SHOWN) + 1)
    shown = [row for row in SIZES if row[1] in SIZES_SHOWN]
    for column, (label, field, scale, digits) in zip(columns, shown, strict=False):
        whole, kept = getattr(before, field), getattr(after, field)
        change = f"{kept / whole - 1:+.0%} from" if kept != whole else "as before,"
        column.metric(
            label,
            f"{kept / scale:,.{digits}f}",
            f"{change} {whole / scale:,.{digits}f}",
            delta_color="off",
            delta_arrow="off",
            border=True,
        )
    dense = recorded.dense.perplexity
    columns[-1].metric(
        "Perplexity, predicted",
        f"{said.mid * dense:.2f}",
        f"{said.low * dense:.2f} to {said.high * dense:.2f}",
        delta_color="off",
        delta_arrow="off",
        border=True,
        help="The interval should hold 9 in 10 measured values.",
    )


def own_measurement(recorded: Example) -> Measurement | None:
    """This visitor's measurement of the example's cut, on the same model and texts."""
    if not visit_has_begun():
        return None
    from pages.server.points import asked_by
    from pages.server.request import Cut, Request

    return asked_by(Cut(**recorded.asked), points()) if visit().request == Request() else None


def show_truth(recorded: Example) -> None:
    dense, cut, bare = recorded.dense.perplexity, recorded.cut, recorded.bare
    inside = recorded.predicted.low <= cut.perplexity / dense <= recorded.predicted.high
    step(
        4,
        "Was that true?",
        "The cut was made, the remaining weights were repaired in closed form on "
        f"{recorded.calibration.tokens:,} calibration tokens, and perplexity was measured on "
        f"{recorded.evaluation.tokens:,} others. It came out {'inside' if inside else 'outside'} "
        "the predicted interval.",
    )
    figures = {
        "Perplexity, dense": (dense, "nothing cut"),
        "Perplexity, measured": (cut.perplexity, f"{times_dense(cut)} the dense model's"),
        "Without the repair": (bare.perplexity, f"{bare.perplexity / dense:.0f} ×"),
    }
    for column, (label, (value, note)) in zip(st.columns([1, 2, 1]), figures.items(), strict=True):
        column.metric(
            label, f"{value:.2f}", note, delta_color="off", delta_arrow="off", border=True
        )
    own = own_measurement(recorded)
    if own is not None:
        st.success(f"You measured this cut on this machine: {own.perplexity:.2f}.")
    widths = recorded.architecture.mha_width, recorded.architecture.intermediate_size
    show(
        charts.on_text(
            curve_chart.perplexity_curve(recorded.points, recorded.dense, widths, logarithmic=True),
            recorded.text.partition(" (")[0],
        ),
        "example-curve",
        "the further right, the more width is gone; the higher, the worse the model predicts the "
        f"text. Bars are 95 % intervals of the difference from the dense model, over "
        f"{recorded.scored_tokens:,} scored tokens.",
        lambda: curve_chart.points_table(recorded.points),
    )
    links("perplexity", "tasks", "damage", "compare", "latency")


def show_result(recorded: Example) -> None:
    step(
        5,
        "Give it to me.",
        "The result is an ordinary checkpoint that stock `transformers` loads, with a "
        "configuration to reproduce it and a report for a colleague. The Export page writes it, as "
        "a GGUF file for llama.cpp too, and the Deploy page says which such file to take. What the "
        "repair leaves lost can be trained back on the Recover page. From the command line:",
    )
    st.code(
        f"python -m transact_core prune --model {recorded.model.source} "
        f"--mha-ratio {recorded.asked['mha_ratio']:g} "
        f"--mlp-ratio {recorded.asked['mlp_ratio']:g} --output out",
        language="bash",
        wrap_lines=True,
    )
    links("recover", "deploy", "export", "method")


def show_turn() -> None:
    step(
        6,
        "Your turn.",
        "Choose your model and your texts in the sidebar; all pages then show them, computed on "
        "this machine.",
    )
    if visit_has_begun():
        from pages.parts.progress import show_opening

        show_opening()


def show_recording(recorded: Example) -> None:
    made = recorded.environment
    packages = ", ".join(f"{name} {version}" for name, version in made.packages.items())
    with st.expander("How these numbers were made"):
        st.code(recorded.command, language="bash")
        st.markdown(
            f"- **When and where**: {recorded.recorded:%d %B %Y, %H:%M %Z}, "
            f"{recorded.processor}, {counted(made.threads, 'thread')} on "
            f"{counted(recorded.cores, 'core')}, {made.device}, {made.dtype}, "
            f"{made.cpu_capability}\n"
            f"- **Model**: {recorded.name}\n"
            f"- **Text**: {recorded.text}, {recorded.calibration.tokens:,} calibration tokens and "
            f"{recorded.evaluation.tokens:,} other evaluation tokens, windows of "
            f"{recorded.sequence_length}\n"
            f"- **Choices**: {recorded.asked['granularity']}, {recorded.asked['importance']}, "
            f"{recorded.asked['recovery']}\n"
            f"- **Packages**: {packages}\n"
            f"- **SHA-256**: weights `{', '.join(recorded.model.weight_files.values())}`, "
            f"calibration `{recorded.calibration.sha256}`, "
            f"evaluation `{recorded.evaluation.sha256}`"
        )


# First of all: where this file was run alone, the visitor is led to app.py.
require_entered()
recorded = example()
st.title("Start here")
st.write(
    "This workbench removes width from a language model, repairs the remaining weights without "
    "training, and shows what that costs. This page works through one cut of the built-in model "
    f"{recorded.name}."
)
st.caption(
    f":material/history: The numbers on this page are **recorded**: measured on "
    f"{recorded.recorded:%d %B %Y} on one machine ({recorded.processor}, "
    f"{counted(recorded.environment.threads, 'thread')}). All other pages compute on yours."
)
left, right = st.columns(2, gap="large")
with left:
    show_waste(recorded)
with right:
    show_cut(recorded)
show_cost(recorded)
show_truth(recorded)
show_result(recorded)
show_turn()
show_recording(recorded)
