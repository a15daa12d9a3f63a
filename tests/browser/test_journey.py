"""The main journey on the built-in model: look, move sliders, cut, see the point, take it away."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser.driving import CHART, button, choose, metric, open_with_few_tokens

pytestmark = [pytest.mark.browser, pytest.mark.builtin]


def go_to(page: Page, name: str) -> None:
    page.get_by_test_id("stSidebarNav").get_by_text(name, exact=True).click()
    expect(page.get_by_role("heading", level=1)).to_contain_text(name)


def expect_no_exception(page: Page) -> None:
    expect(page.get_by_test_id("stAlert").filter(has_text="no longer supported")).to_have_count(0)
    expect(page.get_by_test_id("stException")).to_have_count(0)


def weights_sha256(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_journey(page: Page, address: str, tmp_path: Path):
    open_with_few_tokens(page, address)
    expect(page.get_by_test_id("stSidebar")).to_contain_text("134.5 M parameters")
    expect(page.get_by_text("Measured over 1,024 calibration tokens")).to_be_visible()

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
    mha.press("Home")
    expect(metric(page, "MHA width")).to_have_text("576")
    expect(metric(page, "MLP width")).to_have_text("1,060")
    assert "mlp=31" in page.url
    choose(page, "Importance", "activation-weight")
    expect(metric(page, "MLP width")).to_have_text("1,060")
    assert "importance=activation-weight" in page.url

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
    assert plan["importance"] == "activation-weight"

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
    open_with_few_tokens(page, f"{address}/compress?mha=60&mlp=50")
    expect(metric(page, "MHA width")).to_have_text("192")
    page.get_by_role("button", name="Prune and measure perplexity").click()
    button(page, "Cancel").last.click()
    expect(page.get_by_text("was cancelled")).to_be_visible()
    page.get_by_role("slider").first.press("Home")
    expect(metric(page, "MHA width")).to_have_text("576")
    expect_no_exception(page)


@pytest.mark.parametrize(
    ("kind", "label", "source", "sentence"),
    [
        ("Local folder", "Checkpoint folder", "{tmp_path}/none", "There is no model at"),
        ("Local folder", "Checkpoint folder", "/etc", "may not be read from the browser"),
        ("GGUF file", "GGUF file", "{tmp_path}/broken.gguf", "is truncated, corrupt or not a GGUF"),
    ],
)
def test_a_model_that_is_none_is_refused_in_a_sentence(
    page: Page, address: str, tmp_path: Path, kind: str, label: str, source: str, sentence: str
):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(range(256)))
    open_with_few_tokens(page, address)
    choose(page, "Model", kind)
    name = page.get_by_label(label, exact=True)
    name.fill(source.format(tmp_path=tmp_path))
    name.press("Enter")
    button(page, "Load").click()
    expect(page.get_by_test_id("stAlert")).to_contain_text(sentence)
    expect_no_exception(page)


@pytest.mark.parametrize(
    ("content", "sentence"), [(b"", "is empty"), (b"one\0two", "is a binary file")]
)
def test_an_uploaded_text_that_is_none_is_refused_in_a_sentence(
    page: Page, address: str, content: bytes, sentence: str
):
    open_with_few_tokens(page, address)
    choose(page, "Calibration text", "Uploaded file")
    upload = {"name": "mine.txt", "mimeType": "text/plain", "buffer": content}
    page.get_by_test_id("stFileUploader").locator("input").set_input_files(upload)
    expect(button(page, "Load")).to_be_enabled()
    button(page, "Load").click()
    expect(page.get_by_test_id("stAlert")).to_contain_text(sentence)
    expect_no_exception(page)


def test_an_output_that_holds_something_is_refused_in_a_sentence(
    page: Page, address: str, tmp_path: Path
):
    (tmp_path / "mine.txt").write_text("precious")
    open_with_few_tokens(page, address)
    go_to(page, "Export")
    folder = page.get_by_role("textbox", name="Folder on the machine")
    folder.fill(str(tmp_path))
    folder.press("Enter")
    page.get_by_role("button", name="Write the checkpoint").click()
    expect(page.get_by_test_id("stAlert")).to_contain_text("is not empty")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
