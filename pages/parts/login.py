"""The login form; nothing of the app is computed or shown before `require_access` returns."""

from collections.abc import Sequence

import streamlit as st
from streamlit.navigation.page import StreamlitPage

from pages.server.access import caller, gate, user_of_header, user_of_login
from pages.server.settings import Settings, exposure, settings
from pages.server.visits import visitor_id
from transact_core.base.errors import TransActError


def require_access(pages: Sequence[StreamlitPage]) -> str | None:
    """Ends the run at a form or an error, unless the visitor has given everything asked for.

    Returns:
        The identity of the user whom the proxy or the login names; None where neither is set up.
    """
    try:
        allowed = settings()
    except TransActError as error:
        _close(pages)
        st.error(f"The app's settings are wrong, so it stays shut. {error}", icon=":material/lock:")
        st.stop()
    user = None
    try:
        if allowed.user_header:
            user = f"header {user_of_header(allowed)}"
        if allowed.login:
            if not st.user.get("is_logged_in"):
                _close(pages)
                st.button("Log in", type="primary", on_click=st.login)
                st.stop()
            user = f"login {user_of_login(allowed)}"
    except TransActError as error:
        _close(pages)
        st.error(str(error), icon=":material/lock:")
        if allowed.login:
            st.button("Log out", on_click=st.logout)
        st.stop()
    if allowed.access_token and not st.session_state.get("token given"):
        if not gate().knows(visitor_id()):
            _close(pages)
            _ask_token(allowed)
            st.stop()
        st.session_state["token given"] = True
    return user


def _close(pages: Sequence[StreamlitPage]) -> None:
    # Without this call, Streamlit would list the files of pages/ itself.
    st.navigation(list(pages), position="hidden")
    st.title("TransAct workbench")


def _ask_token(allowed: Settings) -> None:
    with st.form("access", width=420):
        token = st.text_input("Access token", type="password", autocomplete="current-password")
        if not st.form_submit_button("Enter", type="primary"):
            return
    try:
        right = gate().accepts(token, allowed.access_token, caller())
    except TransActError as error:
        st.error(str(error))
        return
    if not right:
        st.error("This is not the access token; whoever runs the app knows it.")
        return
    gate().let_in(visitor_id())
    st.session_state["token given"] = True
    st.rerun()


def show_exposure(user: str | None) -> None:
    """Tells what a server that others reach lets them do.

    Until the visitor has read it; always where the server asks nothing of anyone. Drawn after
    `require_access`.
    """
    allowed, visitor = settings(), user or visitor_id()
    exposed = exposure(allowed)
    if exposed is None or st.session_state.get("exposure read") or gate().was_told(visitor):
        return
    if not allowed.controlled:
        st.error(exposed, icon=":material/lock_open:")
        return
    with st.container(border=True, horizontal=True, vertical_alignment="center"):
        st.text(exposed, width="stretch")
        if st.button("Understood", key="exposure-understood"):
            st.session_state["exposure read"] = True
            if visitor is not None:
                gate().tell(visitor)
            st.rerun()
