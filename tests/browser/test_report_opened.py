"""The report, opened in a real browser without a network."""

from datetime import UTC, datetime
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from pages.report import make_report
from tests.browser.driving import CHART
from transact_core.experiments.bench import Choices, compress
from transact_core.export.compression import read_compression
from transact_core.pruning.plan import Decision

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_without_a_network_and_its_charts_live(
    browser: Browser, gqa_bench, tmp_path: Path, scheme: str
):
    plan = gqa_bench.plan(0.5, 0.5, Choices())
    point = compress(gqa_bench, plan, "least-squares")[1]
    file = tmp_path / "report.html"
    made = datetime(2026, 5, 4, tzinfo=UTC)
    file.write_text(
        make_report(gqa_bench, Decision(plan), "least-squares", point, [point], None, made)
    )

    context = browser.new_context(offline=True, color_scheme=scheme)
    page = context.new_page()
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text))
    page.goto(file.as_uri())
    expect(page.locator(CHART)).to_have_count(6)
    first = page.locator(CHART).first
    expect(first.locator(".main-svg").first).to_be_visible()
    template = page.evaluate(
        "chart => chart.layout.template.layout.font.color", first.element_handle()
    )
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    lightness = sum(int(part) for part in background[4:-1].split(","))
    assert (lightness < 100) == (scheme == "dark")
    assert (template == "#f2f5fa") == (scheme == "dark")
    first.hover()
    expect(first.locator(".hoverlayer .hovertext").first).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("link", name="compression.json").click()
    assert read_compression(Path(download.value.path())).plan == plan
    assert asked == [file.as_uri()]
    assert errors == []
    context.close()
