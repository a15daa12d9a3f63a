"""Perplexity on more than one text: chosen in the sidebar, measured, drawn and warned of."""

import json
import math
from dataclasses import replace

import pytest

from pages.server.request import Request
from pages.server.visitors import Visit
from tests.conftest import loaded_from, windows_for
from tests.pages.conftest import ended
from tests.pages.test_pages import texts, work_of
from transact_core.data.corpus import corpus_from_text, read_corpus
from transact_core.data.windows import evaluation_windows
from transact_core.experiments.bench import Bench, Choices, compress

TWO = replace(Request(), others=("builtin-code",))


@pytest.fixture
def two_texts(gqa_model, tokenizer) -> Bench:
    text = corpus_from_text("builtin-code", read_corpus("builtin-code").text[:20_000])
    code = evaluation_windows(text, tokenizer, gqa_model.config.vocab_size, 256, 32)
    return Bench(loaded_from(gqa_model, tokenizer), *windows_for(tokenizer), code)


def test_a_cut_on_another_text_is_that_of_a_bench_with_that_text_first(two_texts):
    plan = two_texts.plan(0.5, 0.3, Choices())
    _, point = compress(two_texts, plan, "least-squares")
    there = point.on_text(two_texts, 1)
    code = two_texts.others[0]
    alone = Bench(two_texts.loaded, two_texts.calibration, code)
    _, expected = compress(alone, plan, "least-squares")
    assert there.perplexity == expected.perplexity != point.perplexity
    assert (there.delta_nll, there.delta_nll_se) == (expected.delta_nll, expected.delta_nll_se)
    assert point.on_text(two_texts, 0) is point


def test_every_text_is_measured_drawn_and_named(opened, open_page, two_texts):
    opened.only_lane.worker.models._benches[TWO.bench_spec] = two_texts
    mine = Visit()
    mine.request = TWO
    ended(opened.open(TWO).dense)
    page = open_page("compress", mine)
    point = work_of(page, "Prune and measure perplexity").result
    bench = opened.open(TWO).bench.result
    there = point.on_text(bench, 1)
    page.run()
    assert not page.exception
    assert f"On Python's source code **{math.exp(there.delta_nll):.2f} ×**" in texts(page)
    # Calibrated on Python's reference, as the first text is; the second differs in kind.
    (about,) = [each for each in page.caption if "Of the calibration text's kind" in each.value]
    assert "Choose a second evaluation text" not in about.help

    page = open_page("perplexity", mine)
    assert not page.exception

    def drawn() -> dict:
        return json.loads(page.get("plotly_chart")[0].proto.spec)

    assert "Python's reference" in drawn()["layout"]["yaxis"]["title"]["text"]
    assert "are of one kind" in texts(page)
    page.segmented_control(key="perplexity-text-2").set_value(1).run()
    assert not page.exception
    assert "Python's source code" in drawn()["layout"]["yaxis"]["title"]["text"]
    assert "are of one kind" not in texts(page)
    assert f"{there.perplexity:.6f}"[:6] in page.dataframe[0].value.to_csv()
    # The curve, the texts against each other, the map and two frontiers.
    assert len(page.get("plotly_chart")) == 5


def test_with_one_text_of_the_calibration_texts_kind_a_second_is_advised(opened, open_page):
    page = open_page("compress")
    work_of(page, "Prune and measure perplexity")
    page.run()
    (about,) = [each for each in page.caption if "Of the calibration text's kind" in each.value]
    assert "Choose a second evaluation text in the sidebar" in about.help


def test_the_sidebar_takes_a_second_and_a_third_text(opened, open_app):
    page = open_app("method")
    visit = page.session_state["visit"]
    keys = "Second evaluation_kind", "Third evaluation_kind"
    assert keys[1] not in {each.key for each in page.selectbox}
    page.selectbox(key=keys[0]).set_value("Built-in code").run()
    page.selectbox(key=keys[1]).set_value("Hub dataset").run()
    load = next(each for each in page.button if each.label == "Load")
    assert load.disabled
    page.selectbox(key=keys[1]).set_value("Built-in").run()
    next(each for each in page.button if each.label == "Load").click().run()
    assert not page.exception
    assert visit.request.others == ("builtin-code", "builtin")
    # Which is the first text again.
    assert "two of these are the same text" in ended(opened.open(visit.request).bench).error
