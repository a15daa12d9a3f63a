"""Fixtures: a running app and a page of a real Chromium."""

import os
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.browser.driving import TIMEOUT_MS, running_app, start_chromium


@pytest.fixture(scope="session")
def browser():
    with sync_playwright() as playwright:
        try:
            chromium = start_chromium(playwright)
        except Exception as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(f"no browser can be started here: {error}")
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def address(tmp_path_factory, converted_builtin):
    """Address of a running app."""
    with running_app(tmp_path_factory.mktemp("server") / "log.txt") as address:
        yield address


@pytest.fixture
def page(browser: Browser, tmp_path: Path):
    # High enough for the whole sidebar: a menu does not open if its box is partly out of view.
    context = browser.new_context(viewport={"width": 1440, "height": 1400}, accept_downloads=True)
    page: Page = context.new_page()
    page.set_default_timeout(TIMEOUT_MS)
    expect.set_options(timeout=TIMEOUT_MS)
    yield page
    context.close()
