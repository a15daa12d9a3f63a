"""The pages that run the dense and the pruned model in turns, on the tiny model."""

from dataclasses import replace

import pytest
import torch

from pages.charts.latency_chart import latency_chart, latency_table, latency_title
from pages.server import side_by_side
from pages.server.request import Request
from tests.conftest import make_tokenizer
from tests.pages.conftest import ended
from tests.pages.test_pages import button, metrics, texts
from transact_core.experiments import side_by_side as both_models
from transact_core.experiments.bench import Choices, compress
from transact_core.experiments.side_by_side import CONTINUATION, DENSE, PRUNED, TEXT
from transact_core.forward.generation import decode, generate
from transact_core.forward.latency import LatencyPoint, Timing
from transact_core.forward.perplexity import token_losses

PROMPT = "The name is <b>bold</b>."


@pytest.fixture(autouse=True)
def own_jobs(opened, monkeypatch):
    monkeypatch.setattr(side_by_side, "workbench", lambda: opened)
    return opened


def found(page, what):
    return page.session_state["visit"].visitor.of(Request()).found[what]


def answered(open_page):
    page = open_page("compare")
    assert not page.exception
    page.text_area(key="prompt").set_value(PROMPT)
    page.number_input(key="new_tokens").set_value(12).run()
    button(page, "Run both").click().run()
    comparison = found(page, "compare")
    assert ended(comparison.job).error is None
    page.run()
    assert not page.exception
    return page, comparison


def test_both_models_answer_and_are_scored_on_the_same_texts(open_page, gqa_bench):
    page, comparison = answered(open_page)
    assert page.toggle(key="chat").disabled
    cut = comparison.cut
    plan = gqa_bench.plan(cut.mha_ratio, cut.mlp_ratio, cut.choices)
    models = {
        DENSE: gqa_bench.loaded.model,
        PRUNED: compress(gqa_bench, plan, cut.recovery)[0],
    }
    ids = gqa_bench.loaded.tokenizer(PROMPT)["input_ids"]
    for name, model in models.items():
        expected = [token.id for token in generate(model, ids, 12)]
        assert [token.id for token in comparison.tokens[name]] == expected
        answer = ids + [token.id for token in comparison.tokens[DENSE]]
        torch.testing.assert_close(
            comparison.losses[CONTINUATION].losses[name], token_losses(model, torch.tensor(answer))
        )
        torch.testing.assert_close(
            comparison.losses[TEXT].losses[name], token_losses(model, torch.tensor(ids))
        )
    table, losses = page.dataframe[0].value, comparison.losses[CONTINUATION].losses
    for name in models:
        scored = losses[name][len(ids) - 1 :]
        assert len(scored) == 12
        assert table[f"{name}_nll"].sum() == pytest.approx(scored.sum().item(), rel=1e-5)
    # The measured cut is a point like any other.
    assert [point.plan for point in page.session_state["visit"].visitor.of(Request()).points] == [
        plan
    ]


def test_what_models_and_users_write_is_no_markup(open_page, gqa_bench):
    page, comparison = answered(open_page)
    page.segmented_control(key="marked_text").set_value("My text").run()
    assert "<b>" not in page.html[-1].value
    assert "&lt;" in page.html[-1].value
    shown = "".join(each.value for each in page.html)
    made = decode(gqa_bench.loaded.tokenizer, [token.id for token in comparison.tokens[DENSE]])
    assert ("<" in made) == ("&lt;" in page.html[0].value)
    assert "<script" not in shown


def test_an_empty_prompt_is_refused_in_a_sentence(open_page):
    page = open_page("compare")
    page.text_area(key="prompt").set_value(" ").run()
    button(page, "Run both").click().run()
    ended(page.session_state["visit"].visitor.jobs[-1])
    page.run()
    assert not page.exception
    assert [error.value for error in page.error] == [
        "Generating side by side failed. The prompt is empty; write something to go on from."
    ]


def test_a_prompt_with_a_token_that_has_no_embedding_is_refused_in_a_sentence(open_page, gqa_bench):
    larger = make_tokenizer()
    larger.add_tokens(["<extra>"])
    gqa_bench.loaded = replace(gqa_bench.loaded, tokenizer=larger)
    page = open_page("compare")
    page.text_area(key="prompt").set_value("an <extra> one").run()
    button(page, "Run both").click().run()
    ended(page.session_state["visit"].visitor.jobs[-1])
    page.run()
    assert not page.exception
    assert "'\\<extra\\>' with the id 320" in page.error[0].value


def test_a_prompt_that_does_not_fit_is_refused_in_a_sentence(open_page):
    page = open_page("compare")
    page.text_area(key="prompt").set_value("word " * 300).run()
    button(page, "Run both").click().run()
    ended(page.session_state["visit"].visitor.jobs[-1])
    page.run()
    assert "shorten it" in page.error[0].value


def test_a_cancelled_answer_stays_as_far_as_it_came(open_page, monkeypatch):
    real = both_models.in_turns

    def cancelling(streams):
        for number, each in enumerate(real(streams)):
            if number == 6:
                visit.visitor.jobs[-1].cancel()
            yield each

    monkeypatch.setattr(both_models, "in_turns", cancelling)
    page = open_page("compare")
    visit = page.session_state["visit"]
    button(page, "Run both").click().run()
    ended(visit.visitor.jobs[-1])
    page.run()
    assert not page.exception
    assert "was cancelled" in texts(page)
    assert [len(tokens) for tokens in found(page, "compare").tokens.values()] == [4, 3]
    assert "Where the loss changed" not in [each.value for each in page.subheader]


def test_both_models_are_timed(open_page):
    page = open_page("latency")
    assert not page.exception
    page.multiselect(key="lengths").set_value([16, 32])
    page.number_input(key="repeats").set_value(2).run()
    button(page, "Time both models").click().run()
    run = found(page, "latency")
    assert ended(run.job).error is None
    page.run()
    assert not page.exception
    assert [(point.model, point.length) for point in run.points] == [
        (DENSE, 16),
        (PRUNED, 16),
        (DENSE, 32),
        (PRUNED, 32),
    ]
    assert "other jobs waited" in texts(page)
    assert "Memory is not measured" in texts(page)
    assert "working_bytes" not in page.dataframe[0].value
    assert metrics(page) == {}


def timed(model: str, length: int, prefill: float, decode: float) -> LatencyPoint:
    return LatencyPoint(model, length, Timing((prefill,)), Timing((decode, 3 * decode)), None)


def test_the_title_is_the_ratio_at_the_longest_prompt_both_have():
    points = [
        timed(DENSE, 8, 1, 1),
        timed(PRUNED, 8, 1, 1),
        timed(DENSE, 16, 2, 4),
        timed(PRUNED, 16, 1, 3),
        timed(DENSE, 32, 9, 9),
    ]
    assert latency_title(points) == (
        "After 16 tokens the pruned model takes 0.50 × the dense one's time in prefill, 0.75 × (within the spread) in decode"
    )
    assert latency_title(points[:1]) == "No length is timed yet"
    figure = latency_chart(points)
    assert list(figure.data[0].y) == [1000, 2000, 9000]
    assert figure.data[3].error_y.arrayminus == figure.data[3].error_y.array == (500, 1500)
    table = latency_table(points)
    assert table["decode_tokens_per_s"].tolist()[:2] == [0.5, 0.5]


@pytest.mark.parametrize("name", ["compare", "latency", "perplexity", "export"])
def test_a_page_begins_with_its_title(open_page, name):
    # Unless its configuration says otherwise, Streamlit draws strings that document constants.
    assert open_page(name).main[0].type == "title"


def test_choices_that_are_not_prepared_come_first(open_page):
    page = open_page("compress", importance="magnitude")
    assert page.session_state["visit"].cut.choices == Choices(importance="magnitude")
    for name in ("compare", "latency"):
        assert not open_page(name).exception
