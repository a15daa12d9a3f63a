"""Fixtures: a running app and a page of a real Chromium."""

import os
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.browser.driving import new_page, running_app, start_chromium


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
    """Address of a running app, which does not begin the minute of work that a prediction for the
    built-in model takes."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with running_app(log, TRANSACT_UNASKED_SECONDS="0") as address:
        yield address


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    with new_page(browser) as page:
        yield page
