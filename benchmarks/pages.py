"""Response time of the live Compress page, in Chromium.

    python -m benchmarks.pages             # random scores of two large models' shapes
    python -m benchmarks.pages --builtin   # and the whole page with the built-in model
    python -m benchmarks.pages --during-cut  # the app at rest, then while it carries out a cut

Prints for each model the seconds from opening the address until the view is drawn (the server has
made its tables before), the size of the tables that the browser receives, and the milliseconds from
a slider's input event to the frame after the one that drew the new picture.

With `--during-cut` it prints the seconds until pages of the built-in model are drawn and their
scripts have ended, and the slider's milliseconds, at rest and in the midst of a cut, with their
ratios. Each page is drawn once before it is timed.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from tests.browser.driving import TIMEOUT_MS, button, running_app, settle, start_chromium

POSITIONS = [5 + 7 * step % 90 for step in range(60)]
"""Slider positions in per cent, in an order with jumps; each is drawn once."""
PAGES = ("activations", "importance", "redundancy", "compress", "perplexity")
ROUNDS = 3
"""Times that each page is drawn."""
DRAWN = ".live[data-shown]"
FOLLOW = """async ([side, places]) => {
    const all = [...document.querySelectorAll("[data-testid=stBidiComponentIsolated]")];
    const root = all.map(each => each.shadowRoot).find(each => each?.querySelector(".live"));
    const input = root.querySelector(`#live-${side}`), live = root.querySelector(".live");
    const frame = () => new Promise(requestAnimationFrame);
    const times = [];
    for (const place of places) {
        await frame();
        const start = performance.now();
        input.value = place;
        input.dispatchEvent(new Event("input", { bubbles: true }));
        do await frame(); while (!live.dataset.shown.split(",").includes(String(place)));
        await frame();
        times.push(performance.now() - start);
    }
    return times;
}"""
SIZE = """() => {
    const all = [...document.querySelectorAll("[data-testid=stBidiComponentIsolated]")];
    const root = all.map(each => each.shadowRoot).find(each => each?.querySelector(".live"));
    return JSON.stringify(root.live.data).length;
}"""


def measure(page: Page, name: str, address: str) -> None:
    """Prints the line of one model; the first opening, which makes the tables, is not timed."""
    page.goto(address)
    page.locator(DRAWN).wait_for()
    start = time.perf_counter()
    page.goto(address)
    page.locator(DRAWN).wait_for()
    opened = time.perf_counter() - start
    size = page.evaluate(SIZE)
    times = {side: page.evaluate(FOLLOW, [side, POSITIONS]) for side in ("mha", "mlp")}
    words = ", ".join(
        f"{side.upper()} {statistics.median(taken):.0f} (slowest {max(taken):.0f})"
        for side, taken in times.items()
    )
    print(f"{name}: drawn in {opened:.2f} s, {size / 1e3:.0f} kB; ms to the picture: {words}")


def draw(page: Page, address: str) -> float:
    """Seconds until a page is drawn from a new address, its script ended."""
    start = time.perf_counter()
    page.goto(address)
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    expect(page.locator(".js-plotly-plot, .live[data-shown]").first).to_be_visible()
    settle(page)
    return time.perf_counter() - start


def timed(page: Page, address: str) -> dict[str, float]:
    """Median seconds to each of `PAGES`, and median milliseconds of the slider."""
    found = {
        name: statistics.median(draw(page, f"{address}/{name}") for _ in range(ROUNDS))
        for name in PAGES
    }
    page.goto(f"{address}/compress")
    page.locator(DRAWN).wait_for()
    settle(page)
    found["slider"] = statistics.median(page.evaluate(FOLLOW, ["mlp", POSITIONS]))
    return found


def during_cut(page: Page, address: str) -> None:
    """Prints the times at rest and during a cut."""
    page.goto(address)
    expect(page.get_by_test_id("stSidebar").get_by_text("134.5 M parameters")).to_be_visible()
    page.goto(f"{address}/compress")
    expect(page.get_by_text("Measuring the dense model")).to_have_count(0)
    timed(page, address)
    rest = timed(page, address)
    page.goto(f"{address}/compress?mha=33&mlp=30")
    settle(page)
    button(page, "Prune and measure perplexity").click()
    under_way = page.get_by_test_id("stSidebar").get_by_text("Cut of MHA 33%, MLP 30%")
    expect(under_way).to_be_visible()
    busy = timed(page, address)
    cancel = page.get_by_test_id("stSidebar").get_by_role("button", name="close")
    assert cancel.is_visible(), "the cut had ended before all was timed"
    for name in rest:
        unit = "ms" if name == "slider" else "s"
        print(
            f"{name}: {rest[name]:.2f} {unit} at rest, {busy[name]:.2f} {unit} during a cut: "
            f"{busy[name] / rest[name]:.2f} x"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--builtin", action="store_true", help="also the page of the real app")
    parser.add_argument("--during-cut", action="store_true", help="only the app during a cut")
    options = parser.parse_args()
    expect.set_options(timeout=TIMEOUT_MS)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = start_chromium(playwright)
        page = browser.new_page(viewport={"width": 1440, "height": 1400})
        page.set_default_timeout(TIMEOUT_MS)
        if options.during_cut:
            cache = Path(folder) / "cache"
            with running_app(Path(folder) / "log.txt", TRANSACT_CACHE=str(cache)) as address:
                during_cut(page, address)
            return
        with running_app(Path(folder) / "log.txt", "tests/browser/live_page.py") as address:
            measure(page, "32 layers of 11,008 channels", f"{address}/?shape=large&predicted=1")
            measure(page, "80 layers of 14,336 channels", f"{address}/?shape=largest&predicted=1")
        if options.builtin:
            with running_app(Path(folder) / "log.txt") as address:
                page.goto(address)
                page.get_by_test_id("stSidebarNavLink").first.wait_for()
                measure(page, "built-in model, whole page", f"{address}/compress")
        browser.close()


if __name__ == "__main__":
    main()
