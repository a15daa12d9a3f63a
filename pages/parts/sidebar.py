"""The sidebar: which model, which texts and how much of them; what is open; this visitor's jobs."""

from pathlib import Path

import streamlit as st
import torch

from pages.charts.text import plain
from pages.parts.progress import show_jobs
from pages.server.open_models import workbench
from pages.server.request import Request
from pages.server.settings import settings
from pages.server.uploads import KINDS, keep_upload
from pages.server.visits import visit
from transact_core.base.errors import TransActError
from transact_core.data.corpus import BUILTIN_CODE, BUILTIN_TEXT
from transact_core.experiments import results
from transact_core.models.load import BUILTIN, BUILTIN_NAME

MODEL_KINDS = {
    "Built-in": ("", ""),
    "Local folder": ("Checkpoint folder", "/path/to/checkpoint"),
    "GGUF file": ("GGUF file", "/path/to/model.gguf"),
    "Hub id": ("Hub id", "owner/name"),
}
"""For each kind of model source the label of its text field and an example."""
TEXT_KINDS = {"Built-in": BUILTIN_TEXT, "Built-in code": BUILTIN_CODE}
"""The built-in texts by what they are called."""
UPLOAD, DATASET, NONE = "Uploaded file", "Hub dataset", "None"
OTHER_TEXTS = ("Second evaluation", "Third evaluation")
"""Further texts that perplexity is measured on."""


def model_kind(model: str) -> str:
    """Which of `MODEL_KINDS` a model source is."""
    if model == BUILTIN:
        return "Built-in"
    if model.endswith(".gguf"):
        return "GGUF file"
    return "Local folder" if Path(model).is_dir() else "Hub id"


def text_kind(source: str) -> str:
    """What a text source is called; an empty one is none."""
    for kind, builtin in TEXT_KINDS.items():
        if source == builtin:
            return kind
    if not source:
        return NONE
    return DATASET if source.startswith("hub:") else UPLOAD


def choose_model(before: str) -> str:
    """The model that the widgets name; empty where they name none yet."""
    kinds, kind_before = list(MODEL_KINDS), model_kind(before)
    kind = st.selectbox(
        "Model", kinds, kinds.index(kind_before), key="model_kind", persist_state="session"
    )
    if kind == "Built-in":
        st.caption(f"{BUILTIN_NAME}, installed with the app")
        return BUILTIN
    label, example = MODEL_KINDS[kind]
    return st.text_input(
        label,
        before if kind == kind_before else "",
        key=f"model_{kind}",
        placeholder=example,
        persist_state="session",
    )


def choose_text(name: str, before: str, optional: bool = False) -> str | None:
    """The text that the widgets name; empty where they name none yet, None where none is wanted."""
    kind_before = text_kind(before)
    kinds = [*([NONE] if optional else []), *TEXT_KINDS, UPLOAD, DATASET]
    kind = st.selectbox(
        f"{name} text",
        kinds,
        kinds.index(kind_before),
        key=f"{name}_kind",
        persist_state="session",
        help="Every cut is measured on it too. A repair that was fitted on one kind of text can "
        "ruin another, so choose one that differs from the calibration text."
        if optional
        else None,
    )
    if kind == NONE:
        return None
    if kind in TEXT_KINDS:
        return TEXT_KINDS[kind]
    if kind == DATASET:
        dataset = st.text_input(
            f"{name} dataset",
            before.removeprefix("hub:") if kind == kind_before else "",
            placeholder="DATASET:CONFIG:SPLIT:COLUMN",
            help="As `wikitext:wikitext-2-raw-v1:test`; all but the dataset may be left out.",
            key=f"{name}_dataset",
            persist_state="session",
        )
        return f"hub:{dataset}" if dataset else ""
    file = st.file_uploader(f"{name} file", type=list(KINDS), key=f"{name}_file")
    if file is not None:
        try:
            path = keep_upload(file.name, file.getvalue(), settings().uploads_mb)
        except TransActError as error:
            st.error(str(error))
        else:
            st.session_state[f"{name}_path"] = path
    return st.session_state.get(f"{name}_path", before if kind == kind_before else "")


def choose_request() -> Request:
    """The request as the widgets have it."""
    defaults = visit().began_with
    model = choose_model(defaults.model)
    calibration = choose_text("Calibration", defaults.calibration)
    evaluation = choose_text("Evaluation", defaults.evaluation)
    if calibration == evaluation:
        st.caption(
            "Both come from one text: evaluation takes its beginning, calibration what follows."
        )
    others = []
    for place, name in enumerate(OTHER_TEXTS):
        before = defaults.others[place] if place < len(defaults.others) else ""
        other = choose_text(name, before, optional=True)
        if other is None:
            break
        others.append(other)
    with st.expander("How much, and on what"):
        calibration_tokens = st.number_input(
            "Calibration tokens",
            64,
            10_000_000,
            defaults.calibration_tokens,
            1024,
            key="calibration_tokens",
            persist_state="session",
        )
        evaluation_tokens = st.number_input(
            "Evaluation tokens",
            64,
            10_000_000,
            defaults.evaluation_tokens,
            1024,
            key="evaluation_tokens",
            persist_state="session",
        )
        sequence_length = st.number_input(
            "Sequence length",
            16,
            131_072,
            defaults.sequence_length,
            128,
            key="sequence_length",
            persist_state="session",
        )
        devices = ["auto", "cpu"]
        if torch.cuda.is_available():
            devices += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        device = st.selectbox(
            "Device",
            devices,
            devices.index(defaults.device),
            key="device",
            persist_state="session",
        )
        dtypes = ["auto", "float32", "bfloat16", "float16"]
        dtype = st.selectbox(
            "Dtype",
            dtypes,
            dtypes.index(defaults.dtype),
            key="dtype",
            help="auto computes in float32 on a CPU and in bfloat16 on a GPU.",
            persist_state="session",
        )
    return Request(
        model=model.strip(),
        device=device,
        dtype=dtype,
        calibration=calibration,
        evaluation=evaluation,
        calibration_tokens=int(calibration_tokens),
        evaluation_tokens=int(evaluation_tokens),
        sequence_length=int(sequence_length),
        others=tuple(others),
    )


def show_sidebar() -> None:
    """The controls, what is open, and the jobs; what is chosen is opened when Load is pressed."""
    mine = visit()
    chosen = choose_request()
    complete = chosen.model and all((chosen.calibration, chosen.evaluation, *chosen.others))
    changed = chosen != mine.request
    if st.button(
        "Load",
        type="primary" if changed and complete else "secondary",
        width="stretch",
        disabled=not (changed and complete),
    ):
        mine.request = chosen
        st.rerun()
    if changed:
        st.caption(
            "Press **Load** to use these choices." if complete else "Name the model and the texts."
        )
    opened = workbench().open(mine.request).bench.result
    if opened is not None:
        shape, loaded = opened.loaded.architecture, opened.loaded
        st.divider()
        with st.container(gap="xxsmall"):
            st.text(loaded.name)
            st.caption(
                f"{shape.parameters / 1e6:,.1f} M parameters · {shape.num_hidden_layers} layers · "
                f"hidden {shape.hidden_size:,} · {shape.num_attention_heads} heads over "
                f"{shape.num_key_value_heads} KV heads of {shape.head_dim} · MLP "
                f"{shape.intermediate_size:,} · computing in {str(loaded.dtype)[6:]} on "
                f"{loaded.device}"
            )
        for notice in opened.notices:
            st.warning(plain(notice))
    for notice in results.notices:
        st.warning(plain(notice))
    show_jobs()
