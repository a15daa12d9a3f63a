"""The main journey on the built-in model: move the sliders, cut, see the point, export it."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser.driving import (
    CHART,
    at,
    button,
    choose,
    go_to,
    metric,
    open_with_few_tokens,
    settle,
    slider,
)

pytestmark = [pytest.mark.browser, pytest.mark.builtin]

STOCK = """
import json, math, sys
import pydoc_data.topics
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, tokens, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder)
topics = pydoc_data.topics.topics
text = "\\n\\n".join(topics[name] for name in sorted(topics))
ids = tokenizer(text[: 10 * tokens], return_tensors="pt")["input_ids"][0, :tokens]
total, count = 0.0, 0
with torch.no_grad():
    for start in range(0, tokens - length + 1, length):
        window = ids[None, start : start + length]
        loss = model(window, labels=window).loss
        total, count = total + loss.item() * (length - 1), count + length - 1
prompt = [{"role": "user", "content": "Name a colour."}]
chat = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt")
generated = model.generate(**chat, max_new_tokens=8, do_sample=False)
print(json.dumps({"class": type(model).__name__, "perplexity": math.exp(total / count),
                  "new": generated.shape[1] - chat["input_ids"].shape[1],
                  "parameters": sum(weight.numel() for weight in model.parameters())}))
"""


def expect_no_exception(page: Page) -> None:
    expect(page.get_by_test_id("stAlert").filter(has_text="no longer supported")).to_have_count(0)
    expect(page.get_by_test_id("stException")).to_have_count(0)


def weights_sha256(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_journey(page: Page, address: str, tmp_path: Path):
    open_with_few_tokens(page, address)
    expect(page.get_by_test_id("stSidebar")).to_contain_text("134.5 M parameters")
    expect(page.get_by_role("heading", level=1)).to_contain_text("Start here")

    go_to(page, "Activations")
    expect(page.get_by_text("over 512 calibration tokens")).to_be_visible()

    go_to(page, "Importance")
    expect(page.locator(CHART)).to_have_count(5)
    expect_no_exception(page)

    go_to(page, "Compress")
    numbers = page.locator(".numbers")
    expect(numbers).to_contain_text("384 of 576")
    expect(numbers).to_contain_text("1,075 of 1,536")
    slider(page, "MLP").press("ArrowRight")
    expect(numbers).to_contain_text("1,060 of 1,536")
    slider(page, "MHA").press("End")
    expect(numbers).to_contain_text("192 of 576")
    slider(page, "MHA").press("Home")
    expect(numbers).to_contain_text("576 of 576")
    expect(page).to_have_url(re.compile("mha=0&mlp=31"))
    choose(page, "Importance", "activation-weight")
    expect(page).to_have_url(re.compile("importance=activation-weight"))
    at(page, 0, 31)
    slider(page, "MHA").fill("33")
    at(page, 33, 31)
    expect(numbers).to_contain_text("384 of 576")

    # So narrow that the repairs, here and by `apply`, are soon done.
    slider(page, "MLP").fill("80")
    at(page, 33, 80)
    expect(numbers).to_contain_text("307 of 1,536")
    page.get_by_role("button", name="Prune and measure perplexity").click()
    measured = metric(page, "Perplexity, measured")
    expect(measured).to_be_in_viewport()
    perplexity = float(measured.inner_text())
    assert perplexity > 1
    expect_no_exception(page)

    go_to(page, "Perplexity")
    # The curve, the map and two frontiers.
    expect(page.locator(CHART)).to_have_count(4)
    series = page.locator(CHART).first.evaluate(
        "chart => chart.data.map(trace => [trace.name, Array.from(trace.y.bdata ? [] : trace.y)])"
    )
    points = dict(series)
    assert points["both, least-squares"] == [pytest.approx(perplexity, abs=0.006)]
    assert points["dense"][0] < perplexity
    expect_no_exception(page)

    go_to(page, "Export")
    with page.expect_download() as download:
        page.get_by_role("button", name="compression.json").click()
    configuration = tmp_path / "compression.json"
    download.value.save_as(configuration)
    plan = json.loads(configuration.read_text())["plan"]
    assert (plan["mha_ratio"], plan["mlp_ratio"]) == (0.33, 0.8)
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
    assert (report["pruned"]["mha_width"], report["pruned"]["mlp_width"]) == (6 * 64, 307)
    assert report["dense"]["parameters"] == 134_515_008
    assert report["dense"]["perplexity"] < report["pruned"]["perplexity"]

    # Nothing but stock transformers.
    stock = subprocess.run(
        [sys.executable, "-c", STOCK, str(applied), "512", "128"],
        check=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        cwd=tmp_path,
    )
    seen = json.loads(stock.stdout.splitlines()[-1])
    assert seen["class"] == "LlamaForCausalLM"
    assert seen["perplexity"] == pytest.approx(report["pruned"]["perplexity"], rel=1e-4)
    assert seen["parameters"] == report["pruned"]["parameters"]
    assert 1 <= seen["new"] <= 8


def test_cancel_keeps_the_page_usable(page: Page, address: str):
    open_with_few_tokens(page, f"{address}/compress?mha=60&mlp=50")
    at(page, 60, 50)
    # On a common screen size, the progress of the cut is in view and the page does not move.
    page.set_viewport_size({"width": 1440, "height": 900})
    prune = page.get_by_role("button", name="Prune and measure perplexity")
    expect(prune).to_be_enabled()
    settle(page)
    before = slider(page, "MHA").bounding_box()
    prune.click()
    progress = page.get_by_test_id("stMain").get_by_text("Cut of MHA 60%")
    cancel = button(page, "Cancel").last
    expect(progress).to_be_in_viewport()
    expect(cancel).to_be_in_viewport()
    assert slider(page, "MHA").bounding_box() == before
    page.mouse.move(900, 700)
    page.mouse.wheel(0, 2000)
    expect(slider(page, "MHA")).not_to_be_in_viewport()
    expect(progress).to_be_in_viewport()
    cancel.click()
    expect(page.get_by_text("was cancelled").first).to_be_in_viewport()
    page.mouse.wheel(0, -2000)
    slider(page, "MHA").press("Home")
    at(page, 0, 50)
    expect_no_exception(page)


def test_a_link_reopens_its_view_and_another_page_keeps_it(page: Page, address: str):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    open_with_few_tokens(page, f"{address}/compress")
    slider(page, "MHA").press("End")
    choose(page, "Granularity", "kv-groups")
    page.get_by_label("Context of").fill("4096")
    at(page, 95, 30, 4096)
    for part in ("mha=95", "mlp=30", "context=4096"):
        expect(page).to_have_url(re.compile(part))
    go_to(page, "Activations")
    go_to(page, "Compress")
    at(page, 95, 30, 4096)
    expect(page.get_by_role("combobox", name="Granularity")).to_have_value("kv-groups")

    button(page, "Copy link").click()
    expect(button(page, "Copied")).to_be_visible()
    link = page.evaluate("navigator.clipboard.readText()")
    slider(page, "MLP").press("Home")
    at(page, 95, 0, 4096)
    page.goto(link)
    at(page, 95, 30, 4096)
    expect(page.get_by_role("combobox", name="Granularity")).to_have_value("kv-groups")
    expect(page.locator(".words").first).to_contain_text("3 of 9 query heads stay, over 1 of 3")

    # A link on the first page opens its own choices, whatever was chosen before.
    go_to(page, "Start here")
    page.get_by_role("link", name="Open this very cut").click()
    at(page, 33, 30, 4096)
    expect(page.get_by_role("combobox", name="Granularity")).to_have_value("query-heads")
    expect_no_exception(page)


REFUSED_MODELS = [
    ("Local folder", "Checkpoint folder", "{tmp_path}/none", "There is no model at"),
    ("Local folder", "Checkpoint folder", "/etc", "may not be read from the browser"),
    ("GGUF file", "GGUF file", "{tmp_path}/broken.gguf", "is truncated, corrupt or not a GGUF"),
]
"""Kind of the source, label of its field, what is filled in, and a part of what is said."""
REFUSED_TEXTS = [(b"", "is empty"), (b"one\0two", "is a binary file")]
"""Content of an uploaded file, and a part of what is said."""


def test_what_cannot_be_used_is_refused_in_a_sentence(page: Page, address: str, tmp_path: Path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(range(256)))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.txt").write_text("precious")
    open_with_few_tokens(page, f"{address}/export")
    refused = page.get_by_test_id("stAlert")
    folder = page.get_by_role("textbox", name="Folder on the machine")
    folder.fill(str(tmp_path / "mine"))
    folder.press("Enter")
    page.get_by_role("button", name="Write the checkpoint").click()
    expect(refused.filter(has_text="Writing the checkpoint failed")).to_contain_text("is not empty")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["mine.txt"]

    choose(page, "Calibration text", "Uploaded file")
    for content, sentence in REFUSED_TEXTS:
        upload = {"name": f"{sentence}.txt", "mimeType": "text/plain", "buffer": content}
        page.get_by_test_id("stFileUploader").locator("input").set_input_files(upload)
        expect(page.get_by_test_id("stFileUploader")).to_contain_text(upload["name"])
        settle(page)
        button(page, "Load").click()
        expect(refused.filter(has_text=sentence)).to_be_visible()

    choose(page, "Calibration text", "Built-in")
    for kind, label, source, sentence in REFUSED_MODELS:
        choose(page, "Model", kind)
        name = page.get_by_label(label, exact=True)
        name.fill(source.format(tmp_path=tmp_path))
        name.press("Enter")
        settle(page)
        button(page, "Load").click()
        expect(refused.filter(has_text=sentence)).to_be_visible()
    expect_no_exception(page)
