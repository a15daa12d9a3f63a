"""Many visitors at once: a small version of `python -m benchmarks.load`, without its figures."""

from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser, expect

from benchmarks.load import check, go_through, server, write_models
from tests.browser.driving import TIMEOUT_MS
from transact_core.workers.process import worker_threads

pytestmark = [pytest.mark.browser, pytest.mark.builtin]
"""They need the built-in model, because the first page of a server begins to open it."""

MODELS = {
    # Large enough that a point of its curve takes seconds, also on a fast machine.
    "long": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8},
    **{f"small-{layers}": {"num_hidden_layers": layers} for layers in (2, 3)},
}
TEXTS = 2_400, 128
"""Evaluation tokens and sequence length."""


@pytest.fixture
def app_s_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(worker_threads())
    yield
    torch.set_num_threads(before)


def test_each_of_many_visitors_has_its_own(
    browser: Browser, tmp_path: Path, monkeypatch, app_s_threads
):
    expect.set_options(timeout=TIMEOUT_MS)
    folders = write_models(tmp_path, MODELS)
    with server(tmp_path) as (address, _):
        seen = go_through(browser, address, folders, 3, 1, 12, *TEXTS)
    monkeypatch.setenv("TRANSACT_CACHE", str(tmp_path / "own"))
    check(seen, *TEXTS)
