"""Starts the app and Chromium, and operates pages: for browser tests and for the screenshots."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Locator, Page, Playwright, expect
from playwright.sync_api import TimeoutError as PlaywrightTimeoutError

ROOT = Path(__file__).parents[2]
TIMEOUT_MS = 300_000
"""Longest wait in milliseconds. Loading and measuring take minutes on a busy two-core machine."""
CALIBRATION_TOKENS = 512
"""Calibration tokens of the models that are opened here."""
MENU_MS = 5_000
"""Wait for an open menu in milliseconds, before it is opened again."""
CHART = ".js-plotly-plot"
"""CSS selector of a chart."""
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]

# Written to sitecustomize.py, which Python imports when it starts.
HOLDING_TORCH_BACK = """
import importlib.abc, pathlib, sys, time

class HoldBack(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        while name == "torch" and not pathlib.Path({gate!r}).exists():
            time.sleep(0.05)

sys.meta_path.insert(0, HoldBack())
"""


def start_chromium(playwright: Playwright) -> Browser:
    """Starts the system's Chromium or Chrome, or else the one that Playwright installs."""
    names = ("chromium", "chromium-browser", "google-chrome")
    installed = next((path for name in names if (path := shutil.which(name))), None)
    return playwright.chromium.launch(executable_path=installed, args=CHROMIUM_FLAGS)


@contextmanager
def new_page(browser: Browser) -> Iterator[Page]:
    """A page of a visitor of its own."""
    # High enough for the whole sidebar: a menu does not open if its box is partly out of view.
    context = browser.new_context(viewport={"width": 1440, "height": 1400}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(TIMEOUT_MS)
    expect.set_options(timeout=TIMEOUT_MS)
    yield page
    context.close()


@contextmanager
def running_app(log: Path, script: str = "app.py", **environment: str) -> Iterator[str]:
    """Runs the app on a free port, with its own settings, for the block; gives its address."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", script]
    options = ["--server.port", str(port), "--server.headless", "true"]
    # The app may read and write only in these folders; pytest's temporary folders are in this one.
    folder = tempfile.gettempdir()
    opened = {"TRANSACT_READ_FOLDERS": folder, "TRANSACT_WRITE_FOLDERS": folder}
    with log.open("w") as output:
        server = subprocess.Popen(
            command + options,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **opened, **environment},
        )
    address = f"http://localhost:{port}"
    try:
        wait_for_app(address, server, log)
        yield address
    finally:
        server.terminate()
        server.wait(timeout=30)


def without_torch(folder: Path) -> dict[str, str]:
    """An environment in which an app's import of torch waits for `give_torch` of the same folder."""
    (folder / "sitecustomize.py").write_text(HOLDING_TORCH_BACK.format(gate=str(_gate(folder))))
    return {"PYTHONPATH": str(folder)}


def give_torch(folder: Path) -> None:
    """Lets torch be imported by an app that was started with the environment for `folder`."""
    _gate(folder).touch()


def _gate(folder: Path) -> Path:
    return folder / "gate"


def wait_for_app(address: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/_stcore/health", timeout=5)
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"the app did not start:\n{log.read_text()}")


def open_with_few_tokens(
    page: Page,
    address: str,
    folder: Path | None = None,
    evaluation_tokens: int = 512,
    sequence_length: int = 128,
) -> None:
    """Opens a page with so few tokens that measurements take seconds instead of minutes.

    The model is the checkpoint in `folder`, or the built-in model.
    """
    ask_to_open(page, address, folder, evaluation_tokens, sequence_length)
    shown = "134.5 M parameters" if folder is None else folder.name
    expect(sidebar(page).get_by_text(shown, exact=folder is not None)).to_be_visible()
    settle(page)


def ask_to_open(
    page: Page, address: str, folder: Path | None, evaluation_tokens: int, sequence_length: int
) -> None:
    """Fills in the sidebar and presses Load, without waiting for the model to open."""
    page.goto(address)
    expect(button(page, "Load")).to_be_visible()
    # The first visit to a server is always shown the first page.
    if urlsplit(page.url).path != (urlsplit(address).path or "/"):
        page.goto(address)
    # The app starts to open its default model. That is cancelled here, unless an earlier visitor
    # cancelled it or it has already finished.
    cancel, opened = button(page, "Cancel").first, sidebar(page).get_by_text("M parameters")
    ended = button(page, "Try again").or_(opened)
    expect(cancel.or_(ended).first).to_be_visible()
    if not opened.is_visible() and cancel.is_visible() and cancel.is_enabled():
        cancel.click()
        expect(page.get_by_text("· stopping").or_(ended).first).to_be_visible()
    if folder is not None:
        choose(page, "Model", "Local folder")
        name = page.get_by_label("Checkpoint folder", exact=True)
        name.fill(str(folder))
        name.press("Enter")
    page.get_by_text("How much, and on what").click()
    set_number(page, "Calibration tokens", CALIBRATION_TOKENS)
    set_number(page, "Evaluation tokens", evaluation_tokens)
    set_number(page, "Sequence length", sequence_length)
    load = button(page, "Load")
    expect(load).to_be_enabled()
    load.click()


def settle(page: Page) -> None:
    """Waits until the page's script has ended; a menu that is opened earlier closes again."""
    expect(page.get_by_test_id("stApp")).to_have_attribute("data-test-script-state", "notRunning")


def choose(page: Page, label: str, option: str) -> None:
    """Chooses an option of a menu."""
    box = page.get_by_role("combobox", name=label)
    offered = page.get_by_role("option", name=option, exact=True)
    deadline = time.monotonic() + TIMEOUT_MS / 1000
    while True:
        if box.get_attribute("aria-expanded") != "true":
            box.click()
        try:
            offered.click(timeout=MENU_MS)
            settle(page)
            expect(box).to_have_value(option, timeout=MENU_MS)
            break
        except (PlaywrightTimeoutError, AssertionError):
            # The menu closes if the page is drawn again at that moment.
            if time.monotonic() > deadline:
                raise


def measure_mlp_curve(page: Page, points: int, recovery: str = "none") -> None:
    """Starts a curve of MLP cuts up to 70 % on the Perplexity page."""
    choose(page, "Cut", "MLP only")
    choose(page, "Recovery", recovery)
    set_number(page, "Points", points)
    settle(page)
    button(page, "Measure the curve").click()


def go_to(page: Page, name: str) -> None:
    """Goes to another page by the navigation."""
    page.get_by_test_id("stSidebarNav").get_by_text(name, exact=True).click()
    expect(page.get_by_role("heading", level=1)).to_contain_text(name)


def sidebar(page: Page) -> Locator:
    return page.get_by_test_id("stSidebar")


def button(page: Page, name: str) -> Locator:
    return page.get_by_role("button", name=name, exact=True)


def metric(page: Page, label: str) -> Locator:
    return page.get_by_test_id("stMetric").filter(has_text=label).get_by_test_id("stMetricValue")


def set_number(page: Page, label: str, value: int) -> None:
    field = page.get_by_label(label, exact=True)
    field.fill(str(value))
    field.press("Enter")
    expect(field).to_have_value(str(value))


def slider(page: Page, side: str) -> Locator:
    """The slider of `side`, which is MHA or MLP."""
    return page.get_by_role("slider", name=f"{side} ratio")


def at(page: Page, mha: int, mlp: int, context: int = 1024) -> None:
    """Waits until the live view has drawn this position."""
    expect(page.locator(".live")).to_have_attribute("data-shown", f"{mha},{mlp},{context}")
