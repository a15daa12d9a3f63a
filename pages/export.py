"""The Export page: a cut's configuration, checkpoint and GGUF file, and its publication."""

from datetime import datetime
from pathlib import Path

import streamlit as st

from pages.charts import plan_charts
from pages.charts.text import counted, plain
from pages.parts.cut_picker import require_cut
from pages.parts.figure import show
from pages.parts.progress import SOON, estimate_in_words, show_job, watch
from pages.parts.runtime_picker import USUAL
from pages.report import make_report
from pages.server.estimates import cuts_seconds
from pages.server.gguf_files import (
    llama_cpp_missing,
    sizes_job,
    start_gguf,
    start_publication,
    uses_own_login,
)
from pages.server.jobs import DONE
from pages.server.points import find_cut, find_point, plan_at
from pages.server.request import Cut, choices_in_name
from pages.server.settings import settings
from pages.server.side_by_side import last_latency
from pages.server.start_jobs import start_export
from pages.server.task_runs import tasks_of
from pages.server.visits import points, visit
from pages.server.written import written_of
from transact_core.base.files import expanded
from transact_core.experiments.bench import Bench
from transact_core.export.compression import apply_command, describe_compression, reproduce_command
from transact_core.export.folder import model_class_of
from transact_core.export.gguf_types import QUANTIZATIONS
from transact_core.export.modeling_file import FILE
from transact_core.export.runtimes import block_advice, readings_of_cut
from transact_core.models.llama_cpp import runtime_name
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
            "With `auto`, several steps, a sequential choice, or widths that are allocated or "
            "traded, what a cut keeps is decided when it is measured. Measure it on the Compress "
            "page, or write the checkpoint.",
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
    for sentence in filter(None, (decision.why, decision.how_allocated)):
        st.caption(sentence)
    if not plan.cuts_anything(bench.loaded.architecture):
        st.info("Nothing is cut at these ratios: this is the dense model.")


def offer_report(bench: Bench, decision: Decision, recovery: str) -> None:
    """The button that downloads the report, with the latest times if they are of this cut."""
    plan = decision.plan
    measured, point, timed = list(points()), find_point(plan, recovery), last_latency()
    tasks = tasks_of(plan, recovery)
    if timed and (timed.quantization or not timed.is_of(plan, recovery)):
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
    own, modeling_file = has_own_widths(bench, cut, decision), False
    loads = "of safetensors" if own else "that stock `transformers` loads"
    st.write(
        f"{size} {loads}, with the tokenizer, `compression.json`, `report.json` and a model card."
        + (" What the cut answered on the Tasks page goes into both." if tasks else "")
    )
    if own:
        st.warning(
            "The layers of this cut have widths of their own, which `config.json` says by "
            "transformers' `per_layer_config`. **Stock transformers 5.23 does not load it by "
            "itself**; this program does, and a GGUF file of it runs in stock llama.cpp.",
            icon=":material/stacked_bar_chart:",
        )
        modeling_file = st.toggle(
            "Add code for other programs",
            key="modeling-file",
            help=f"`{FILE}`, with which transformers loads the folder under "
            "`trust_remote_code=True`. Where all layers keep as many query heads, `config.json` "
            "also gets the `block_configs` that vLLM's DeciLM reads.",
        )
        if decision is not None:
            show(
                plan_charts.layer_widths(decision.plan, bench.loaded.architecture),
                "layer-widths",
                "each pair of bars is a layer; what is missing to 100 % is removed.",
                lambda: plan_charts.widths_table(decision.plan, bench.loaded.architecture),
            )
    show_other_runtimes(bench, cut, decision)
    show_blocks(bench, cut, decision)
    name = name_of(bench, cut)
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
        st.code(loading_code(bench, job.result), language="python")
    if not busy and st.button("Write the checkpoint", type="primary", disabled=not folder.strip()):
        report = tasks.report() if tasks else None
        start_export(cut, expanded(folder.strip()), report, modeling_file)
        st.rerun()
    if not busy and (decision is None or find_point(decision.plan, cut.recovery) is None):
        seconds = cuts_seconds(bench, visit().request, [cut.ratios], cut.choices)
        st.caption(
            "This cut is not measured yet. Writing the checkpoint also measures it, which takes "
            f"{estimate_in_words(seconds)}."
        )


def has_own_widths(bench: Bench, cut: Cut, decision: Decision | None) -> bool:
    """Whether layers differ, or will where that is not decided yet."""
    if decision is None:
        return cut.allocates
    return not decision.plan.applied_to(bench.loaded.architecture).uniform


def loading_code(bench: Bench, folder: Path) -> str:
    """The lines of Python that load a checkpoint that was written here."""
    places = written_of().folders
    cuts = [point.plan for point in points() if places.get(point.identity) == folder]
    if any(not plan.applied_to(bench.loaded.architecture).uniform for plan in cuts):
        return (
            "from transact_core.models.load import load_model\n"
            f"model = load_model({str(folder)!r}).model"
        )
    return (
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})"
    )


def name_of(bench: Bench, cut: Cut) -> str:
    """The name of a cut's folder and files."""
    ratios = f"mha{cut.mha_ratio * 100:.0f}-mlp{cut.mlp_ratio * 100:.0f}"
    return f"{bench.loaded.name}-{ratios}{choices_in_name(cut.choices)}"


def write_gguf(bench: Bench, cut: Cut) -> None:
    """Type, size and fallbacks of a GGUF file, all told before, and the button that writes it."""
    st.subheader("GGUF file")
    st.write("One file that stock llama.cpp runs, on a phone or a laptop, in any of its types.")
    missing = llama_cpp_missing()
    if missing:
        st.info(
            missing + " Without it, files are written in F32, F16 and BF16 only, and none "
            "is measured.",
            icon=":material/info:",
        )
    left, right = st.columns([2, 3], vertical_alignment="bottom")
    types = [name for name, kind in QUANTIZATIONS.items() if kind.is_float or not missing]
    chosen = left.selectbox(
        "Type",
        types,
        types.index(USUAL) if USUAL in types else types.index("F16"),
        key="gguf_type",
        persist_state="session",
        help="From the largest to the smallest.",
    )
    wants = QUANTIZATIONS[chosen].wants_imatrix
    imatrix = right.toggle(
        "Importance matrix",
        value=wants,
        disabled=not wants,
        key=f"imatrix_{wants}",
        help="Weighs each weight's rounding by how large its input is on the calibration windows. "
        "On by default below Q8_0."
        if wants
        else "Types from Q8_0 up hardly round, and take none.",
    )
    show_sizes(bench, cut, chosen, imatrix or not wants)
    name = name_of(bench, cut)
    path = st.text_input(
        "File on the machine that runs this app",
        str(settings().export_folder / f"{name}-{chosen}.gguf"),
        key=f"gguf-{name}-{chosen}",
        help="A new file. It appears once it is complete.",
    )
    about = ("gguf", visit().request)
    busy = show_job(*about)
    job = visit().latest_job(about)
    if job and job.state == DONE:
        file, perplexity = job.result
        words = f"Written to {plain(file.path)}, {file.bytes:,} bytes"
        if perplexity is not None:
            words += f", perplexity {perplexity:.2f} in {plain(runtime_name())}"
        st.success(words, icon=":material/check_circle:")
    if not busy and st.button("Write the file", type="primary", disabled=not path.strip()):
        start_gguf(cut, chosen, name, imatrix, expanded(path.strip()))
        st.rerun()


def show_sizes(bench: Bench, cut: Cut, chosen: str, with_imatrix: bool) -> None:
    """What a file of each type weighs, to the byte, and what does not fit the chosen one."""
    decision = find_cut(bench, cut)
    if decision is None:
        st.caption("The sizes are known once this cut is measured.")
        return
    job = sizes_job(decision.plan, cut.recovery, name_of(bench, cut), with_imatrix)
    if not job.wait(SOON):
        watch("gguf-sizes", job)
        return
    if job.refused:
        st.info(plain(job.error), icon=":material/block:")
        return
    if job.state != DONE:
        st.error(plain(job.error or "The sizes were not worked out."), icon=":material/error:")
        return
    files = {file.quantization: file for file in job.result}
    mine = files[chosen]
    st.write(
        f"**{mine.bytes / 1e6:,.1f} MB** ({mine.bytes:,} bytes), of which embedding and LM head, "
        f"which pruning leaves as they are, take {mine.embedding_bytes / 1e6:,.1f} MB."
    )
    for fallback in mine.fallbacks:
        st.caption(f":material/warning: {fallback.sentence}")
    with st.expander("All types"):
        rows = [
            {
                "type": file.quantization,
                "MB": file.bytes / 1e6,
                "tensors in a larger type": sum(each.tensors for each in file.fallbacks),
                "MB more for that": sum(each.bytes_more for each in file.fallbacks) / 1e6,
                "mended by": ", ".join(
                    dict.fromkeys(each.mend for each in file.fallbacks if each.mend)
                ),
            }
            for file in files.values()
        ]
        number = st.column_config.NumberColumn(format="%.1f")
        st.dataframe(
            rows, hide_index=True, column_config={"MB": number, "MB more for that": number}
        )


def publish(bench: Bench, cut: Cut) -> None:
    """The button that puts the folder and the files of this cut on the model hub."""
    st.subheader("Publish")
    st.write("The folder and the GGUF files of this cut, in one commit to the model hub.")
    decision = find_cut(bench, cut)
    point = find_point(decision.plan, cut.recovery) if decision else None
    folder = written_of().folders.get(point.identity) if point else None
    busy = show_job("publish", visit().request)
    job = visit().latest_job(("publish", visit().request))
    if job and job.state == DONE:
        count = counted(len(job.result.files), "file")
        st.success(
            f"{count}, {job.result.bytes / 1e6:,.1f} MB, published at {plain(job.result.address)}",
            icon=":material/check_circle:",
        )
    if folder is None or not folder.is_dir():
        st.info("Write the checkpoint of this cut first.", icon=":material/info:")
        return
    files = written_of().files_of(point.identity)
    named = [f"the folder {folder.name}", *(path.name for path in files)]
    st.caption(f"What goes up: {plain(', '.join(named))}.")
    repository = st.text_input("Repository", key="hub_repository", placeholder="OWNER/NAME")
    own = uses_own_login()
    token = st.text_input(
        "Token of the hub" + (" (blank: this machine's login)" if own else ""),
        type="password",
        key="hub_token",
        autocomplete="off",
        help="One that may write. It is used for this and kept nowhere.",
    )
    public = st.toggle(
        "Public", key="hub_public", help="For a new repository; one that exists stays as it is."
    )
    ready = repository.strip() and (own or token.strip())
    if not busy and st.button("Publish", icon=":material/cloud_upload:", disabled=not ready):
        start_publication(point, repository.strip(), token.strip() or None, public)
        st.rerun()


st.title("Export")
bench, cut = require_cut("export")
left, right = st.columns(2, gap="large")
with left:
    show_configuration(bench, cut)
with right:
    write_checkpoint(bench, cut)
st.divider()
left, right = st.columns(2, gap="large")
with left:
    write_gguf(bench, cut)
with right:
    publish(bench, cut)
