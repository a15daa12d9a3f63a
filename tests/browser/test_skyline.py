"""Every layer's width in a real browser: a bar is dragged, the rest filled, the cut measured."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from pages.live.skyline import bars_of
from tests.browser.driving import CHART, at, button, go_to, metric, open_with_few_tokens, settle
from tests.conftest import make_model

pytestmark = [pytest.mark.browser, pytest.mark.builtin]
"""They need the built-in model, because the first page of a server begins to open it."""

LAYERS, CHANNELS = 4, 64


@pytest.fixture(scope="module")
def model_folder(tokenizer, tmp_path_factory) -> Path:
    """A small model whose second MLP matters little."""
    folder = tmp_path_factory.mktemp("uneven")
    model = make_model(num_hidden_layers=LAYERS, intermediate_size=CHANNELS, num_key_value_heads=3)
    model.model.layers[1].mlp.down_proj.weight.mul_(0.05)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def shown(page: Page) -> tuple[tuple, tuple]:
    """The bars of both modules that the live view has drawn; none where all are as the sliders."""
    heads, channels = page.locator(".live").get_attribute("data-widths").split("|")
    return bars_of(heads), bars_of(channels)


def parameters(page: Page) -> int:
    return int(page.locator('[data-figure="parameters"]').get_attribute("value"))


def measure(page: Page) -> float:
    button(page, "Prune and measure perplexity").click()
    expect(metric(page, "Perplexity, measured")).to_be_visible()
    settle(page)
    return float(metric(page, "Perplexity, measured").inner_text())


def test_a_bar_is_dragged_the_budget_filled_and_the_cut_seen_beside_the_uniform_one(
    page: Page, address: str, model_folder: Path
):
    open_with_few_tokens(page, f"{address}/compress?mha=0&mlp=30", model_folder, 512, 64)
    at(page, 0, 30)
    uniform = parameters(page)
    measure(page)

    bars = page.locator('.module[data-side="mlp"] .bars')
    bars.scroll_into_view_if_needed()
    box = bars.bounding_box()
    step = (box["width"] - 40) / LAYERS
    x, top = box["x"] + 34 + 0.5 * step, box["y"] + 12
    page.mouse.move(x, top + 60)
    page.mouse.down()
    page.mouse.move(x, top - 5, steps=4)
    # Followed while the button is down, with exact figures: the first layer keeps all.
    expect(page.locator(".live")).to_have_attribute("data-widths", re.compile(r"\|64h\."))
    page.mouse.up()
    kept = round(0.7 * CHANNELS)
    expect(page.locator(".live")).to_have_attribute("data-widths", "6x4|64h.45x3")
    of_channel = 3 * 48
    assert parameters(page) == uniform + (CHANNELS - kept) * of_channel
    # The keyboard does the same: from the first layer to the third, one channel less and back.
    bars.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+ArrowDown")
    live = page.locator(".live")
    expect(live).to_have_attribute("data-widths", "6x4|64h.45.44h.45")
    said = "Layer 2: 44 of 64 channels, set by hand"
    expect(bars).to_have_attribute("aria-valuetext", said)
    page.keyboard.press("Delete")
    expect(live).to_have_attribute("data-widths", "6x4|64h.45x3")

    # It says what pricing takes; filling prices on the way.
    expect(page.locator(".pricing-words")).to_contain_text("alone at two widths")
    button(page, "Fill the rest of the budget").click()
    expect(page.locator('.module[data-side="mlp"] .prices')).to_be_visible()
    expect(page.locator(".live")).not_to_have_attribute("data-widths", re.compile("x3$"))
    filled = shown(page)[1]
    assert filled[0].by_hand
    assert [bar.by_hand for bar in filled[1:]] == [False] * 3
    assert sum(bar.units for bar in filled) == LAYERS * kept
    assert filled[1].units == min(bar.units for bar in filled)
    assert parameters(page) == uniform
    expect(page.locator('.module[data-side="mlp"] [data-of="losses"]')).to_contain_text(
        "loses most"
    )
    expect(page.locator('.module[data-side="mlp"] [data-of="prices"]')).to_contain_text("the line")

    # What uniform cuts are predicted to cost predicts it too.
    expect(page.locator('[data-name="perplexity"]')).to_have_text("Perplexity, predicted")
    expect(page.locator('[data-note="predicted"]')).to_contain_text("in 9 of 10 cases")

    # The address holds it, a reload brings it back, and it can be undone and redone.
    settle(page)
    expect(page).to_have_url(re.compile(r"channels=64h\."))
    page.reload()
    expect(page.locator(".live")).to_have_attribute("data-widths", re.compile(r"\|64h\."))
    assert shown(page)[1] == filled
    button(page, "Uniform again").click()
    expect(page.locator(".live")).to_have_attribute("data-widths", "|")
    button(page, "↶ Undo").click()
    expect(page.locator(".live")).to_have_attribute("data-widths", re.compile(r"\|64h\."))
    settle(page)

    perplexity = measure(page)
    expect(page.locator('[data-name="perplexity"]')).to_have_text("Perplexity, measured")
    shown_there = float(page.locator('[data-figure="predicted"]').inner_text())
    # The live view is sent four decimals of the ratio to the dense model.
    assert shown_there == pytest.approx(perplexity, rel=1e-4)
    expect(page.locator('[data-note="predicted"]')).to_contain_text("in 9 of 10 cases")
    go_to(page, "Perplexity")
    chart = page.locator(".st-key-equal-parameters").locator(CHART)
    expect(chart).to_contain_text("M parameters by-hand costs")
