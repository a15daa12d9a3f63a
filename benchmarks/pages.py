"""Response time of the live Compress page, in Chromium.

    python -m benchmarks.pages             # random scores of two large models' shapes
    python -m benchmarks.pages --builtin   # and the whole page with the built-in model

Prints for each model the seconds from opening the address until the view is drawn (the server has
made its tables before), the size of the tables that the browser receives, and the milliseconds from
a slider's input event to the frame after the one that drew the new picture.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from tests.browser.driving import TIMEOUT_MS, running_app, start_chromium

POSITIONS = [5 + 7 * step % 90 for step in range(60)]
"""Slider positions in per cent, in an order with jumps; each is drawn once."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--builtin", action="store_true", help="also the page of the real app")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = start_chromium(playwright)
        page = browser.new_page(viewport={"width": 1440, "height": 1400})
        page.set_default_timeout(TIMEOUT_MS)
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
