"""Jobs of several visitors in a real browser: a reload during a sweep, and two visitors at once.

The model is small, so that it opens quickly. The text is long, so that a point takes a moment.
"""

from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.driving import (
    TIMEOUT_MS,
    button,
    measure_mlp_curve,
    open_with_few_tokens,
    settle,
    sidebar,
)
from tests.conftest import make_model

pytestmark = [pytest.mark.browser, pytest.mark.builtin]
"""They need the built-in model, because the first page of a server begins to open it."""

CURVE = "Curve up to MHA 0%, MLP 70%"
DONE = f"{CURVE} · done"


@pytest.fixture(scope="module")
def model_folder(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(hidden_size=96, intermediate_size=256, num_hidden_layers=4).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def another_page(browser: Browser):
    """A page of another visitor, in a browser context of its own."""
    context = browser.new_context(viewport={"width": 1440, "height": 1400})
    page = context.new_page()
    page.set_default_timeout(TIMEOUT_MS)
    yield page
    context.close()


def open_tiny_model(page: Page, address: str, folder: Path, evaluation_tokens: int) -> None:
    open_with_few_tokens(page, f"{address}/perplexity", folder, evaluation_tokens, 64)
    expect(button(page, "Measure the curve")).to_be_visible()


def wait_for_points(page: Page, condition: str) -> None:
    """Waits until a JavaScript condition holds for `points`, the number of cuts on the chart.

    The recorded curve that stands there until there is a point does not count, and neither does
    another chart that is drawn before it.
    """
    page.wait_for_function(
        """condition => {
            const chart = document.querySelector('.st-key-curve-chart .js-plotly-plot');
            const traces = chart?.data?.filter(trace => trace.name !== 'dense') ?? [];
            const points = traces.reduce((sum, trace) => sum + trace.x.length, 0);
            return new Function('points', `return ${condition}`)(points);
        }""",
        arg=condition,
    )


def test_a_reload_in_the_middle_of_a_sweep(page: Page, address: str, model_folder: Path):
    open_tiny_model(page, address, model_folder, 24_000)
    measure_mlp_curve(page, 20)
    # A reload before the click has reached the server would lose it.
    expect(sidebar(page).get_by_text(CURVE)).to_be_visible()
    wait_for_points(page, "points >= 1")

    page.reload()
    expect(sidebar(page).get_by_text(CURVE)).to_be_visible()
    expect(button(page, "Cancel")).to_be_visible()
    wait_for_points(page, "points >= 1")
    expect(page.get_by_label("Checkpoint folder", exact=True)).to_have_value(str(model_folder))
    expect(button(page, "Load")).to_be_disabled()

    tab = page.context.new_page()
    tab.goto(f"{address}/perplexity")
    expect(sidebar(tab).get_by_text(CURVE)).to_be_visible()
    assert "?" not in tab.url
    tab.close()

    # The reloaded page still follows the job, and can cancel it.
    wait_for_points(page, "points >= 2")
    sidebar(page).get_by_role("button", name="close").click()
    expect(sidebar(page).get_by_text(f"{CURVE} · cancelled")).to_be_visible()
    wait_for_points(page, "points >= 2")
    expect(page.get_by_test_id("stException")).to_have_count(0)


def test_two_visitors_at_once(page: Page, another_page: Page, address: str, model_folder: Path):
    # Another number of tokens than in the test above, so that no point is kept from there.
    open_tiny_model(page, address, model_folder, 22_000)
    open_tiny_model(another_page, address, model_folder, 22_000)
    measure_mlp_curve(page, 20)
    expect(sidebar(page).get_by_text(CURVE)).to_be_visible()

    # The second visitor does not see the first one's job, and gets a turn before it ends.
    another_page.reload()
    expect(button(another_page, "Measure the curve")).to_be_visible()
    settle(another_page)
    expect(sidebar(another_page).get_by_text("Curve")).to_have_count(0)
    # A cut that the first visitor does not measure; otherwise its result would be kept already.
    measure_mlp_curve(another_page, 1, "bias")
    expect(sidebar(another_page).get_by_text(DONE)).to_be_visible()
    expect(sidebar(page).get_by_text(DONE)).to_have_count(0)
    wait_for_points(another_page, "points === 1")

    # The first visitor cancels; both keep their points.
    sidebar(page).get_by_role("button", name="close").click()
    expect(sidebar(page).get_by_text(f"{CURVE} · cancelled")).to_be_visible()
    wait_for_points(page, "points >= 1")
    expect(sidebar(another_page).get_by_text(DONE)).to_be_visible()
    for visitor in (page, another_page):
        expect(visitor.get_by_test_id("stException")).to_have_count(0)
