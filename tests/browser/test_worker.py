"""The worker's process is killed in the middle of a cut; the app and its other visitors go on."""

import os
import signal
from pathlib import Path

import psutil
import pytest
from playwright.sync_api import Browser, expect

from benchmarks.load import server, write_models
from tests.browser.driving import (
    TIMEOUT_MS,
    at,
    button,
    metric,
    open_with_few_tokens,
    sidebar,
)

pytestmark = pytest.mark.browser


def workers() -> set[psutil.Process]:
    """The workers of all apps that run."""
    return {
        process
        for process in psutil.Process().children(recursive=True)
        if "transact_core.workers.serve" in process.cmdline()
    }


def test_a_worker_killed_in_the_middle_of_a_cut_costs_that_cut_alone(
    browser: Browser, tmp_path: Path
):
    expect.set_options(timeout=TIMEOUT_MS)
    large = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 12}
    (folder,) = write_models(tmp_path, {"large": large})
    of_others = workers()
    with server(tmp_path) as (address, _):
        pages = []
        for mlp in (50, 20):
            page = browser.new_context(viewport={"width": 1440, "height": 900}).new_page()
            page.set_default_timeout(TIMEOUT_MS)
            place = f"{address}/compress?mha=0&mlp={mlp}"
            open_with_few_tokens(page, place, folder, 2_000, 128)
            at(page, 0, mlp)
            pages.append(page)
        mine, other = pages
        button(other, "Prune and measure perplexity").click()
        kept = metric(other, "Perplexity, measured")
        expect(kept).to_be_visible()
        figure = kept.inner_text()

        button(mine, "Prune and measure perplexity").click()
        expect(mine.get_by_text("Repairing layers").first).to_be_visible()
        (worker,) = workers() - of_others
        os.kill(worker.pid, signal.SIGKILL)
        expect(mine.get_by_text("ended from outside (SIGKILL)").first).to_be_visible()

        # The next job runs, in a new process; what the other visitor has measured is still there.
        button(mine, "Prune and measure perplexity").click()
        expect(metric(mine, "Perplexity, measured")).to_be_visible()
        (next_worker,) = workers() - of_others
        assert next_worker.pid != worker.pid
        other.reload()
        expect(kept).to_have_text(figure)
        expect(sidebar(other).get_by_text("done")).to_be_visible()
        # Nothing is half-written: what was being made is in no file of the cache.
        left = [path for path in (tmp_path / "cache").rglob("*") if "partial" in path.name]
        assert left == []
        for page in pages:
            expect(page.get_by_test_id("stException")).to_have_count(0)
            page.context.close()
