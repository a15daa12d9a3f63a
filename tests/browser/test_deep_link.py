"""The first visit to a server at the address of a page."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from pages.parts.navigation import SECTIONS
from tests.browser.driving import TIMEOUT_MS, running_app, without_torch

pytestmark = pytest.mark.browser


def test_a_page_is_never_drawn_without_the_app_around_it(browser: Browser, tmp_path: Path):
    """Without the app's redirect, Streamlit would run the page that is asked for alone.

    The first visitor of a server is redirected in another way than those that follow.
    """
    with running_app(tmp_path / "log.txt") as address:
        for name, address_then in (
            ("compress?mha=60&mlp=50", "/compress.*mha=60&mlp=50"),
            ("method", "/method$"),
        ):
            page = browser.new_page()
            page.goto(f"{address}/{name}")
            expect(page.get_by_role("combobox", name="Calibration text")).to_be_visible(
                timeout=TIMEOUT_MS
            )
            expect(page).to_have_url(re.compile(address_then))
            links = page.get_by_test_id("stSidebarNavLink").all_inner_texts()
            page.close()
            assert len(links) == sum(len(members) for members in SECTIONS.values())
            assert "Start here" in links[0]
            assert "Method" in links[1]


def test_the_first_page_has_its_name_as_an_address_too(browser: Browser, tmp_path: Path):
    """This page does without torch, which is therefore never imported here."""
    with running_app(tmp_path / "log.txt", **without_torch(tmp_path)) as address:
        # Twice, because the first visitor of a server is redirected in another way (see above).
        for _ in range(2):
            page = browser.new_page()
            page.goto(f"{address}/start?mha=60")
            expect(page.get_by_role("heading", level=1)).to_contain_text(
                "Start here", timeout=TIMEOUT_MS
            )
            expect(page).to_have_url(re.compile(r"/\?.*mha=60"))
            expect(page.get_by_role("dialog")).to_have_count(0)
            page.close()
