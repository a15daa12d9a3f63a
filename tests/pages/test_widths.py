"""Widths of their own for layers, on the pages: chosen, set by hand, drawn and taken away."""

import json

import pytest

from pages.live.skyline import by_hand_of
from pages.server import start_jobs
from pages.server.request import Cut, Request
from pages.server.visitors import Visit
from tests.pages.conftest import ended, exchange
from tests.pages.test_pages import button, live, texts, work_of
from transact_core.experiments.allocate import loss_laws
from transact_core.experiments.bench import Choices

pytestmark = pytest.mark.usefixtures("short_texts")
BY_HAND = {"mha": "50", "mlp": "30", "heads": "6h.3x2", "channels": "40h.20.24"}


@pytest.fixture
def uneven(gqa_bench):
    """The second layer of the tiny model matters little."""
    gqa_bench.loaded.model.model.layers[1].mlp.down_proj.weight.mul_(0.02)
    return gqa_bench


@pytest.fixture
def allocated(uneven, open_page):
    """The Compress page with an allocated cut measured, and that cut's visit."""
    page = open_page("compress", mha="0", mlp="40", widths="allocated", keep_layers="2")
    assert not page.exception
    return page


def test_choosing_widths_says_its_stages_and_costs_and_is_carried_out(allocated):
    page = allocated
    assert "The widths are chosen first: the error of each width and the price" in texts(page)
    assert "two trial cuts" in texts(page)
    assert live(page)["decided"] is None
    point = work_of(page, "Prune and measure perplexity").result
    assert (point.decision.widths, point.decision.keep_layers) == ("allocated", (2,))
    page.run()
    assert "The widths were allocated in" in texts(page)
    kept = by_hand_of(live(page)["decided"]["heads"], live(page)["decided"]["channels"])
    assert kept == tuple((6, len(layer.kept_channels)) for layer in point.plan.layers)
    assert kept[2] == (6, 40)
    assert kept[1][1] < kept[0][1]
    (measured,) = live(page)["measured"]
    assert measured["mlp"] == live(page)["mlp"]["option_at"][40]


def test_a_measured_cut_of_own_widths_is_drawn_on_every_page(
    opened, open_page, allocated, links_in_words, tmp_path
):
    work_of(allocated, "Prune and measure perplexity")
    allocated.text_input(key="keep_layers").set_value("").run()
    allocated.selectbox(key="widths").set_value("uniform").run()
    work_of(allocated, "Prune and measure perplexity")
    curve = open_page("perplexity")
    assert not curve.exception
    table = curve.dataframe[0].value
    assert table["widths"].tolist() == ["allocated", "uniform"]
    # Both are equally large.
    assert table["parameters"].nunique() == 1
    assert any(
        "parameters allocated costs" in chart.proto.spec for chart in curve.get("plotly_chart")
    )
    # Layers 0 to 2 of the model; the allocated one is the second of the offered cuts.
    for name in ("export", "compare", "damage", "latency", "tasks", "recover", "deploy"):
        page = open_page(name)
        assert not page.exception, name
        box = next((each for each in page.selectbox if each.label == "Cut"), None)
        if box is not None:
            (place,) = [at for at, words in enumerate(box.options) if "widths allocated" in words]
            box.select_index(place).run()
            assert not page.exception, name


def test_the_export_says_what_loads_a_cut_of_own_widths(
    opened, open_page, allocated, tmp_path, monkeypatch
):
    exchange(monkeypatch, "require_writable", lambda *_: None)
    export = open_page("export")
    assert "does not load it by itself" in export.warning[0].value
    work_of(allocated, "Prune and measure perplexity")
    export.run()
    assert not export.exception
    assert "Layer 1 keeps least: " in export.get("plotly_chart")[0].proto.spec
    assert "--widths allocated --keep-layers 2" in export.code[1].value
    export.text_input[0].set_value(str(tmp_path / "out")).run()
    work_of(export, "Write the checkpoint")
    export.run()
    assert any("load_model(" in code.value for code in export.code)
    stored = json.loads((tmp_path / "out" / "compression.json").read_text())
    assert stored["widths"] == "allocated"


def test_layers_that_do_not_exist_are_said_beside_the_field(open_page):
    page = open_page("compress", widths="traded", keep_layers="0, 9")
    assert not page.exception
    assert "0, 9 does not name layers from 0 to 2" in texts(page)
    assert page.session_state["visit"].cut.keep_layers == ()


def test_widths_of_their_own_exclude_other_choices_in_a_sentence(open_page):
    page = open_page("compress", granularity="head-dims", widths="allocated")
    assert not page.exception
    box = page.selectbox(key="widths")
    assert box.disabled
    assert "The heads of all layers have the same dimensions" in box.help
    assert page.session_state["visit"].cut.widths == "uniform"


def test_bars_in_a_link_are_a_cut_by_hand(opened, open_page):
    page = open_page("compress", **BY_HAND)
    assert not page.exception
    cut = page.session_state["visit"].cut
    assert cut.by_hand == ((6, 40), (3, 20), (3, 24))
    # The ratios are what these widths remove.
    assert cut.ratios == (round(1 - 12 / 18, 4), round(1 - 84 / 120, 4))
    assert page.selectbox(key="widths").disabled
    assert live(page)["start"]["heads"] == BY_HAND["heads"]
    assert page.query_params["channels"] == BY_HAND["channels"]
    point = work_of(page, "Prune and measure perplexity").result
    assert Cut.of(point) == cut
    page.run()
    (measured,) = live(page)["measured"]
    assert (measured["heads"], measured["channels"]) == ("6.3x2", "40.20.24")
    assert measured["mha"] is None
    # A new tab finds it, and so does the export.
    tab = open_page("compress", Visit(page.session_state["visit"].visitor))
    assert tab.session_state["visit"].cut == cut
    export = open_page("export")
    assert "widths by hand · perplexity" in export.selectbox[0].options[0]
    assert "--widths by-hand --layer-widths 6:40,3:20,3:24" in export.code[1].value
    report = open_page("perplexity")
    assert report.dataframe[0].value["widths"].tolist() == ["by-hand"]


def test_bars_that_other_choices_do_not_allow_move_or_go(open_page):
    page = open_page("compress", **BY_HAND)
    page.selectbox(key="multiple_of").set_value(8).run()
    assert page.session_state["visit"].cut.by_hand == ((6, 40), (3, 24), (3, 24))
    page.selectbox(key="granularity").set_value("kv-groups").run()
    assert page.session_state["visit"].cut.by_hand == ((6, 40), (4, 24), (4, 24))
    assert not page.exception
    page.selectbox(key="granularity").set_value("head-dims").run()
    assert page.session_state["visit"].cut.by_hand == ()
    assert "heads" not in page.query_params
    assert not page.exception


def test_nonsense_for_bars_does_not_matter(open_page):
    for heads, channels in (("6x2", "40x2"), ("six", "40x3"), ("6x9999", "40x9999"), ("6x3", "")):
        page = open_page("compress", Visit(), heads=heads, channels=channels)
        assert not page.exception
        assert page.session_state["visit"].cut.by_hand == ()


def test_prices_of_single_layers_are_offered_with_their_cost_and_then_drawn(
    opened, open_page, gqa_bench
):
    page = open_page("compress")
    assert live(page)["prices"] is None
    assert live(page)["pricing"]["words"].startswith("Takes ")
    opened.keep_prices(Request(), Choices(), loss_laws(gqa_bench, Choices()))
    page.run()
    prices = live(page)["prices"]
    assert prices["mha"]["units"] == [3, 6]
    assert prices["mlp"]["units"] == list(range(1, 41))
    assert "progress" not in live(page)["pricing"]["words"]


def test_the_rest_of_a_budget_is_filled_around_what_a_hand_has_set(
    opened, open_page, uneven, monkeypatch
):
    page = open_page("compress", **BY_HAND | {"heads": "3h.6x2"})
    visit = page.session_state["visit"]
    position, cut = page.session_state["position"], visit.cut
    # What the browser's button does.
    exchange(monkeypatch, "visit", lambda: visit)
    choices = cut.of_controls.choices
    fixed = {"mha": {0: 3}, "mlp": {0: 40}}
    about = ("fill", Request(), position, choices)
    start_jobs.start_filling((0.5, 0.3), choices, fixed, about)
    job = ended(visit.latest_job(about))
    assert job.error is None
    page.run()
    assert not page.exception
    kept = page.session_state["visit"].cut.by_hand
    assert kept == job.result
    # 28 of 40 channels in each layer are the budget, and 3 of 6 heads: the first layer has more.
    assert sum(channels for _, channels in kept) == 3 * 28
    assert sum(heads for heads, _ in kept) == 3 * 3
    assert kept[0] == (3, 40)
    assert page.query_params["channels"].startswith("40h.")
    assert opened.prices(Request(), choices) is not None
    # Filled once: the browser's undo is not undone.
    page.run()
    assert button(page, "Prune and measure perplexity") is not None
    assert page.session_state["start"][1] == 2
