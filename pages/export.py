"""Take a cut away: its configuration, its checkpoint, the command that makes it again."""

from dataclasses import astuple
from datetime import datetime
from pathlib import Path

import streamlit as st

from pages.shared.cuts import choose_cut
from pages.shared.jobs import DONE
from pages.shared.progress import require_bench, require_prepared, show_job
from pages.shared.report import make_report
from pages.shared.side_by_side import last_latency
from pages.shared.workbench import Cut, find_point, identity, points, start_export, visit
from transact_core.bench import Bench, Choices
from transact_core.export import apply_command, describe_compression, reproduce_command
from transact_core.plan import PruningPlan


def show_configuration(bench: Bench, cut: Cut) -> None:
    st.subheader("Configuration")
    st.write(
        "`compression.json` holds every choice: which heads, dims and channels stay, the texts "
        "and the weights by their fingerprints. It makes the checkpoint again, on this machine bit "
        "for bit."
    )
    plan = bench.plan(cut.mha_ratio, cut.mlp_ratio, cut.choices)
    compression = describe_compression(bench, plan, cut.recovery)
    with st.container(horizontal=True):
        st.download_button(
            "compression.json", compression.to_json(), "compression.json", "application/json",
            icon=":material/download:", type="primary", on_click="ignore",
        )  # fmt: skip
        offer_report(bench, plan, cut.recovery)
    st.write("With the file:")
    st.code(apply_command(), language="bash", wrap_lines=True)
    st.write("Without it, from the ratios:")
    st.code(reproduce_command(compression), language="bash", wrap_lines=True)
    if not plan.cuts_anything(bench.loaded.architecture):
        st.info("Nothing is cut at these ratios: this is the dense model.")


def offer_report(bench: Bench, plan: PruningPlan, recovery: str) -> None:
    measured, point, timed = list(points()), find_point(plan, recovery), last_latency()
    if timed and identity(timed.plan, timed.cut.recovery) != identity(plan, recovery):
        timed = None

    def make() -> bytes:
        now = datetime.now().astimezone()
        return make_report(bench, plan, recovery, point, measured, timed, now).encode()

    st.download_button(
        "Report", make, "report.html", "text/html", icon=":material/description:",
        on_click="ignore", help="One HTML page that explains this cut to a colleague: its charts "
        "work without a network."
        + ("" if point else " This cut is not measured yet, and the report says so."),
    )  # fmt: skip


def write_checkpoint(bench: Bench, cut: Cut) -> None:
    st.subheader("Checkpoint")
    plan = bench.plan(cut.mha_ratio, cut.mlp_ratio, cut.choices)
    size = bench.footprint(plan, cut.recovery).weight_bytes
    st.write(
        f"A folder of {size / 1e6:,.0f} MB that stock `transformers` loads, with the tokenizer, "
        "`compression.json`, `report.json` and a model card."
    )
    name = f"{bench.loaded.name}-mha{cut.mha_ratio * 100:.0f}-mlp{cut.mlp_ratio * 100:.0f}"
    usual = astuple(Choices())
    name += "".join(f"-{each}" for each in astuple(cut.choices) if each not in usual)
    folder = st.text_input(
        "Folder on the machine that runs this app", str(Path.home() / "transact" / name),
        key=f"folder-{name}", help="New or empty; it appears whole or not at all.",
    )  # fmt: skip
    busy = show_job("export")
    mine = visit()
    if mine.job and mine.job.state == DONE and isinstance(mine.job.result, Path):
        st.success(f"Written to {mine.job.result}", icon=":material/check_circle:")
        st.code(
            "from transformers import AutoModelForCausalLM\n"
            f'model = AutoModelForCausalLM.from_pretrained("{mine.job.result}")',
            language="python",
        )
    if not busy and st.button("Write the checkpoint", type="primary", disabled=not folder.strip()):
        start_export(bench, cut, Path(folder.strip()).expanduser())
        st.rerun()
    if find_point(plan, cut.recovery) is None:
        st.caption("This cut is not measured yet; writing it measures it too.")


st.title("Export")
bench = require_bench()
cut = choose_cut(bench)
if not require_prepared(bench, cut.choices, "export"):
    st.stop()
left, right = st.columns(2, gap="large")
with left:
    show_configuration(bench, cut)
with right:
    write_checkpoint(bench, cut)
