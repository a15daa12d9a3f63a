"""A workbench of the tests' own, opened on a tiny model."""

import sys
from functools import cache
from pathlib import Path

import pytest
import streamlit as st
import torch
from streamlit.components.v2 import manifest_scanner
from streamlit.runtime.pages_manager import PagesManager
from streamlit.testing.v1 import AppTest

import pages.live
import pages.parts.login
import pages.parts.progress
import pages.parts.sidebar
import pages.report
import pages.server.exploring
import pages.server.side_by_side
import pages.server.start_jobs  # noqa: F401 - loaded, so that `exchange` finds what they import
from pages.parts import navigation
from pages.server import libraries
from pages.server.open_models import Workbench
from pages.server.request import Request
from pages.server.visitors import Visit
from transact_core.workers.tasks import Inline

# All that these tests draw is drawn after the imports.
libraries.wait()

# Otherwise every run of an AppTest reads the metadata of all installed packages, a third of its time.
manifest_scanner.scan_component_manifests = cache(manifest_scanner.scan_component_manifests)

ROOT = Path(__file__).parents[2]
WAIT = 30


def exchange(monkeypatch, name, replacement):
    """Puts a replacement wherever a loaded module of the pages holds something of that name."""
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("pages.") and hasattr(module, name):
            monkeypatch.setattr(module, name, replacement)


def ended(job):
    """The job once it has ended."""
    if not job.wait(WAIT):
        pytest.fail(f"the job {job.title!r} did not end")
    return job


def workbench_inline() -> Workbench:
    """A workbench whose jobs do their work themselves; its one lane is `only_lane`."""
    made = Workbench(Inline)
    made.only_lane = made.lane(Request())
    return made


@pytest.fixture
def own_workbench(monkeypatch):
    """What all sessions share, made for one test."""
    threads = torch.get_num_threads()
    made = workbench_inline()
    exchange(monkeypatch, "workbench", lambda: made)
    yield made
    # What still runs would go on in the next tests, without what this one put in its way.
    assert made.stop(WAIT)
    torch.set_num_threads(threads)


@pytest.fixture
def opened(own_workbench, monkeypatch, gqa_bench, tmp_path):
    """That workbench with the tiny model opened, as a visit finds it, and nothing measured."""
    monkeypatch.setenv("TRANSACT_CACHE", str(tmp_path / "cache"))
    models = own_workbench.only_lane.worker.models
    models._benches[Request().bench_spec] = gqa_bench
    ended(own_workbench.open(Request()).dense)
    return own_workbench


@pytest.fixture
def open_page(opened):
    """Runs a page in a session of its own, by its file's name; more calls share the visit.

    A visit that is given is another tab's, or another visitor's.
    """
    usual = Visit()

    def run(name: str, visit: Visit = usual, **query: str) -> AppTest:
        page = AppTest.from_file(ROOT / "pages" / f"{name}.py", default_timeout=WAIT)
        page.session_state["visit"] = visit
        for key, value in query.items():
            page.query_params[key] = value
        return page.run()

    return run


@pytest.fixture
def links_in_words(monkeypatch):
    """Links to other pages are captions with their names: a page run alone knows no others."""
    monkeypatch.setattr(navigation, "link", lambda name, *_, **__: st.caption(f"link to {name}"))


@pytest.fixture
def app_ran_before(monkeypatch):
    """As in a server that has run app.py once; AppTest would begin each run as its first."""
    begin = PagesManager.__init__

    def begin_later(manager, *arguments, **named):
        PagesManager.uses_pages_directory = False
        begin(manager, *arguments, **named)

    monkeypatch.setattr(PagesManager, "__init__", begin_later)


@pytest.fixture
def open_app(own_workbench, app_ran_before):
    """Runs the whole app at the bare address, or at a page's, by its file's name."""

    def run(name: str = "", visit: Visit | None = None) -> AppTest:
        page = AppTest.from_file(ROOT / "app.py", default_timeout=WAIT)
        page.session_state["visit"] = visit or Visit()
        page.run()
        return page.switch_page(f"pages/{name}.py").run() if name else page

    return run
