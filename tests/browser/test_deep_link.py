"""The first visit to a server by a page's own address, which Streamlit would run without app.py."""

from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from tests.browser.driving import TIMEOUT_MS, running_app

pytestmark = pytest.mark.browser


def test_a_page_is_never_drawn_without_the_app_around_it(browser: Browser, tmp_path: Path):
    with running_app(tmp_path / "log.txt") as address:
        page = browser.new_page()
        page.goto(f"{address}/compress")
        expect(page.get_by_role("combobox", name="Calibration text")).to_be_visible(
            timeout=TIMEOUT_MS
        )
        links = page.get_by_test_id("stSidebarNavLink").all_inner_texts()
        page.close()
    assert len(links) == 10
    assert any("Activations" in link for link in links)
