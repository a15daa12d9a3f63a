"""A head is chosen by a click on the map or in the menus."""

import re

import pytest
from playwright.sync_api import Page, expect

from tests.browser.driving import CHART, open_with_few_tokens, settle

pytestmark = [pytest.mark.browser, pytest.mark.builtin]

LAYERS, HEADS = 30, 9
"""Of the built-in model."""
TRIES = 5
"""Clicks on a head, each with a wait of 15 seconds."""


def click_head(page: Page, layer: int, head: int) -> None:
    """Clicks until the click is registered; a chart ignores clicks while it is redrawn."""
    taken = page.get_by_text(f"Layer {layer}, head {head}: channel")
    for _ in range(TRIES):
        _click_square(page, layer, head)
        try:
            expect(taken).to_be_visible(timeout=15_000)
            return
        except AssertionError:
            continue
    raise AssertionError(f"{TRIES} clicks on head {head} of layer {layer} were not taken")


def _click_square(page: Page, layer: int, head: int) -> None:
    area = page.locator(CHART).first.locator(".nsewdrag").first.bounding_box()
    page.mouse.click(
        area["x"] + area["width"] * (head + 0.5) / HEADS,
        area["y"] + area["height"] * (layer + 0.5) / LAYERS,
    )


def expect_head(page: Page, layer: int, head: int) -> None:
    expect(page.get_by_text(f"Layer {layer}, head {head}: channel")).to_be_visible()
    pattern = re.compile(f"Layer {layer}, head {head}: .* first token")
    expect(page.get_by_text(pattern)).to_be_visible()
    expect(page.get_by_role("button", name=f"without head {head} of layer {layer}")).to_be_visible()
    settle(page)


def test_a_head_is_chosen_by_a_click_and_by_the_keyboard(page: Page, address: str):
    open_with_few_tokens(page, f"{address}/heads")
    expect_head(page, 0, 0)
    click_head(page, 12, 5)
    expect_head(page, 12, 5)
    menu = page.get_by_role("combobox", name="Head")
    menu.focus()
    menu.press("ArrowDown")
    menu.press("ArrowDown")
    menu.press("Enter")
    expect(page.get_by_text("Layer 12, head 5: channel")).to_have_count(0)
    # The earlier click on this head must not keep the new one from being noticed.
    click_head(page, 12, 5)
    expect_head(page, 12, 5)
    expect(page.get_by_test_id("stException")).to_have_count(0)
