"""A curve from the Perplexity page to a Ray cluster on this machine, and a second one cancelled."""

import sqlite3
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from playwright.sync_api import Browser, Page, expect

from benchmarks.load import write_models
from tests.browser.driving import (
    TIMEOUT_MS,
    button,
    choose,
    measure_mlp_curve,
    open_with_few_tokens,
    running_app,
    sidebar,
)
from tests.workers.ray_nodes import ray_nodes, ray_workers
from transact_core.workers.process import worker_threads

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        find_spec("ray") is None, reason="Ray is not installed here: run `make ray`"
    ),
]

POINTS = 8


def kept_points(cache: Path) -> int:
    with closing(sqlite3.connect(cache / "results.sqlite")) as database:
        return database.execute("SELECT count(*) FROM points").fetchone()[0]


def test_a_curve_goes_to_the_cluster_and_can_be_cancelled(browser: Browser, tmp_path: Path):
    expect.set_options(timeout=TIMEOUT_MS)
    (folder,) = write_models(tmp_path, {"small": {}})
    cache = tmp_path / "cache"
    with (
        # Two workers, with as many threads as the app's own.
        ray_nodes([2 * worker_threads()]) as cluster,
        running_app(
            tmp_path / "log.txt", TRANSACT_CACHE=str(cache), TRANSACT_RAY=cluster
        ) as address,
    ):
        page: Page = browser.new_context(viewport={"width": 1440, "height": 900}).new_page()
        page.set_default_timeout(TIMEOUT_MS)
        open_with_few_tokens(page, f"{address}/perplexity", folder)
        expect(page.get_by_text(f"on the Ray cluster at {cluster}")).to_be_visible()
        measure_mlp_curve(page, POINTS, "least-squares")
        expect(page.get_by_text("Measuring on Ray, 2 workers").first).to_be_visible()
        expect(sidebar(page).get_by_text("Curve up to MHA 0%, MLP 70% · done")).to_be_visible()
        assert kept_points(cache) == POINTS

        choose(page, "Cut", "Both")
        button(page, "Measure the curve").click()
        button(page, "Cancel").first.click()
        expect(page.get_by_text("was cancelled").first).to_be_visible()
        assert not psutil.wait_procs(ray_workers(), timeout=30)[1]
        assert POINTS <= kept_points(cache) < 2 * POINTS
        expect(page.get_by_test_id("stException")).to_have_count(0)
        page.context.close()
