"""The first page is drawn before torch and transformers are imported."""

import subprocess
import sys

from streamlit.testing.v1 import AppTest

from pages.server import libraries
from tests.pages.conftest import ROOT, WAIT

BEFORE_THE_IMPORTS = """
import sys
from streamlit.runtime.pages_manager import PagesManager
from streamlit.testing.v1 import AppTest
from pages.server import libraries

libraries.start = lambda: None
page = AppTest.from_file({app!r}, default_timeout=60).run()
assert not page.exception, page.exception
assert page.title[0].value == "Start here", page.title
assert len(page.get("plotly_chart")) == 3
assert any("Loading PyTorch" in caption.value for caption in page.sidebar.caption)
heavy = {{"torch", "transformers", "pandas", "datasets"}} & set(sys.modules)
assert not heavy, heavy

# As in a server that has run app.py once; AppTest would begin each run as its first.
begin = PagesManager.__init__

def begin_later(manager, *arguments, **named):
    PagesManager.uses_pages_directory = False
    begin(manager, *arguments, **named)

PagesManager.__init__ = begin_later
page.switch_page("pages/compress.py").run()
assert not page.exception, page.exception
assert page.title[0].value == "Compress", page.title
assert "PyTorch and transformers are being loaded" in page.info[0].value
assert "torch" not in sys.modules
print("drawn")
"""

FAILING = """
import sys
from streamlit.testing.v1 import AppTest
from pages.server import libraries

sys.modules["transformers"] = None
libraries.wait()
assert not libraries.loaded()
page = AppTest.from_file({app!r}, default_timeout=60).run()
assert page.title[0].value == "Start here", page.title
assert "could not be imported" in page.error[0].value, page.error
assert not page.exception, page.exception
del sys.modules["transformers"]
sys.modules["torch"] = None
libraries.wait()
assert "torch" in libraries.failure()
print("told")
"""


def run_alone(code: str) -> subprocess.CompletedProcess:
    """Runs code in a fresh interpreter, in which nothing is imported yet."""
    command = [sys.executable, "-c", code.format(app=str(ROOT / "app.py"))]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_the_first_page_needs_neither_torch_nor_transformers():
    ran = run_alone(BEFORE_THE_IMPORTS)
    assert ran.stdout == "drawn\n", ran.stderr


def test_a_failed_import_is_told_on_the_page_and_tried_again():
    ran = run_alone(FAILING)
    assert ran.stdout == "told\n", ran.stderr


def test_imports_may_end_while_the_first_page_is_being_drawn(opened, app_ran_before, monkeypatch):
    answers = [False]
    monkeypatch.setattr(libraries, "loaded", lambda: answers.pop() if answers else True)
    page = AppTest.from_file(ROOT / "app.py", default_timeout=WAIT).run()
    assert not answers
    assert not page.exception, page.exception
    assert page.title[0].value == "Start here"
    assert len(page.get("plotly_chart")) == 3
    page.run()
    assert not page.exception, page.exception
    assert "visit" in page.session_state
