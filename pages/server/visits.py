"""The tab in view: its visitor, and that visitor's results for the request in view."""

from __future__ import annotations

import hashlib
from itertools import cycle
from pathlib import PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import streamlit as st

if TYPE_CHECKING:
    # The first page is drawn before these are imported, as torch comes with them.
    from pages.server.visitors import Holding, Visit
    from transact_core.experiments.bench import Measurement

WANTED = "page"
"""Query parameter of app.py: the page to go on to."""
ENTERED = "came through app.py"
"""Key of the session state."""
XSRF_COOKIE = "_streamlit_xsrf"


def visitor_id() -> str | None:
    """The identity of this browser, which survives a reload; None where it has no cookie.

    It is the hash of the token that Streamlit gives each browser against forged requests. The
    cookie has the token masked anew on every answer, as `version|mask|masked token|time`; the
    token itself is stored nowhere.
    """
    try:
        _, mask, masked, _ = st.context.cookies.get(XSRF_COOKIE, "").strip('"').split("|")
        token = bytes(a ^ b for a, b in zip(bytes.fromhex(masked), cycle(bytes.fromhex(mask))))
    except ValueError:
        return None
    return hashlib.sha256(token).hexdigest() if len(token) >= 16 else None


def enter() -> None:
    """Called by app.py at the beginning of each run: every visit goes through it."""
    st.session_state[ENTERED] = True


def require_entered() -> None:
    """Leads to app.py where a page's file is run alone, which then goes on to that page.

    A server's first visitor who comes by a page's own address gets that page run alone: until
    `st.navigation` was called once, Streamlit takes `pages/` for its older kind of app.
    """
    if ENTERED not in st.session_state and not visit_has_begun():
        _lead_to_app()


def _lead_to_app() -> None:
    name = PurePosixPath(urlsplit(st.context.url or "").path).name
    st.switch_page("app.py", query_params={**st.query_params, WANTED: name})


def begin_visit(user: str | None = None) -> None:
    """Called by app.py once the libraries are imported; a user is one visitor in any browser."""
    if not visit_has_begun():
        from pages.server.open_models import workbench
        from pages.server.visitors import Visit

        st.session_state["visit"] = Visit(workbench().visitor(user or visitor_id()))


def visit_has_begun() -> bool:
    """Whether app.py called `begin_visit` before the page in view.

    The first page asks this and not whether the libraries are imported: the imports may end while
    it is being drawn.
    """
    return "visit" in st.session_state


def visit() -> Visit:
    """The visit of this tab; for pages drawn after `begin_visit`."""
    if not visit_has_begun():
        _lead_to_app()
    return st.session_state["visit"]


def holding() -> Holding:
    """This visitor's results for the request in view."""
    mine = visit()
    return mine.visitor.of(mine.request)


def points() -> list[Measurement]:
    """The points that this visitor measured on the bench in view."""
    return holding().points
