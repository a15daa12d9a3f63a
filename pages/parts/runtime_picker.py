"""The switch between transformers and llama.cpp on the pages that measure."""

import streamlit as st

from pages.server.gguf_files import llama_cpp_missing
from transact_core.export.gguf_types import QUANTIZATIONS

TRANSFORMERS, LLAMA_CPP = "transformers", "llama.cpp"
USUAL = "Q4_K_M"


def choose_runtime(key: str) -> str | None:
    """The type of the GGUF files that llama.cpp runs; None for transformers."""
    left, right, _ = st.columns([3, 2, 5], vertical_alignment="bottom")
    runtime = left.segmented_control(
        "Runtime",
        [TRANSFORMERS, LLAMA_CPP],
        default=TRANSFORMERS,
        required=True,
        key=f"{key}_runtime",
        persist_state="session",
        help="llama.cpp runs both models as GGUF files of one type, as a phone or a laptop would.",
    )
    if runtime != LLAMA_CPP:
        return None
    return right.selectbox(
        "Type",
        list(QUANTIZATIONS),
        list(QUANTIZATIONS).index(USUAL),
        key=f"{key}_type",
        persist_state="session",
        help="From the largest to the smallest. Below Q8_0 with an importance matrix.",
    )


def usable(quantization: str | None) -> bool:
    """Whether the runtime can be used; a sentence where llama.cpp is not installed."""
    missing = llama_cpp_missing() if quantization else None
    if missing:
        st.info(missing, icon=":material/info:")
    return not missing
