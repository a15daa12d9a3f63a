"""Time until the Importance page of a large model is usable, in Chromium.

    python -m benchmarks.importance_page
    python -m benchmarks.importance_page --layers 80 --channels 14336 --heads 64

The app is the real one, with a bench of synthetic statistics in place of a model, so that no
weights of that size are needed. It prints the time from a click on the page's link until its charts
are drawn and its script has ended, and the time of the next change of a control.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from playwright.sync_api import Page, expect, sync_playwright

from tests.browser.driving import CHART, ROOT, choose, settle, start_chromium, wait_for_app
from transact_core.data.windows import Windows
from transact_core.experiments.bench import Bench
from transact_core.forward.perplexity import Evaluation
from transact_core.forward.statistics import SUMS
from transact_core.forward.waists import SITES
from transact_core.models.architecture import Architecture
from transact_core.models.load import LoadedModel

CHARTS = 5
"""Charts on the Importance page."""
TIMEOUT_MS = 60_000
"""Milliseconds that one action may take in the browser."""


class SyntheticBench(Bench):
    """A bench with random statistics: log-normal energies, similar to those of real channels."""

    def __init__(self, architecture: Architecture, seed: int = 0) -> None:
        windows = Windows("synthetic", "", torch.zeros(2, 8, dtype=torch.long))
        loaded = LoadedModel(
            model=SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32),
            tokenizer=None,
            architecture=architecture,
            source="synthetic",
            weight_files={},
            source_dtype=torch.float16,
        )
        super().__init__(loaded, windows, windows, save_dtype="float16", seed=seed)
        generator = torch.Generator().manual_seed(seed)
        widths = (
            architecture.mha_width,
            architecture.intermediate_size,
            architecture.hidden_size,
        )
        self._tensors = {
            f"{site}.{name}": torch.randn(
                architecture.num_hidden_layers, width, generator=generator
            )
            .double()
            .mul(1.5)
            .exp()
            for site, width in zip(SITES, widths, strict=True)
            for name in SUMS
        }
        self._losses = Evaluation(torch.ones(2, 7))

    def remember(self, what, measure):
        return self._tensors

    def dense(self, progress=None):
        return self._losses


def serve(chosen: argparse.Namespace) -> None:
    """Runs the app in this process with the synthetic bench."""
    from streamlit.web import bootstrap

    from pages.server import libraries
    from transact_core.workers import work
    from transact_core.workers.tasks import Inline

    bench = SyntheticBench(
        Architecture(
            hidden_size=chosen.heads * 128,
            intermediate_size=chosen.channels,
            num_hidden_layers=chosen.layers,
            num_attention_heads=chosen.heads,
            num_key_value_heads=chosen.heads,
            head_dim=128,
            vocab_size=32_000,
            tie_word_embeddings=False,
            attention_bias=False,
            mlp_bias=False,
        )
    )

    def open_bench(models: object, report: object, spec: object) -> SyntheticBench:
        return bench

    open_bench.__module__, open_bench.__qualname__ = work.__name__, "open_bench"
    # In this process, where the synthetic bench is.
    libraries.new_worker = Inline
    work.open_bench = open_bench
    options = {"server_port": chosen.serve, "server_headless": True}
    bootstrap.load_config_options(options)
    bootstrap.run(str(ROOT / "app.py"), False, [], options)


def go_to(page: Page, name: str, charts: int) -> float:
    """Seconds from the click on a page's link until its charts are drawn and its script ended."""
    start = time.perf_counter()
    page.get_by_test_id("stSidebarNav").get_by_text(name, exact=True).click()
    expect(page.get_by_role("heading", level=1)).to_have_text(name)
    expect(page.locator(f"{CHART} .main-svg").first).to_be_visible()
    page.wait_for_function(
        "([selector, count]) => [...document.querySelectorAll(selector)]"
        ".filter(chart => chart.querySelector('.nsewdrag')).length >= count",
        arg=[CHART, charts],
    )
    settle(page)
    return time.perf_counter() - start


def change_layer(page: Page) -> float:
    """Seconds from opening the menu of layers until the curve of the chosen layer is drawn."""
    start = time.perf_counter()
    choose(page, "Layer", "2")
    expect(page.get_by_text("Layer 2 keeps").first).to_be_visible()
    settle(page)
    return time.perf_counter() - start


def measure(chosen: argparse.Namespace) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    sizes = [f"--{name}={getattr(chosen, name)}" for name in ("layers", "channels", "heads")]
    command = [sys.executable, "-m", "benchmarks.importance_page", f"--serve={port}", *sizes]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        with log.open("w") as output:
            server = subprocess.Popen(
                command, cwd=ROOT, env=os.environ, stdout=output, stderr=subprocess.STDOUT
            )
        try:
            address = f"http://localhost:{port}"
            wait_for_app(address, server, log)
            with sync_playwright() as playwright:
                page = start_chromium(playwright).new_page(viewport={"width": 1440, "height": 1000})
                page.set_default_timeout(TIMEOUT_MS)
                expect.set_options(timeout=TIMEOUT_MS)
                page.goto(address)
                go_to(page, "Activations", 3)
                seconds = []
                for _ in range(chosen.rounds + 1):
                    seconds.append(go_to(page, "Importance", CHARTS))
                    go_to(page, "Activations", 3)
                go_to(page, "Importance", CHARTS)
                layer = change_layer(page)
        finally:
            server.terminate()
            server.wait(timeout=30)
    print(f"{chosen.layers} layers × {chosen.channels:,} channels, {chosen.heads} heads of 128:")
    print(f"first visit {seconds[0]:.2f} s")
    later = ", ".join(f"{visit:.2f}" for visit in seconds[1:])
    print(f"later visits {statistics.median(seconds[1:]):.2f} s (median of {later})")
    print(f"another layer {layer:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--channels", type=int, default=11_008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", type=int, metavar="PORT", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.serve:
        serve(chosen)
    else:
        measure(chosen)


if __name__ == "__main__":
    main()
