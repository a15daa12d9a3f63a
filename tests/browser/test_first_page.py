"""What the first visitor sees before torch is imported and while the model is opened."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from tests.browser.driving import (
    CHART,
    TIMEOUT_MS,
    button,
    give_torch,
    go_to,
    running_app,
    sidebar,
    without_torch,
)

pytestmark = pytest.mark.browser

RECORDING_LINKS = """
window.linksSeen = new Set();
new MutationObserver(() => {
    for (const link of document.querySelectorAll('[data-testid="stSidebarNavLink"]'))
        window.linksSeen.add(link.innerText.split("\\n").pop());
}).observe(document, { subtree: true, childList: true, characterData: true });
"""


def test_the_first_page_is_there_before_torch_and_shows_an_example(
    browser: Browser, tmp_path: Path
):
    environment = without_torch(tmp_path) | {"TRANSACT_CACHE": str(tmp_path / "cache")}
    with running_app(tmp_path / "log.txt", **environment) as address:
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
        give_torch(tmp_path)
        expect(button(page, "Load")).to_be_visible()
        expect(page.get_by_text("are being loaded")).to_have_count(0)
        # The built-in model is not converted yet, so it cannot be open.
        go_to(page, "Start here")
        expect(button(page, "Cancel")).to_be_visible()
        button(page, "Cancel").click()
        expect(page.locator(CHART)).to_have_count(3)
        page.get_by_role("link", name="Open this very cut").click()
        expect(page).to_have_url(re.compile("/compress.*mha=33&mlp=30"))
        expect(page.get_by_test_id("stException")).to_have_count(0)
        seen = page.evaluate("[...window.linksSeen]")
        page.close()
    # Streamlit's default navigation would list the names of the files.
    assert "Compress" in seen
    assert not {"app", "compress", "start"} & set(seen)
