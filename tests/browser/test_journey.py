"""The main journey on the built-in model: look, move sliders, cut, see the point, take it away."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

pytestmark = [pytest.mark.browser, pytest.mark.builtin]

CHART = ".js-plotly-plot"


def go_to(page: Page, name: str) -> None:
    page.get_by_test_id("stSidebarNav").get_by_text(name, exact=True).click()
    expect(page.get_by_role("heading", level=1)).to_contain_text(name)


def metric(page: Page, label: str):
    return page.get_by_test_id("stMetric").filter(has_text=label).get_by_test_id("stMetricValue")


def set_number(page: Page, label: str, value: int) -> None:
    field = page.get_by_label(label, exact=True)
    field.fill(str(value))
    field.press("Enter")


def expect_no_exception(page: Page) -> None:
    expect(page.get_by_test_id("stException")).to_have_count(0)


def weights_sha256(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_journey(page: Page, address: str, tmp_path: Path):
    page.goto(address)
    expect(page.locator(CHART).first).to_be_visible()
    expect(page.get_by_test_id("stSidebar")).to_contain_text("134.5 M parameters")

    # Fewer tokens, so that the test measures in seconds what a user measures in minutes.
    page.get_by_text("How much, and on what").click()
    set_number(page, "Calibration tokens", 2048)
    set_number(page, "Evaluation tokens", 1024)
    load = page.get_by_role("button", name="Load", exact=True)
    expect(load).to_be_enabled()
    load.click()
    expect(page.get_by_text("Measured over 2,048 calibration tokens")).to_be_visible()

    go_to(page, "Importance")
    expect(page.locator(CHART)).to_have_count(3)
    expect_no_exception(page)

    go_to(page, "Compress")
    expect(metric(page, "MHA width")).to_have_text("384")
    expect(metric(page, "MLP width")).to_have_text("1,075")
    mha, mlp = page.get_by_role("slider").all()[:2]
    mlp.press("ArrowRight")
    expect(metric(page, "MLP width")).to_have_text("1,060")
    mha.press("End")
    expect(metric(page, "MHA width")).to_have_text("192")
    for _ in range(30):
        mha.press("ArrowLeft")
    expect(page.get_by_text("65%", exact=True)).to_be_visible()
    mha.press("Home")
    expect(metric(page, "MHA width")).to_have_text("576")
    expect(metric(page, "MLP width")).to_have_text("1,060")
    assert "mlp=31" in page.url

    page.get_by_role("button", name="Prune and measure perplexity").click()
    measured = metric(page, "Perplexity, measured")
    expect(measured).to_be_visible()
    perplexity = float(measured.inner_text())
    assert perplexity > 1
    expect_no_exception(page)

    go_to(page, "Perplexity")
    expect(page.locator(CHART)).to_be_visible()
    series = page.locator(CHART).evaluate(
        "chart => chart.data.map(trace => [trace.name, Array.from(trace.y.bdata ? [] : trace.y)])"
    )
    points = dict(series)
    assert points["MLP only, least-squares"] == [pytest.approx(perplexity, abs=0.006)]
    assert points["dense"][0] < perplexity
    expect_no_exception(page)

    go_to(page, "Export")
    with page.expect_download() as download:
        page.get_by_role("button", name="compression.json").click()
    configuration = tmp_path / "compression.json"
    download.value.save_as(configuration)
    plan = json.loads(configuration.read_text())["plan"]
    assert (plan["mha_ratio"], plan["mlp_ratio"]) == (0.0, 0.31)

    written = tmp_path / "from-the-browser"
    folder = page.get_by_role("textbox", name="Folder on the machine")
    folder.fill(str(written))
    folder.press("Enter")
    page.get_by_role("button", name="Write the checkpoint").click()
    expect(page.get_by_text(f"Written to {written}")).to_be_visible()

    applied = tmp_path / "applied"
    command = [sys.executable, "-m", "transact_core", "apply", str(configuration)]
    subprocess.run([*command, "--output", str(applied)], check=True, capture_output=True)
    assert weights_sha256(applied) == weights_sha256(written)
    report = json.loads((applied / "report.json").read_text())
    assert report["pruned"]["perplexity"] == pytest.approx(perplexity, abs=0.006)


def test_cancel_keeps_the_page_usable(page: Page, address: str):
    page.goto(f"{address}/compress?mha=60&recovery=none")
    expect(metric(page, "MHA width")).to_have_text("192")
    page.get_by_role("button", name="Prune and measure perplexity").click()
    page.get_by_role("button", name="Cancel").last.click()
    expect(page.get_by_text("was cancelled")).to_be_visible()
    page.get_by_role("slider").first.press("Home")
    expect(metric(page, "MHA width")).to_have_text("576")
    expect_no_exception(page)


def test_unknown_folder_is_refused_in_a_sentence(page: Page, address: str):
    page.goto(address)
    expect(page.locator(CHART).first).to_be_visible()
    page.get_by_role("combobox").first.click()
    page.get_by_role("option", name="Local folder").click()
    name = page.get_by_label("Checkpoint folder")
    name.fill("/no/such/folder")
    name.press("Enter")
    page.get_by_role("button", name="Load", exact=True).click()
    expect(page.get_by_test_id("stAlert")).to_contain_text("There is no model at")
    expect_no_exception(page)
