"""Takes the README's screenshot of the running app, with a measured cut of the built-in model.

Run from the repository root: python -m scripts.screenshots
"""

import tempfile
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

from tests.browser.driving import (
    ROOT,
    TIMEOUT_MS,
    button,
    metric,
    running_app,
    start_chromium,
)

PICTURE = ROOT / "assets" / "compress.png"
WIDTH = 1440
"""Width of the browser window in CSS pixels."""
CUT_MS = 600_000
"""Longest wait for a cut with its repair, in milliseconds."""
SETTLING_MS = 1500
"""Wait in milliseconds after the last chart is drawn, until the layout is stable."""


def take(address: str, picture: Path) -> None:
    """The Compress page with its cut measured, from the top to the end of the charts."""
    with sync_playwright() as playwright:
        browser = start_chromium(playwright)
        page = browser.new_page(viewport={"width": WIDTH, "height": 1000}, color_scheme="light")
        page.set_default_timeout(TIMEOUT_MS)
        expect.set_options(timeout=TIMEOUT_MS)
        page.goto(address)
        page.get_by_test_id("stSidebarNav").get_by_text("Compress", exact=True).click()
        page.get_by_role("button", name="Prune and measure perplexity").click()
        expect(metric(page, "Perplexity, measured")).to_be_visible(timeout=CUT_MS)
        # The damage to each layer is measured in the background, for the predictions.
        expect(button(page, "Cancel")).to_have_count(0, timeout=CUT_MS)
        expect(page.locator(".live[data-shown]")).to_be_visible()
        inside = page.get_by_test_id("stMainBlockContainer").bounding_box()
        page.set_viewport_size({"width": WIDTH, "height": round(inside["height"])})
        page.mouse.move(WIDTH - 1, 0)
        page.wait_for_timeout(SETTLING_MS)
        page.screenshot(path=picture)
        browser.close()


if __name__ == "__main__":
    with (
        tempfile.TemporaryDirectory() as folder,
        running_app(Path(folder) / "log.txt") as address,
    ):
        take(address, PICTURE)
    print(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size / 1e3:,.0f} kB")
