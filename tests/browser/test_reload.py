"""A reload during a sweep. Several visitors at once are in `test_load`.

The model is small, so that it opens quickly. The text is long, so that a point takes a moment.
"""

from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser.driving import (
    button,
    measure_mlp_curve,
    open_with_few_tokens,
    sidebar,
)
from tests.conftest import make_model

pytestmark = [pytest.mark.browser, pytest.mark.builtin]
"""They need the built-in model, because the first page of a server begins to open it."""

CURVE = "Curve up to MHA 0%, MLP 70%"


@pytest.fixture(scope="module")
def model_folder(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(hidden_size=96, intermediate_size=256, num_hidden_layers=4).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def wait_for_points(page: Page, least: int) -> None:
    """Waits until at least so many cuts are on the chart.

    The recorded curve that stands there until there is a point does not count, and neither does
    another chart that is drawn before it.
    """
    page.wait_for_function(
        """least => {
            const chart = document.querySelector('.st-key-curve-chart .js-plotly-plot');
            const traces = chart?.data?.filter(trace => trace.name !== 'dense') ?? [];
            return traces.reduce((sum, trace) => sum + trace.x.length, 0) >= least;
        }""",
        arg=least,
    )


def test_a_reload_in_the_middle_of_a_sweep(page: Page, address: str, model_folder: Path):
    open_with_few_tokens(page, f"{address}/perplexity", model_folder, 24_000, 64)
    expect(button(page, "Measure the curve")).to_be_visible()
    measure_mlp_curve(page, 20)
    # A reload before the click has reached the server would lose it.
    expect(sidebar(page).get_by_text(CURVE)).to_be_visible()
    wait_for_points(page, 1)

    page.reload()
    expect(sidebar(page).get_by_text(CURVE)).to_be_visible()
    expect(button(page, "Cancel")).to_be_visible()
    wait_for_points(page, 1)
    expect(page.get_by_label("Checkpoint folder", exact=True)).to_have_value(str(model_folder))
    expect(button(page, "Load")).to_be_disabled()

    tab = page.context.new_page()
    tab.goto(f"{address}/perplexity")
    expect(sidebar(tab).get_by_text(CURVE)).to_be_visible()
    assert "?" not in tab.url
    tab.close()

    # The reloaded page still follows the job, and can cancel it.
    wait_for_points(page, 2)
    sidebar(page).get_by_role("button", name="close").click()
    expect(sidebar(page).get_by_text(f"{CURVE} · cancelled")).to_be_visible()
    wait_for_points(page, 2)
    expect(page.get_by_test_id("stException")).to_have_count(0)
