"""Tasks in a real browser: a cut and the offline task, stopped, found again after a reload."""

import csv
import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

pytest.importorskip("lm_eval")

from tests.browser.driving import CHART, button, go_to, open_with_few_tokens, settle, sidebar
from tests.conftest import make_model

pytestmark = [pytest.mark.browser, pytest.mark.builtin]
"""They need the built-in model, because the first page of a server begins to open it."""

ANSWERED = re.compile(r"([\d,]+) of ([\d,]+) questions answered")
WIDTHS = """() => [...document.querySelectorAll('.st-key-narrowing-chart .js-plotly-plot')]
    .flatMap(chart => chart.data.filter(trace => trace.customdata).map(
        trace => Array.from(trace.customdata._inputArray ?? trace.customdata)))"""
"""Half the width of the interval after each block, for each task."""


@pytest.fixture(scope="module")
def model_folder(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(max_position_embeddings=1024).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def answered(page: Page) -> list[int]:
    """Questions answered, and all of them."""
    words = page.get_by_text(ANSWERED).inner_text()
    return [int(number.replace(",", "")) for number in ANSWERED.search(words).groups()]


def test_tasks_of_a_cut(page: Page, address: str, model_folder: Path, tmp_path: Path):
    open_with_few_tokens(page, f"{address}/tasks", model_folder, 512, 64)
    expect(page.get_by_role("combobox", name="Cut", exact=True)).to_be_visible()
    # So many that they are not all answered before the stop.
    questions = page.get_by_label("Questions a task", exact=True)
    questions.fill("5000")
    questions.press("Enter")
    settle(page)
    button(page, "Run the tasks").click()
    expect(page.locator(CHART)).to_have_count(2)
    # The interval shrinks from block to block. A random model never finds a last word, so that of
    # the other task is 0 all the time.
    page.wait_for_function(f"() => ({WIDTHS})().some(after => after.length > 4 && after[0] > 0)")
    widths = next(after for after in page.evaluate(WIDTHS) if after[0] > 0)
    assert widths[-1] < widths[0]

    button(page, "Cancel").last.click()
    expect(page.get_by_text("was cancelled").first).to_be_visible()
    stopped = answered(page)
    assert 0 < stopped[0] < stopped[1]

    page.reload()
    expect(page.get_by_text(ANSWERED)).to_be_visible()
    assert answered(page) == stopped
    expect(sidebar(page).get_by_text("Running tasks · cancelled")).to_be_visible()
    with page.expect_download() as download:
        button(page, "tasks.json").click()
    report = json.loads(Path(download.value.path()).read_text())
    with page.expect_download() as download:
        button(page, "CSV").click()
    with Path(download.value.path()).open() as file:
        rows = {(row["task"], row["metric"]): row for row in csv.DictReader(file)}
    for task, entry in report["tasks"].items():
        row = rows[task, "acc"]
        assert float(row["difference"]) == pytest.approx(entry["difference"]["acc"])
        assert int(row["questions"]) == entry["model"]["n"]
    assert set(report["tasks"]) == {task for task, _ in rows}

    go_to(page, "Token damage")
    button(page, "Compare the predictions").click()
    expect(page.get_by_text("worst fifth of the tokens carries")).to_be_visible()
    mark = page.locator("span[title*='pruned:']").first
    expect(mark).to_have_attribute("title", re.compile(r"nats\ndense: .*%\npruned: .*%"))
    expect(page.get_by_test_id("stException")).to_have_count(0)
