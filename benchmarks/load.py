"""Ten visitors at the same time on one server of the app, each in its own browser context.

    python -m benchmarks.load

The first visitor measures a long curve on the largest model. Meanwhile the others, each with their
own model and slider positions, request a cut at the same moment, and another one when all have
their results. There are more models than the server keeps, and some are shared, so that the least
recently used ones are released and loaded again.

The run fails if a visitor sees a job or a figure of another visitor, or a figure that differs from
what the library computes in this process; if a cut waits for more than two points of the curve; or
if no page says what a cut waits for. It prints the times of pages and cuts, and the server's
resident memory.
"""

import argparse
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import torch
from playwright.sync_api import Browser, Page, expect, sync_playwright
from playwright.sync_api import TimeoutError as PlaywrightTimeoutError

from tests.browser.driving import (
    CALIBRATION_TOKENS,
    TIMEOUT_MS,
    ask_to_open,
    at,
    button,
    go_to,
    measure_mlp_curve,
    metric,
    running_app,
    settle,
    sidebar,
    start_chromium,
)
from tests.conftest import make_model, make_tokenizer
from transact_core.base.files import cache_folder
from transact_core.data.windows import WindowSpec, make_windows
from transact_core.experiments.bench import Bench, Choices
from transact_core.experiments.sweep import Pair, most_informative_first, point_at
from transact_core.models.load import load_model
from transact_core.workers.open_models import MODELS_KEPT
from transact_core.workers.process import worker_threads

WAITING = re.compile(r"waiting, \d+ ahead: [^·\n]*[^·\n ]|next in line")
PIECES_WAITED_AT_MOST = 2
"""Points of the curve that may be measured while a cut waits: the one in progress when it was
requested, and one more, as another visitor's cut may come first."""
ROUND_SECONDS = 1800
"""Seconds after which a round of cuts counts as stuck."""
SOON_MS = 2_000
"""Milliseconds for a button to be pressed that may be gone."""
REST_SECONDS = 5
"""Seconds of rest before the memory at rest is read."""
LARGE = {
    "vocab_size": 32_000,
    "head_dim": 64,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "max_position_embeddings": 512,
}
MODELS = {
    "heavy": LARGE
    | {
        "hidden_size": 768,
        "num_attention_heads": 12,
        "num_hidden_layers": 16,
        "intermediate_size": 2048,
    },
    **{f"model-{layers}": LARGE | {"num_hidden_layers": layers} for layers in (2, 3, 4, 5, 6)},
}


@dataclass
class Visitor:
    """One browser context, its requests and the figures that it was shown."""

    page: Page
    folder: Path
    ratios: list[Pair]
    """Ratios of its cuts, in the order of the requests."""
    printed: list[str] = field(default_factory=list)
    """Perplexities on the Compress page."""
    charted: list[float] = field(default_factory=list)
    """Perplexities on the chart of the Perplexity page."""
    seconds: list[float] = field(default_factory=list)
    """From the request of each cut to its figure."""
    pieces: list[int] = field(default_factory=list)
    """Points of the curve that were measured in that time."""
    errors: list[str] = field(default_factory=list)
    """Errors of the page's scripts."""


@dataclass
class Seen:
    """Observations of one run."""

    first: Visitor
    others: list[Visitor]
    curve: list[Pair]
    """Points of the curve that were measured, in that order."""
    pieces: int = 0
    """Number of points of the curve that were seen to be measured so far."""
    page_seconds: list[float] = field(default_factory=list)
    """From opening an address to the live view."""
    words: set[str] = field(default_factory=set)
    """What the pages said that jobs were waiting for."""


# --- the server ------------------------------------------------------------------------------


class Memory(threading.Thread):
    """Resident bytes of a process and its children, twice a second until it is stopped."""

    def __init__(self, process: psutil.Process) -> None:
        super().__init__(daemon=True)
        self.process, self.samples, self._ended = process, [], threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.5):
            self.samples.append(self.now())

    def now(self) -> int:
        family = [self.process, *self.process.children(recursive=True)]
        return sum(process.memory_info().rss for process in family)

    def stop(self) -> None:
        self._ended.set()
        self.join()


@contextmanager
def server(folder: Path) -> Iterator[tuple[str, Memory]]:
    """Runs the app with its own cache; gives its address and its memory."""
    cache, converted = folder / "cache", cache_folder() / "models"
    cache.mkdir()
    if converted.is_dir():
        # Converted models are shared, measurements are not.
        (cache / "models").symlink_to(converted)
    before = set(psutil.Process().children())
    with running_app(folder / "log.txt", TRANSACT_CACHE=str(cache)) as address:
        (process,) = set(psutil.Process().children()) - before
        memory = Memory(process)
        memory.start()
        try:
            yield address, memory
        finally:
            memory.stop()


def write_models(folder: Path, models: dict[str, dict]) -> list[Path]:
    """Writes a checkpoint of random weights for each of the models."""
    tokenizer = make_tokenizer()
    for name, changes in models.items():
        make_model(**changes).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return [folder / name for name in models]


# --- what the visitors do --------------------------------------------------------------------


def come(browser: Browser, folder: Path, ratios: list[Pair]) -> Visitor:
    context = browser.new_context(viewport={"width": 1440, "height": 1400})
    page = context.new_page()
    page.set_default_timeout(TIMEOUT_MS)
    visitor = Visitor(page, folder, ratios)
    page.on("pageerror", lambda error: visitor.errors.append(str(error)))
    page.on("crash", lambda _: visitor.errors.append("the page crashed"))
    return visitor


def ratios_of(number: int, rounds: int) -> list[Pair]:
    """The ratios of one visitor's cuts; no other visitor has them."""
    return [
        (0.5 if number % 2 else 0.0, round(0.05 + 0.04 * number + 0.45 * turn, 2))
        for turn in range(rounds)
    ]


def pieces_done(page: Page) -> int:
    """Points of the curve that are done, by its visitor's sidebar; 0 while that is redrawn."""
    shown = sidebar(page).inner_text()
    if found := re.search(r"point (\d+) of", shown):
        return int(found[1]) - 1
    found = re.search(r"(\d+) of \d+ done", shown)
    return int(found[1]) if found else 0


def ask_for_cuts(seen: Seen, address: str, turn: int) -> None:
    """All visitors but the first request a cut, and wait until each has its figure."""
    for visitor in seen.others:
        mha, mlp = (round(100 * ratio) for ratio in visitor.ratios[turn])
        began = time.monotonic()
        visitor.page.goto(f"{address}/compress?mha={mha}&mlp={mlp}")
        at(visitor.page, mha, mlp)
        seen.page_seconds.append(time.monotonic() - began)
        settle(visitor.page)
    asked = {}
    for visitor in seen.others:
        button(visitor.page, "Prune and measure perplexity").click()
        seen.pieces = max(seen.pieces, pieces_done(seen.first.page))
        asked[visitor.page] = time.monotonic(), seen.pieces
        # Now, too: its cut may be done before all others are asked for.
        settle(visitor.page)
        listed = sidebar(visitor.page).inner_text()
        assert "Curve" not in listed, "a visitor sees another one's job"
        seen.words |= set(WAITING.findall(listed))
    waiting = list(seen.others)
    while waiting:
        seen.pieces = max(seen.pieces, pieces_done(seen.first.page))
        for visitor in list(waiting):
            figure = metric(visitor.page, "Perplexity, measured")
            if figure.is_visible():
                visitor.printed.append(figure.inner_text())
                began, pieces = asked[visitor.page]
                visitor.seconds.append(time.monotonic() - began)
                visitor.pieces.append(seen.pieces - pieces)
                waiting.remove(visitor)
            seen.words |= set(WAITING.findall(sidebar(visitor.page).inner_text()))
        seen.words |= set(WAITING.findall(sidebar(seen.first.page).inner_text()))
        taken = time.monotonic() - min(began for began, _ in asked.values())
        assert taken < ROUND_SECONDS, f"{len(waiting)} cuts have not come"
        time.sleep(0.5)


def charted(page: Page) -> list[float]:
    """The perplexities of the cuts in the chart of measured cuts."""
    # By its key: the page has several charts, and which of them is drawn first differs.
    return page.locator(".st-key-curve-chart .js-plotly-plot").evaluate(
        """chart => chart.data
            .filter(trace => trace.name !== 'dense').flatMap(trace => [...trace.y])"""
    )


def go_through(
    browser: Browser,
    address: str,
    folders: Sequence[Path],
    visitors: int,
    rounds: int,
    curve_points: int,
    evaluation_tokens: int,
    sequence_length: int,
) -> Seen:
    """The whole run. The first visitor has the first folder's model; the others share the rest."""
    shared = folders[1:]
    first = come(browser, folders[0], [])
    others = [
        come(browser, shared[number % len(shared)], ratios_of(number, rounds))
        for number in range(visitors - 1)
    ]
    seen = Seen(first, others, [])
    for visitor in (first, *others):
        page = "perplexity" if visitor is first else "compress"
        ask_to_open(
            visitor.page, f"{address}/{page}", visitor.folder, evaluation_tokens, sequence_length
        )
    for visitor in (first, *others):
        expect(sidebar(visitor.page).get_by_text(visitor.folder.name, exact=True)).to_be_visible()
    expect(button(first.page, "Measure the curve")).to_be_visible()
    settle(first.page)
    measure_mlp_curve(first.page, curve_points)
    begun = re.compile(r"point ([2-9]|\d\d) of|[1-9]\d* of \d+ done")
    expect(sidebar(first.page)).to_contain_text(begun)
    for turn in range(rounds):
        ask_for_cuts(seen, address, turn)

    if button(first.page, "Cancel").first.is_visible():
        # The curve may end before it can be cancelled.
        with suppress(PlaywrightTimeoutError):
            close = sidebar(first.page).get_by_role("button", name="close")
            close.click(timeout=SOON_MS)
    expect(
        sidebar(first.page).get_by_text(re.compile("Curve .* · (cancelled|done)"))
    ).to_be_visible()
    for visitor in (first, *others):
        go_to(visitor.page, "Perplexity")
        expect(visitor.page.get_by_text("All points")).to_be_visible()
        settle(visitor.page)
        visitor.charted = charted(visitor.page)
        expect(visitor.page.get_by_test_id("stException")).to_have_count(0)
        visitor.page.context.close()
    # All widths are others where the model has that many channels.
    asked = [(0.0, round(float(step), 2)) for step in np.linspace(0, 0.7, curve_points + 1)[1:]]
    seen.curve = most_informative_first(asked)[: len(first.charted)]
    return seen


# --- checks and results ----------------------------------------------------------------------


def computed(
    folder: Path, ratios: Sequence[Pair], recovery: str, evaluation_tokens: int, length: int
) -> list[float]:
    """Perplexities of cuts as this process computes them, with the app's thread count."""
    loaded = load_model(str(folder))
    spec = WindowSpec(
        calibration_tokens=CALIBRATION_TOKENS,
        evaluation_tokens=evaluation_tokens,
        sequence_length=length,
    )
    windows = make_windows(spec, loaded.tokenizer, loaded.architecture.vocab_size)
    bench, choices = Bench(loaded, *windows), Choices(recovery=recovery)
    return [point_at(bench, pair, choices).perplexity for pair in ratios]


def check(seen: Seen, evaluation_tokens: int, sequence_length: int) -> None:
    """Raises AssertionError where a promise of the module's docstring does not hold."""
    texts = evaluation_tokens, sequence_length
    curve = computed(seen.first.folder, seen.curve, "none", *texts)
    assert sorted(seen.first.charted) == sorted(curve), (seen.first.charted, curve)
    figures = set(curve)
    for number, visitor in enumerate(seen.others, start=2):
        assert visitor.errors == [], f"visitor {number}"
        mine = computed(visitor.folder, visitor.ratios, Choices.recovery, *texts)
        assert sorted(visitor.charted) == sorted(mine), (
            f"visitor {number}: {visitor.charted}, {mine}"
        )
        assert visitor.printed == [f"{figure:.2f}" for figure in mine], f"visitor {number}"
        assert max(visitor.pieces) <= PIECES_WAITED_AT_MOST, f"visitor {number}: {visitor.pieces}"
        # Equal figures could not show whose figure a visitor saw.
        assert not figures & set(mine), "two visitors have the same figure"
        figures |= set(mine)
    assert any("other visitors" in words or "another visitor" in words for words in seen.words)


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--visitors", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2, help="cuts that each visitor requests")
    parser.add_argument("--curve-points", type=int, default=20)
    chosen = parser.parse_args()
    texts = 1024, 128
    expect.set_options(timeout=TIMEOUT_MS)
    with tempfile.TemporaryDirectory(prefix="transact-load-") as name, sync_playwright() as play:
        folder = Path(name)
        folders = write_models(folder, MODELS)
        sizes = {path.name: (path / "model.safetensors").stat().st_size for path in folders}
        browser = start_chromium(play)
        with server(folder) as (address, memory):
            idle = memory.now()
            seen = go_through(
                browser,
                address,
                folders,
                chosen.visitors,
                chosen.rounds,
                chosen.curve_points,
                *texts,
            )
            time.sleep(REST_SECONDS)
            after, peak = memory.now(), max(memory.samples)
        browser.close()
        os.environ["TRANSACT_CACHE"] = str(folder / "own")
        torch.set_num_threads(worker_threads())
        check(seen, *texts)
    cuts = [seconds for visitor in seen.others for seconds in visitor.seconds]
    pieces = [count for visitor in seen.others for count in visitor.pieces]
    print(
        f"{chosen.visitors} visitors, {len(folders)} models of "
        f"{', '.join(megabytes(size) for size in sizes.values())} (together "
        f"{megabytes(sum(sizes.values()))}), of which the server keeps {MODELS_KEPT}; "
        f"{len(cuts)} cuts beside a curve of which {len(seen.curve)} points were measured.\n"
        f"Every figure is that of its own visitor, and equals the one computed here.\n"
        f"Seconds to a page: median {sorted(seen.page_seconds)[len(seen.page_seconds) // 2]:.1f}, "
        f"at worst {max(seen.page_seconds):.1f}\n"
        f"Seconds to a cut, all requested at once: first {min(cuts):.0f}, last {max(cuts):.0f}; "
        f"points of the curve meanwhile: at most {max(pieces)}\n"
        f"Resident memory: {megabytes(idle)} before the first visit, {megabytes(peak)} at its "
        f"peak, {megabytes(after)} at rest\n"
        f"Shown while waiting: {'; '.join(sorted(seen.words))}"
    )


if __name__ == "__main__":
    main()
