"""A training in a real browser: begun, watched, found again after a reload, stopped, its result."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser.driving import (
    CHART,
    button,
    go_to,
    metric,
    open_with_few_tokens,
    set_number,
    settle,
)
from tests.conftest import make_model
from transact_core.data.corpus import read_corpus

pytestmark = [pytest.mark.browser, pytest.mark.builtin]
"""They need the built-in model, because the first page of a server begins to open it."""

TRAINED = re.compile(r"([\d,]+) of ([\d,]+) tokens")
STEP = 4 * 64
"""Tokens of a step."""


@pytest.fixture(scope="module")
def model_folder(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(hidden_size=96, intermediate_size=256, num_hidden_layers=4).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "mine.txt").write_text(read_corpus("builtin").text[:200_000])
    return folder


def test_a_training(page: Page, address: str, model_folder: Path):
    open_with_few_tokens(page, f"{address}/recover", model_folder, 512, 64)
    # The empty state leads to where cuts are measured.
    page.get_by_role("link", name="Measure this cut on the Compress page").click()
    button(page, "Prune and measure perplexity").click()
    expect(metric(page, "Perplexity, measured")).to_be_visible()
    go_to(page, "Recover")
    expect(button(page, "Train")).to_be_enabled()
    settle(page)
    # So many that it is under way until it is stopped.
    set_number(page, "Tokens to train on", 4000 * STEP)
    settle(page)
    button(page, "Train").click()
    progress = page.get_by_text(TRAINED).first
    expect(progress).to_be_visible()
    expect(page.locator(CHART)).to_have_count(2)

    page.reload()
    expect(button(page, "Pause")).to_be_visible()
    before = progress.inner_text()
    expect(progress).not_to_have_text(before)
    expect(button(page, "Train")).to_have_count(0)
    expect(page.locator(CHART)).to_have_count(2)

    button(page, "Stop and keep the best").click()
    expect(page.get_by_text("python -m transact_core tune")).to_be_visible()
    result = page.get_by_test_id("stAlert").first
    expect(result).to_contain_text(re.compile("best weights|Nothing got better"))
    expect(page.get_by_test_id("stDataFrame")).to_have_count(1)
    expect(page.get_by_test_id("stException")).to_have_count(0)
