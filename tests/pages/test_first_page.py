"""The first page is drawn before torch and transformers are imported."""

import subprocess
import sys
import threading

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
attempts = []
start = libraries.start
libraries.start = lambda: (attempts.append(libraries.failure()), start())
page = AppTest.from_file({app!r}, default_timeout=60).run()
assert page.title[0].value == "Start here", page.title
assert "could not be imported" in page.error[0].value, page.error
assert not page.exception, page.exception
page.run()
assert not attempts, attempts
del sys.modules["transformers"]
sys.modules["torch"] = None
next(button for button in page.button if button.label == "Try again").click().run()
assert len(attempts) == 1
libraries._thread.join()
assert "torch" in libraries.failure()
print("told")
"""


FAILING_WHILE_AWAITED = """
import sys
from streamlit.testing.v1 import AppTest
from pages.parts import loading
from pages.server import libraries

tick = "from pages.parts import loading; loading._await_libraries.__wrapped__()"
sys.modules["transformers"] = None
attempts, drawn_anew = [], []
attempt = libraries._import
libraries._import = lambda: (attempts.append(1), attempt())
loading.st.rerun = lambda: (drawn_anew.append(libraries.failure()), loading.st.stop())
page = AppTest.from_string(tick, default_timeout=60).run()
assert not attempts
for _ in range(3):
    page.run()
    libraries._thread.join()
assert not page.exception, page.exception
assert len(attempts) == 1, attempts
assert len(drawn_anew) == 2 and all(drawn_anew), drawn_anew
print("tried once")
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


def test_a_failed_import_is_not_tried_again_by_itself():
    ran = run_alone(FAILING_WHILE_AWAITED)
    assert ran.stdout == "tried once\n", ran.stderr


def test_nothing_is_loaded_before_the_imports_begin(monkeypatch):
    seen = []

    class Unstarted(threading.Thread):
        def start(self):
            seen.append(libraries.loaded())

    monkeypatch.setattr(libraries.threading, "Thread", Unstarted)
    monkeypatch.setattr(libraries, "_thread", None)
    monkeypatch.setattr(libraries, "_done", False, raising=False)
    libraries.start()
    seen.append(libraries.loaded())
    assert seen == [False, False]


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
