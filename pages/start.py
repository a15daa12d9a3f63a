"""What this is for: one cut of the built-in model, worked through with recorded numbers.

It is there at once, also while the model is still being opened, and computes nothing.
"""

import numpy as np
import pandas as pd
import streamlit as st

from pages.charts import common as charts
from pages.charts import curve_chart, waist_chart
from pages.charts.text import counted
from pages.parts.example import Example, example
from pages.parts.figure import show
from pages.parts.navigation import link
from pages.parts.progress import show_opening
from pages.report import SIZES, times_dense
from pages.server.points import asked_by
from pages.server.request import Request
from pages.server.visits import points, visit
from transact_core.forward.waists import MODULES

SIZES_SHOWN = ("parameters", "kv_bytes_per_token", "flops_per_token")


def step(number: int, question: str, answer: str) -> None:
    st.subheader(f"{number}. {question}", anchor=False)
    st.write(answer)


def links(*names: str) -> None:
    with st.container(horizontal=True, gap="small"):
        for name in names:
            link(name)


def show_waste(told: Example) -> None:
    found = told.concentration
    step(
        1,
        "Where is the waste?",
        "In every layer the signal passes two waists: the outputs of the attention heads, and the "
        "activation inside the MLP. Its energy is not spread evenly over their width.",
    )
    shares = {module: np.array(getattr(found, module)) for module in MODULES}
    show(
        charts.concentration(shares, found.share),
        "example-concentration",
        f"a pair of bars is a layer, a bar the share of a waist's channels that hold "
        f"{found.share:.0%} of its energy; what is above it is width that carries little.",
        lambda: pd.DataFrame({"mha": found.mha, "mlp": found.mlp}).rename_axis("layer"),
        narrow=True,
    )
    links("activations", "importance", "heads", "redundancy")


def show_cut(told: Example) -> None:
    dense, left = told.architecture, told.left
    heads = f"{left.num_attention_heads} of {dense.num_attention_heads} heads"
    channels = f"{left.intermediate_size:,} of {dense.intermediate_size:,} channels"
    step(
        2,
        "What may I cut?",
        "Width at the waists: here each layer gives up heads and MLP channels of its own. The "
        "residual stream between the modules, the norms and the embeddings stay whole.",
    )
    show(
        waist_chart.section(dense, left, f"{heads}, {channels} stay", 380),
        "example-section",
        "one layer from left to right, all widths to scale: each module reads the stream, passes "
        "its waist and adds what it writes; grey is what goes.",
    )
    with st.container(horizontal=True, gap="medium"):
        link("compress", "Open this very cut on the Compress page", **told.address)
        link("premise")


def show_cost(told: Example) -> None:
    alone = sum(not (p.plan.mha_ratio and p.plan.mlp_ratio) for p in told.points)
    step(
        3,
        "What will it cost me?",
        "Sizes are exact before anything is cut. Perplexity is predicted from what each layer "
        f"alone would lose and from what was measured: here {alone} cuts of one module, and none "
        "of both.",
    )
    before, after, said = told.dense.footprint, told.cut.footprint, told.predicted
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
    dense = told.dense.perplexity
    columns[-1].metric(
        "Perplexity, predicted",
        f"{said.mid * dense:.2f}",
        f"{said.low * dense:.2f} to {said.high * dense:.2f}",
        delta_color="off",
        delta_arrow="off",
        border=True,
        help="The interval is meant for 9 cuts in 10.",
    )


def show_truth(told: Example) -> None:
    dense, cut = told.dense.perplexity, told.cut
    inside = told.predicted.low <= cut.perplexity / dense <= told.predicted.high
    step(
        4,
        "Was that true?",
        "The cut was made, what is left was repaired in closed form on "
        f"{told.calibration.tokens:,} tokens of text, and perplexity measured on "
        f"{told.evaluation.tokens:,} others. It came out {'inside' if inside else 'outside'} what "
        "was predicted.",
    )
    figures = {
        "Perplexity, dense": (dense, "nothing cut"),
        "Perplexity, measured": (cut.perplexity, f"{times_dense(cut)} the dense model's"),
        "Without the repair": (told.bare.perplexity, f"{told.bare.perplexity / dense:.0f} ×"),
    }
    for column, (label, (value, note)) in zip(st.columns([1, 2, 1]), figures.items(), strict=True):
        column.metric(
            label, f"{value:.2f}", note, delta_color="off", delta_arrow="off", border=True
        )
    mine = asked_by(told.asked, points()) if visit().request == Request() else None
    if mine is not None:
        st.success(f"You measured this cut on this machine: {mine.perplexity:.2f}.")
    widths = told.architecture.mha_width, told.architecture.intermediate_size
    show(
        curve_chart.perplexity_curve(told.points, told.dense, widths, logarithmic=True),
        "example-curve",
        "the further right, the more width is gone; the higher, the worse the model predicts the "
        f"text. Bars are 95 % intervals of the difference from the dense model, over "
        f"{told.scored_tokens:,} scored tokens.",
        lambda: curve_chart.points_table(told.points),
    )
    links("perplexity", "compare", "latency")


def show_result(told: Example) -> None:
    step(
        5,
        "Give it to me.",
        "What comes out is an ordinary checkpoint that stock `transformers` loads, with a "
        "configuration that makes it again and a report for a colleague. The Export page writes "
        "it; so does the command line:",
    )
    st.code(
        f"python -m transact_core prune --model {told.model.source} "
        f"--mha-ratio {told.asked.mha_ratio:g} --mlp-ratio {told.asked.mlp_ratio:g} --output out",
        language="bash",
        wrap_lines=True,
    )
    links("export", "method")


def show_turn() -> None:
    step(
        6,
        "Your turn.",
        "The sidebar takes your model and your texts, and the pages above do the same with them, "
        "computed on this machine.",
    )
    show_opening()


def show_recording(told: Example) -> None:
    made = told.environment
    packages = ", ".join(f"{name} {version}" for name, version in made.packages.items())
    with st.expander("How these numbers were made"):
        st.code(told.command, language="bash")
        st.markdown(
            f"- **When and where**: {told.recorded:%d %B %Y, %H:%M %Z}, {told.processor}, "
            f"{counted(made.threads, 'thread')} on {counted(told.cores, 'core')}, {made.device}, "
            f"{made.dtype}, {made.cpu_capability}\n"
            f"- **Model**: {told.name}\n"
            f"- **Text**: {told.text}, {told.calibration.tokens:,} tokens to calibrate and "
            f"{told.evaluation.tokens:,} others to evaluate, windows of {told.sequence_length}\n"
            f"- **Choices**: {told.asked.granularity}, {told.asked.importance}, "
            f"{told.asked.recovery}\n"
            f"- **Packages**: {packages}\n"
            f"- **SHA-256**: weights `{', '.join(told.model.weight_files.values())}`, calibration "
            f"`{told.calibration.sha256}`, evaluation `{told.evaluation.sha256}`"
        )


# First of all, since it leads those back to the app who come by this page's own address.
visit()
told = example()
st.title("Start here")
st.write(
    "This workbench takes width out of a LLaMA-family model, repairs what is left without any "
    "training, and shows what that costs. Here is one cut of the built-in model "
    f"{told.name}, in the order in which one would ask."
)
st.caption(
    f":material/history: The numbers on this page are **recorded**: measured on "
    f"{told.recorded:%d %B %Y} on another machine or at another time ({told.processor}, "
    f"{counted(told.environment.threads, 'thread')}). All other pages compute on this machine."
)
left, right = st.columns(2, gap="large")
with left:
    show_waste(told)
with right:
    show_cut(told)
show_cost(told)
show_truth(told)
show_result(told)
show_turn()
show_recording(told)
