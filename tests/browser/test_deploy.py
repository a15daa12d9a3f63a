"""From a cut to a GGUF file, and to the picture that says which file to take away."""

from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser.driving import CHART, button, open_with_few_tokens, settle
from tests.trust.installed import require_llama_cpp_installed

pytestmark = pytest.mark.browser


def test_a_file_is_written_and_weighed_against_others(
    page: Page, address: str, checkpoint: Path, tmp_path: Path
):
    require_llama_cpp_installed()
    open_with_few_tokens(page, f"{address}/export", checkpoint, 256, 64)
    expect(page.get_by_text("which pruning leaves as they are").first).to_be_visible()
    place = page.get_by_label("File on the machine that runs this app", exact=True)
    place.fill(str(tmp_path / "cut.gguf"))
    place.press("Enter")
    settle(page)
    button(page, "Write the file").click()
    expect(page.get_by_text("perplexity").and_(page.get_by_text("Written to"))).to_be_visible()
    size = (tmp_path / "cut.gguf").stat().st_size
    expect(page.get_by_text(f"({size:,} bytes)")).to_be_visible()

    page.get_by_role("link", name="Deploy").click()
    expect(page.get_by_text("Nothing is measured in llama.cpp yet")).to_be_visible()
    page.get_by_text("Time them too").click()
    settle(page)
    button(page, "Measure 8 files").click()
    expect(button(page, "All of these are measured")).to_be_visible()
    settle(page)
    expect(page.get_by_text("For size, ")).to_be_visible()
    expect(page.locator(CHART)).to_have_count(1)
    expect(page.get_by_text("8 files of 8")).to_be_visible()
    with page.expect_download() as saved:
        page.get_by_test_id("stDownloadButton").last.get_by_role("button").click()
    lines = Path(saved.value.path()).read_text().splitlines()
    assert len(lines) == 9
    assert lines[0].startswith("model,type,MB,perplexity")
    expect(page.get_by_text("llama-bench -m out.gguf -p 256 -n 64")).to_be_visible()
    expect(page.get_by_test_id("stException")).to_have_count(0)
