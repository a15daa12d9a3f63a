"""What is shown while torch and transformers are imported, in the first seconds of a server."""

import gc

import streamlit as st
from streamlit.navigation.page import StreamlitPage

from pages.parts.navigation import drawn_before_libraries
from pages.server import libraries

SECONDS_BETWEEN_LOOKS = 0.5
DRAWN = "first page drawn"
"""Key of the session state."""


def show_loading(page: StreamlitPage) -> None:
    """Draws what can be drawn; then the imports begin, and their end draws the app anew."""
    with st.sidebar:
        st.caption(
            ":material/hourglass_top: Loading PyTorch and transformers. Models and texts are "
            "chosen here in a few seconds."
        )
    if drawn_before_libraries(page):
        page.run()
    else:
        st.title(page.title)
        st.info(
            "PyTorch and transformers are being loaded. It takes a few seconds, once after the "
            "start of the server.",
            icon=":material/hourglass_top:",
        )
    if failure := libraries.failure():
        st.error(
            f"PyTorch and transformers could not be imported ({failure}). Install them "
            "anew, with `make setup` in a clone or with pip, and try again; if it fails once more, "
            "start the app again.",
            icon=":material/error:",
        )
        st.button(
            "Try again", key="import again", icon=":material/refresh:", on_click=libraries.start
        )
        return
    _await_libraries()


@st.fragment(run_every=SECONDS_BETWEEN_LOOKS)
def _await_libraries() -> None:
    # Looked at before anything is begun: imports that failed are not tried again by themselves.
    if libraries.loaded() or libraries.failure():
        st.rerun()
    # The browser asks for the second run once it has drawn the first. Begun before, the imports
    # would hold up the scripts that it fetches to draw charts.
    if DRAWN in st.session_state:
        libraries.start()
    st.session_state[DRAWN] = True
    # Streamlit collects garbage after each run of a fragment. To look through all that was imported
    # so far would take longer each time, and the imports would wait for it.
    gc.freeze()
