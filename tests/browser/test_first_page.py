"""What the first visitor sees before torch is imported; the test holds the import back."""

from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from tests.browser.driving import CHART, TIMEOUT_MS, button, running_app, sidebar

pytestmark = pytest.mark.browser

# Written to sitecustomize.py, which Python imports when it starts.
HOLDING_TORCH_BACK = """
import importlib.abc, pathlib, sys, time

class HoldBack(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        while name == "torch" and not pathlib.Path({gate!r}).exists():
            time.sleep(0.05)

sys.meta_path.insert(0, HoldBack())
"""
RECORDING_LINKS = """
window.linksSeen = new Set();
new MutationObserver(() => {
    for (const link of document.querySelectorAll('[data-testid="stSidebarNavLink"]'))
        window.linksSeen.add(link.innerText.split("\\n").pop());
}).observe(document, { subtree: true, childList: true, characterData: true });
"""


def test_the_first_page_is_there_before_torch(browser: Browser, tmp_path: Path):
    gate = tmp_path / "gate"
    (tmp_path / "sitecustomize.py").write_text(HOLDING_TORCH_BACK.format(gate=str(gate)))
    held_back = {"PYTHONPATH": str(tmp_path), "TRANSACT_CACHE": str(tmp_path / "cache")}
    with running_app(tmp_path / "log.txt", **held_back) as address:
        page = browser.new_page()
        page.set_default_timeout(TIMEOUT_MS)
        expect.set_options(timeout=TIMEOUT_MS)
        page.add_init_script(RECORDING_LINKS)
        page.goto(address)
        expect(page.get_by_role("heading", level=1)).to_contain_text("Start here")
        expect(page.locator(CHART)).to_have_count(3)
        expect(sidebar(page).get_by_text("Loading PyTorch")).to_be_visible()
        page.get_by_role("link", name="Compress").first.click()
        expect(page.get_by_role("heading", level=1)).to_contain_text("Compress")
        expect(page.get_by_text("are being loaded")).to_be_visible()
        expect(button(page, "Load")).to_have_count(0)
        gate.touch()
        expect(button(page, "Load")).to_be_visible()
        expect(page.get_by_text("are being loaded")).to_have_count(0)
        expect(page.get_by_test_id("stException")).to_have_count(0)
        seen = page.evaluate("[...window.linksSeen]")
        page.close()
    # Streamlit's default navigation would list the names of the files.
    assert "Compress" in seen
    assert not {"app", "compress", "start"} & set(seen)
