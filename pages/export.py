"""The Export page: the configuration of a cut, its checkpoint, and commands that reproduce it."""

from datetime import datetime

import streamlit as st

from pages.charts.text import plain
from pages.parts.cut_picker import require_cut
from pages.parts.progress import estimate_in_words, show_job
from pages.report import make_report
from pages.server.estimates import cuts_seconds
from pages.server.jobs import DONE
from pages.server.points import find_cut, find_point, plan_at
from pages.server.request import Cut, choices_in_name
from pages.server.settings import settings
from pages.server.side_by_side import last_latency
from pages.server.start_jobs import start_export
from pages.server.task_runs import tasks_of
from pages.server.visits import points, visit
from transact_core.base.files import expanded
from transact_core.experiments.bench import Bench
from transact_core.export.compression import apply_command, describe_compression, reproduce_command
from transact_core.export.folder import model_class_of
from transact_core.export.runtimes import block_advice, readings_of_cut
from transact_core.models.stock_class import explanation
from transact_core.pruning.plan import Decision


def show_configuration(bench: Bench, cut: Cut) -> None:
    st.subheader("Configuration")
    st.write(
        "`compression.json` holds every choice: which heads, dims and channels are kept, and the "
        "fingerprints of the texts and weights. It reproduces the checkpoint, on this machine bit "
        "for bit."
    )
    decision = find_cut(bench, cut)
    if decision is None:
        st.info(
            "With `auto`, several steps or a sequential choice, what a cut keeps is decided when "
            "it is measured. Measure it on the Compress page, or write the checkpoint.",
            icon=":material/info:",
        )
        return
    plan = decision.plan
    compression = describe_compression(bench, decision, cut.recovery)
    with st.container(horizontal=True):
        st.download_button(
            "compression.json",
            compression.to_json(),
            "compression.json",
            "application/json",
            icon=":material/download:",
            type="primary",
            on_click="ignore",
        )
        offer_report(bench, decision, cut.recovery)
    st.write("To reproduce it from the file:")
    st.code(apply_command(), language="bash", wrap_lines=True)
    st.write("To reproduce it from the ratios, without the file:")
    st.code(reproduce_command(compression), language="bash", wrap_lines=True)
    if decision.why:
        st.caption(decision.why)
    if not plan.cuts_anything(bench.loaded.architecture):
        st.info("Nothing is cut at these ratios: this is the dense model.")


def offer_report(bench: Bench, decision: Decision, recovery: str) -> None:
    """The button that downloads the report, with the latest times if they are of this cut."""
    plan = decision.plan
    measured, point, timed = list(points()), find_point(plan, recovery), last_latency()
    tasks = tasks_of(plan, recovery)
    if timed and not timed.is_of(plan, recovery):
        timed = None

    def make() -> bytes:
        now = datetime.now().astimezone()
        return make_report(bench, decision, recovery, point, measured, timed, now, tasks).encode()

    st.download_button(
        "Report",
        make,
        "report.html",
        "text/html",
        icon=":material/description:",
        on_click="ignore",
        help="One HTML file that explains this cut to a colleague. Its charts "
        "work without a network."
        + ("" if point else " This cut is not measured yet, and the report says so."),
    )


def show_other_runtimes(bench: Bench, cut: Cut, decision: Decision | None) -> None:
    """Which runtimes other than transformers read this cut correctly, and which do not."""
    if cut.granularity == "auto" and decision is None:
        st.caption("Which other runtimes can read it depends on the granularity that `auto` takes.")
        return
    loaded, plan = bench.loaded, plan_at(bench, cut, decision)
    biases = cut.recovery == "bias"
    model_class = model_class_of(bench, plan, cut.recovery)
    if reason := explanation(model_class, loaded.model.config.model_type):
        st.caption(f"Saved as a stock `{model_class}`, {reason}.")
    unknown = loaded.tokenizer.unk_token is not None
    for reading in readings_of_cut(plan, loaded.architecture, loaded.model.config, biases, unknown):
        match reading.outcome:
            case "same":
                st.caption(f":material/check: {reading.sentence}")
            case "refused" | "unknown":
                st.info(reading.sentence, icon=":material/block:")
            case "misread":
                st.warning(reading.sentence, icon=":material/warning:")


def show_blocks(bench: Bench, cut: Cut, decision: Decision | None) -> None:
    """Advice on `multiple_of` if llama.cpp's block quantisations cannot take the widths."""
    advice = block_advice(plan_at(bench, cut, decision), bench.loaded.architecture)
    if advice:
        st.info(advice, icon=":material/grid_on:")


def write_checkpoint(bench: Bench, cut: Cut) -> None:
    st.subheader("Checkpoint")
    decision = find_cut(bench, cut)
    tasks = tasks_of(decision.plan, cut.recovery) if decision else None
    size = "A folder"
    if decision:
        size += f" of {bench.footprint(decision.plan, cut.recovery).weight_bytes / 1e6:,.0f} MB"
    st.write(
        f"{size} that stock `transformers` loads, with the tokenizer, "
        "`compression.json`, `report.json` and a model card."
        + (" What the cut answered on the Tasks page goes into both." if tasks else "")
    )
    show_other_runtimes(bench, cut, decision)
    show_blocks(bench, cut, decision)
    name = f"{bench.loaded.name}-mha{cut.mha_ratio * 100:.0f}-mlp{cut.mlp_ratio * 100:.0f}"
    name += choices_in_name(cut.choices)
    folder = st.text_input(
        "Folder on the machine that runs this app",
        str(settings().export_folder / name),
        key=f"folder-{name}",
        help="A new or empty folder. The checkpoint appears there once it is complete.",
    )
    about = ("export", visit().request)
    busy = show_job(*about)
    job = visit().latest_job(about)
    if job and job.state == DONE:
        st.success(f"Written to {plain(job.result)}", icon=":material/check_circle:")
        st.code(
            "from transformers import AutoModelForCausalLM\n"
            f"model = AutoModelForCausalLM.from_pretrained({str(job.result)!r})",
            language="python",
        )
    if not busy and st.button("Write the checkpoint", type="primary", disabled=not folder.strip()):
        start_export(cut, expanded(folder.strip()), tasks.report() if tasks else None)
        st.rerun()
    if not busy and (decision is None or find_point(decision.plan, cut.recovery) is None):
        seconds = cuts_seconds(bench, visit().request, [cut.ratios], cut.choices)
        st.caption(
            "This cut is not measured yet. Writing the checkpoint also measures it, which takes "
            f"{estimate_in_words(seconds)}."
        )


st.title("Export")
bench, cut = require_cut("export")
left, right = st.columns(2, gap="large")
with left:
    show_configuration(bench, cut)
with right:
    write_checkpoint(bench, cut)
