"""What the pages make of the choices, on the tiny model and without a browser."""

import json
import math
import re
import threading

import pytest
from streamlit.testing.v1 import AppTest

from pages.parts import progress
from pages.parts.example import example
from pages.server.request import Cut, Request
from pages.server.visitors import Visit
from tests.pages.conftest import ended
from transact_core.base.errors import TransActError, silent
from transact_core.experiments import results
from transact_core.experiments.bench import Choices
from transact_core.importance.scores import IMPORTANCES, register, score
from transact_core.pruning.plan import GRANULARITIES
from transact_core.workers import work


@pytest.fixture
def gated(opened, monkeypatch):
    """An importance that takes until it is let through; the gate."""
    gate = threading.Event()
    monkeypatch.setitem(IMPORTANCES, "gated", None)
    monkeypatch.setattr(progress, "SOON", 0.01)

    @register("gated")
    def gated(evidence):
        """Waits for its gate."""
        evidence._progress("Waiting", 0, 2)
        gate.wait(10)
        evidence._progress("Waiting", 1, 2)
        return score("activation", evidence)

    yield gate
    gate.set()


def texts(page) -> str:
    blocks = [*page.caption, *page.markdown, *page.info, *page.error]
    return "\n".join(block.value for block in blocks)


def metrics(page) -> dict[str, str]:
    return {metric.label: metric.value for metric in page.metric}


def live(page) -> dict:
    """What the live view was given, and in words and numbers what it shows at its position."""
    given = json.loads(page.get("bidi_component")[0].proto.json)
    at = page.session_state["position"]
    mha, mlp = (
        side["options"][side["option_at"][place]]
        for side, place in ((given["mha"][0], at.mha), (given["mlp"], at.mlp))
    )
    costs = {
        name: dense - mha["saving"][name] - mlp["saving"][name]
        for name, dense in given["dense"].items()
    }
    return {**given, "mha_at": mha, "mlp_at": mlp, "costs": costs}


def button(page, label: str):
    return next((each for each in page.button if each.label == label), None)


def work_of(page, label: str):
    """The job that a button starts, once it has ended without an error."""
    button(page, label).click().run()
    job = ended(page.session_state["visit"].visitor.jobs[-1])
    assert job.error is None
    return job


def preparation(opened, choices: Choices):
    return opened.prepare(Request(), choices)


def test_each_importance_gives_a_plan(opened, open_page):
    page = open_page("compress")
    for importance in IMPORTANCES:
        page.selectbox(key="importance").set_value(importance).run()
        ended(preparation(opened, Choices(importance=importance)))
        page.run()
        assert not page.exception
        assert live(page)["maps"], importance
        assert page.session_state["visit"].cut.importance == importance


def test_whole_heads_are_shown_by_their_numbers(open_page):
    page = open_page("compress")
    assert live(page)["mha_at"]["words"] == "3 of 6 query heads stay, over 3 of 3 KV heads."
    assert live(page)["mha"][0]["possible"] == "Possible here: 3, 6."
    assert live(page)["mlp_at"]["words"] == "28 of 40 channels stay in each layer."


def test_narrower_heads_are_shown_by_their_dims(open_page):
    page = open_page("compress", granularity="head-dims")
    assert not page.exception
    assert live(page)["mha_at"]["words"] == "Every head keeps 6 of 8 dims, 3 of 4 rotary pairs."
    assert "those of pairs" in texts(page)
    assert live(page)["mha_at"]["width"] == 36
    # 3 layers, keys and values of 3 heads of 6 dims.
    assert live(page)["costs"]["kv_values"] == 3 * 2 * 3 * 6
    page = open_page("compress", granularity="head-dims", mha="0")
    assert not page.exception
    assert live(page)["mha_at"]["words"] == "Every head keeps 8 of 8 dims, 4 of 4 rotary pairs."


def test_parameters_of_a_repair_by_bias_are_counted(open_page):
    page = open_page("compress")
    before = live(page)["costs"]["parameters"]
    page.selectbox(key="recovery").set_value("bias").run()
    # Biases of queries, keys, values and outputs; of gate, up and down.
    more = 3 * (3 * 8 + 2 * 3 * 8 + 48 + 2 * 28 + 48)
    assert live(page)["costs"]["parameters"] == before + more


def test_scoring_is_shown_and_shared_and_the_page_goes_on_after_it(opened, open_page, gated):
    page = open_page("compress", importance="gated")
    job = preparation(opened, Choices(importance="gated"))
    assert not job.finished
    assert live(page)["maps"] is None
    assert button(page, "Cancel") is not None
    page.selectbox(key="recovery").set_value("none").run()
    assert preparation(opened, Choices(importance="gated", recovery="none")) is job
    gated.set()
    ended(job)
    page.run()
    assert live(page)["maps"]


def test_cancelled_scoring_is_said_and_can_be_made_up_for(opened, open_page, gated):
    page = open_page("compress", importance="gated")
    preparation(opened, Choices(importance="gated")).cancel()
    gated.set()
    ended(preparation(opened, Choices(importance="gated")))
    page.run()
    assert "Scoring by gated was cancelled" in texts(page)
    assert live(page)["maps"] is None
    button(page, "Measure it").click().run()
    ended(preparation(opened, Choices(importance="gated")))
    page.run()
    assert live(page)["maps"]


def test_what_a_model_cannot_have_is_refused_in_a_sentence(open_page, gqa_bench, monkeypatch):
    def refuse(progress):
        raise TransActError("Choose query-heads.")

    monkeypatch.setattr(gqa_bench, "pairs", refuse)
    page = open_page("compress", granularity="head-dims")
    assert not page.exception
    assert [error.value for error in page.error] == ["Choose query-heads."]
    assert button(page, "Measure it") is None
    page.selectbox(key="granularity").set_value("kv-groups").run()
    assert live(page)["mha_at"]["width"] == 32


def test_an_address_reopens_its_view_and_nonsense_in_it_does_not_matter(open_page):
    page = open_page(
        "compress",
        mha="50",
        mlp="x",
        context="4096",
        granularity="kv-groups",
        importance="magnitude",
        recovery="none",
        multiple_of="8",
    )
    assert not page.exception
    given = live(page)
    assert given["start"] == {
        "revision": 1,
        "mha": 50,
        "mlp": 30,
        "context": 4096,
        "heads": "",
        "channels": "",
    }
    assert given["choices"] == {
        "granularity": "kv-groups",
        "importance": "magnitude",
        "recovery": "none",
        "steps": 1,
        "multiple_of": 8,
        "sequential": False,
        "widths": "uniform",
        "keep_layers": "",
    }
    assert given["mlp_at"]["width"] == 32
    assert page.query_params["mlp"] == "30"
    cut = page.session_state["visit"].cut
    assert (cut.mha_ratio, cut.mlp_ratio, cut.multiple_of) == (0.5, 0.3, 8)


def test_auto_shows_what_it_will_choose_from(open_page):
    given = live(open_page("compress", granularity="auto"))
    assert [each["granularity"] for each in given["mha"]] == list(GRANULARITIES)
    assert given["prediction"] is None


def test_a_target_moves_the_thumbs(open_page):
    page = open_page("compress")
    dense = live(page)["dense"]["parameters"]
    page.number_input(key="at-most-parameters").set_value(0.8 * dense / 1e6).run()
    button(page, "Find the ratios").click().run()
    assert not page.exception
    given = live(page)
    assert given["start"]["revision"] == 2
    assert given["costs"]["parameters"] <= 0.8 * dense
    assert "meet the target" in texts(page)
    page.number_input(key="at-most-parameters").set_value(0.001).run()
    button(page, "Find the ratios").click().run()
    assert live(page)["start"]["revision"] == 2
    assert "No position of the sliders comes down to" in page.warning[0].value


def test_a_target_can_be_the_bytes_of_a_file(open_page):
    page = open_page("compress")
    page.segmented_control(key="goal").set_value("file").run()
    page.selectbox(key="target-type").set_value("Q8_0").run()
    mine = page.session_state["visit"]
    for job in mine.visitor.of(mine.request).found["gguf sizes"].values():
        ended(job)
    page.run()
    assert "Q8_0 takes 32 weights at a time" in texts(page)
    dense = page.number_input(key="at-most-file").value / 0.75
    page.number_input(key="at-most-file").set_value(0.9 * dense).run()
    button(page, "Find the ratios").click().run()
    assert not page.exception
    assert live(page)["start"]["revision"] == 2
    assert "meet the target" in texts(page)
    page.number_input(key="at-most-file").set_value(0.001).run()
    button(page, "Find the ratios").click().run()
    assert "comes down to a file of 0.0 MB" in page.warning[0].value


def test_perplexity_is_predicted_and_the_prediction_keeps_its_score(opened, open_page):
    page = open_page("compress")
    # It begins by itself.
    (learning,) = opened.open(Request()).damages.values()
    ended(learning)
    page.run()
    given = live(page)
    row, column = given["mha"][0]["option_at"][33], given["mlp"]["option_at"][30]
    low, mid, high = (given["prediction"][name][row][column] for name in ("low", "mid", "high"))
    assert low < mid < high
    button(page, "Prune and measure perplexity").click().run()
    ended(page.session_state["visit"].visitor.jobs[-1])
    page.run()
    (measured,) = live(page)["measured"]
    assert (measured["mha"], measured["mlp"]) == (row, column)
    assert live(page)["prediction"]["mid"][row][column] != mid
    assert "of 1 cuts predicted before they were measured" in texts(page)


def test_what_takes_long_is_predicted_at_the_visitors_wish(opened, open_page):
    page = open_page("compress", granularity="head-dims")
    assert not opened.open(Request()).damages
    button(page, "Predict perplexity").click().run()
    (learning,) = opened.open(Request()).damages.values()
    ended(learning)
    assert live(page.run())["prediction"] is not None


def test_what_would_take_long_does_not_begin_by_itself_and_says_what_it_takes(opened, open_page):
    # As on a machine that does a millionth of what this one does.
    opened._paces[Request().model_key] /= 1e6
    page = open_page("compress")
    (left,) = opened.open(Request()).damages.values()
    ended(left)
    page.run()
    assert live(page)["prediction"] is None
    assert any(unit in texts(page) for unit in ("min, in the back", "hours, in the", "days, in"))
    assert "GFLOP/s" in button(page, "Predict perplexity").help
    button(page, "Predict perplexity").click().run()
    (asked,) = opened.open(Request()).damages.values()
    assert asked is not left
    ended(asked)
    assert live(page.run())["prediction"] is not None


def test_the_measured_figure_stands_with_its_interval_its_text_and_its_prediction(
    opened, open_page
):
    page = open_page("compress")
    ended(next(iter(opened.open(Request()).damages.values())))
    page.run()
    assert "Not measured yet." in texts(page)
    point = work_of(page, "Prune and measure perplexity").result
    page.run()
    shown = {metric.label: metric for metric in page.metric}
    assert next(iter(shown)) == "Perplexity, measured"
    assert shown["Perplexity, measured"].value == f"{point.perplexity:.2f}"
    assert shown["Relative to dense"].value == f"{math.exp(point.delta_nll):.2f} ×"
    low = math.exp(point.delta_nll - 1.96 * point.delta_nll_se)
    assert shown["Relative to dense"].delta.startswith(f"{low:.2f} to ")
    assert "9 in 10" in shown["Predicted before"].delta
    tokens = opened.open(Request()).bench.result.evaluation.tokens
    assert f"On {tokens:,} tokens of" in texts(page)
    assert "Not measured yet." not in texts(page)
    # And in the live view, where the thumbs come by it.
    (measured,) = live(page)["measured"]
    assert measured["low"] < measured["ratio"] < measured["high"]


def test_progress_takes_the_place_of_what_is_said_beside_the_button(opened, open_page, slow_points):
    page = open_page("compress")
    assert "Not measured yet." in texts(page)
    button(page, "Prune and measure perplexity").click().run()
    (job,) = page.session_state["visit"].visitor.jobs
    assert "Not measured yet." not in texts(page)
    button(page, "Cancel").click().run()
    slow_points.release()
    ended(job)
    page.run()
    assert "was cancelled" in texts(page)
    assert not button(page, "Prune and measure perplexity").disabled


def test_a_recorded_curve_is_shown_until_there_is_a_point(opened, open_page):
    page = open_page("perplexity")
    assert not page.exception
    assert "**Recorded, not measured here**" in texts(page)
    (chart,) = page.get("plotly_chart")
    assert "Recorded: " in chart.proto.spec
    assert re.search(r"Measuring \d cuts takes (about \d+ s|a few seconds)\.", texts(page))
    job = work_of(page, "Measure the recorded cuts here")
    # On this model some of the recorded ratios come to the same widths.
    assert 1 < job.result < len(example().points)
    assert job.result == len(mlp_ratios(page.session_state["visit"]))
    page.run()
    assert not page.exception
    assert "Recorded" not in texts(page)
    assert button(page, "Measure the recorded cuts here") is None


def test_the_perplexity_page_has_a_picture_while_the_model_is_opened(open_app, monkeypatch):
    gate = threading.Event()

    def wait(models, report, spec):
        gate.wait(30)

    wait.__module__, wait.__qualname__ = work.__name__, "open_bench"
    monkeypatch.setattr(work, "open_bench", wait)
    page = open_app("perplexity")
    assert not page.exception
    assert "**Recorded, not measured here**" in texts(page)
    assert len(page.get("plotly_chart")) == 1
    gate.set()


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_scores_of_every_importance_are_shown(opened, open_page, importance):
    page = open_page("importance", importance=importance)
    # On a busy machine the page is drawn before they are worked out.
    for job in list(opened.open(Request()).preparations.values()):
        ended(job)
    page.run()
    assert not page.exception
    assert f"`{importance}` measures" in texts(page)
    assert page.toggle(key="ordered").disabled == (importance == "reconstruction")


def test_a_cut_is_measured_and_taken_away_with_its_choices(opened, open_page):
    page = open_page("compress", granularity="head-dims", importance="fluctuation", recovery="bias")
    visit = page.session_state["visit"]
    button(page, "Prune and measure perplexity").click().run()
    ended(visit.visitor.jobs[-1])
    page.run()
    assert "Perplexity, measured" in metrics(page)
    page.selectbox(key="importance").set_value("magnitude").run()
    assert "Perplexity, measured" not in metrics(page)

    export = open_page("export")
    assert not export.exception
    described = export.selectbox[0].options
    assert "head-dims · magnitude · bias · not measured yet · at the sliders" in described[0]
    assert "head-dims · fluctuation · bias · perplexity" in described[1]
    export.selectbox[0].select_index(1).run()
    assert "--importance fluctuation" in export.code[1].value

    curve = open_page("perplexity")
    assert not curve.exception
    assert curve.dataframe[0].value["importance"].tolist() == ["fluctuation"]


def test_a_cut_is_what_the_controls_say_when_it_is_asked_for(opened, open_page):
    """Its button was drawn before."""
    page = open_page("compress")
    visitor = page.session_state["visit"].visitor
    page.selectbox(key="importance").set_value("magnitude")
    button(page, "Prune and measure perplexity").click().run()
    (job,) = visitor.jobs
    assert Cut.of(ended(job).result).importance == "magnitude"
    page.run()
    assert "Perplexity, measured" in metrics(page)


def test_a_cut_can_be_asked_for_before_its_units_are_scored(opened, open_page, gated):
    page = open_page("compress", importance="gated")
    asked = button(page, "Prune and measure perplexity")
    assert not asked.disabled
    asked.click().run()
    asked = button(page, "Prune and measure perplexity")
    assert asked.disabled
    # As if the second click of two was on its way already.
    asked.proto.disabled = False
    asked.click().run()
    gated.set()
    (job,) = page.session_state["visit"].visitor.jobs
    assert ended(job).error is None
    assert job.result.plan.importance == "gated"


def test_a_new_tab_begins_with_what_the_visitor_left_and_a_link_decides(opened, open_page):
    first = Visit()
    page = open_page("compress", first, mha="60", granularity="kv-groups", steps="2")
    page.selectbox(key="importance").set_value("magnitude").run()
    left = first.cut
    assert (left.mha_ratio, left.granularity, left.importance, left.steps) == (
        0.6,
        "kv-groups",
        "magnitude",
        2,
    )
    tab = Visit(first.visitor)
    page = open_page("compress", tab)
    assert not page.exception
    assert tab.cut == left
    # In a link, what is not named is as usual.
    tab = Visit(first.visitor)
    page = open_page("compress", tab, mha="20", mlp="10")
    assert not page.exception
    assert tab.cut == Cut(0.2, 0.1)
    stranger = Visit()
    open_page("compress", stranger)
    assert stranger.cut == Cut()


@pytest.mark.parametrize(
    ("granularity", "warned", "told"),
    [
        ("query-heads", ["CTranslate2 4.8.5 misreads it"], ["llama.cpp"]),
        ("kv-groups", [], ["llama.cpp", "CTranslate2 4.8.5 refuses it"]),
        ("head-dims", ["llama.cpp"], ["CTranslate2 4.8.5 refuses it"]),
        ("auto", [], ["depends on the granularity that `auto` takes"]),
    ],
)
def test_the_export_names_the_runtimes_that_misread_the_cut(
    opened, open_page, granularity, warned, told
):
    mine = Visit()
    mine.cut = Cut(0.5, 0.3, granularity)
    page = open_page("export", mine)
    assert not page.exception
    warnings = [each.value for each in page.warning]
    assert len(warnings) == len(warned)
    assert all(words in warning for words, warning in zip(warned, warnings, strict=True))
    assert all(words in texts(page) for words in told)


@pytest.mark.parametrize("granularity", ["query-heads", "head-dims"])
def test_a_curve_scores_first_and_then_measures(opened, open_page, granularity):
    page = open_page("perplexity")
    page.selectbox(key="curve_granularity").set_value(granularity)
    page.selectbox(key="curve_importance").set_value("magnitude")
    page.selectbox(key="curve_recovery").set_value("none").run()
    assert "Scoring by magnitude comes first." in texts(page)
    job = work_of(page, "Measure the curve")
    visit = page.session_state["visit"]
    points = visit.visitor.of(Request()).points
    assert {point.plan.importance for point in points} == {"magnitude"}
    assert len(points) == job.result > 0
    assert {point.plan.granularity for point in points} == {granularity}
    page.run()
    assert not page.exception


@pytest.fixture
def slow_points(opened, monkeypatch):
    """Cuts that take until they are let through one by one; the semaphore."""
    permits = threading.Semaphore(0)
    really = results.compress

    def compress(*arguments):
        permits.acquire(timeout=10)
        return really(*arguments)

    monkeypatch.setattr(results.measured, "__defaults__", (silent, compress))
    # A cut of the Compress page keeps its model, and is made by a function of its own.
    monkeypatch.setattr(work, "compress", compress)
    yield permits
    permits.release(100)


def measure_curve(page):
    page.selectbox(key="curve").set_value("MLP only")
    page.selectbox(key="curve_recovery").set_value("none").run()
    button(page, "Measure the curve").click().run()
    return page.session_state["visit"].visitor.jobs[-1]


def mlp_ratios(visit) -> list[float]:
    return [point.plan.mlp_ratio for point in visit.visitor.of(Request()).points]


def wait_until(true):
    for _ in range(1000):
        if true():
            return
        threading.Event().wait(0.01)
    pytest.fail("it did not come to that")


def test_points_stream_in_from_the_ends_and_are_kept_when_the_curve_is_cancelled(
    opened, open_page, slow_points
):
    page = open_page("perplexity")
    visit = page.session_state["visit"]
    job = measure_curve(page)
    slow_points.release(2)
    wait_until(lambda: len(mlp_ratios(visit)) == 2)
    assert mlp_ratios(visit) == [0.7, 0.14]
    page.run()
    assert not page.exception
    assert len(page.dataframe[0].value) == 2
    job.cancel()
    slow_points.release()
    ended(job)
    page.run()
    assert "was cancelled" in texts(page)
    assert job.state == "cancelled"
    before = mlp_ratios(visit)

    again = measure_curve(page)
    slow_points.release(3)
    ended(again)
    assert again.pieces == 5 - len(before)
    assert sorted(mlp_ratios(visit)) == [0.14, 0.28, 0.42, 0.56, 0.7]


def test_another_tab_finds_the_job_and_its_points(opened, open_page, slow_points):
    page = open_page("perplexity")
    visit = page.session_state["visit"]
    job = measure_curve(page)
    slow_points.release(1)
    wait_until(lambda: len(mlp_ratios(visit)) == 1)
    tab = open_page("perplexity", Visit(visit.visitor))
    assert not tab.exception
    assert len(tab.dataframe[0].value) == 1
    assert button(tab, "Cancel") is not None
    button(tab, "Cancel").click().run()
    slow_points.release(5)
    assert ended(job).state == "cancelled"


def test_another_visitor_sees_nothing_of_it_and_has_known_points_at_once(
    opened, open_page, slow_points
):
    page = open_page("perplexity")
    slow_points.release(5)
    ended(measure_curve(page))
    mine = page.session_state["visit"]

    stranger = Visit()
    other = open_page("perplexity", stranger)
    assert not other.dataframe
    other.selectbox(key="curve").set_value("MLP only")
    other.selectbox(key="curve_recovery").set_value("none").run()
    button(other, "Measure the curve").click().run()
    assert stranger.visitor.jobs == []
    assert sorted(mlp_ratios(stranger)) == sorted(mlp_ratios(mine))
    assert len(other.dataframe[0].value) == 5


def test_one_curve_does_not_keep_others_waiting(opened, open_page, slow_points):
    page = open_page("perplexity")
    curve = measure_curve(page)
    stranger = Visit()
    other = open_page("compress", stranger, mlp="50", recovery="none")
    button(other, "Prune and measure perplexity").click().run()
    (cut,) = stranger.visitor.jobs
    assert progress.waiting_in_words(cut) == "waiting, 1 ahead: another visitor's"
    slow_points.release(2)
    ended(cut)
    assert cut.state == "done"
    assert not curve.finished
    other.run()
    assert "Perplexity, measured" in metrics(other)
    curve.cancel()


def test_auto_is_tried_when_the_cut_is_measured_and_goes_into_the_export(
    opened, open_page, gqa_bench
):
    page = open_page("compress", granularity="auto", steps="2", mha="50")
    assert not page.exception
    assert "is found when the cut is measured" in texts(page)
    job = work_of(page, "Prune and measure perplexity")
    visit = page.session_state["visit"]
    page.run()
    decision = job.result.decision
    assert decision.why in texts(page)
    assert "On the way:" in texts(page)
    assert "Perplexity, measured" in metrics(page)

    export = open_page("export")
    assert not export.exception
    assert decision.why in texts(export)
    assert "depends on the granularity" not in texts(export)
    assert "--steps 2" in export.code[1].value
    assert f"--granularity {decision.plan.granularity}" in export.code[1].value

    # A restart forgets the visitor and not what was decided.
    stranger = Visit()
    later = open_page("compress", stranger, granularity="auto", steps="2", mha="50")
    assert decision.why in texts(later)
    button(later, "Prune and measure perplexity").click().run()
    assert stranger.visitor.jobs == []
    assert Cut.of(stranger.visitor.of(Request()).points[0]) == visit.cut


def test_sequential_choices_are_offered_where_they_can_be_had(opened, open_page):
    page = open_page("compress", sequential="true")
    assert page.toggle(key="sequential").disabled
    assert "by the importance reconstruction only" in page.toggle(key="sequential").help
    assert not page.session_state["visit"].cut.sequential

    page = open_page("compress", importance="reconstruction", sequential="true", mlp="50")
    ended(preparation(opened, Choices(importance="reconstruction")))
    page.run()
    assert not page.exception
    assert "scored once" in texts(page)
    job = work_of(page, "Prune and measure perplexity")
    visit = page.session_state["visit"]
    page.run()
    assert "Perplexity, measured" in metrics(page)
    assert visit.cut == Cut.of(job.result)
    assert job.result.decision.sequential

    export = open_page("export")
    assert not export.exception
    assert "--sequential" in export.code[1].value


def test_a_curve_with_auto_and_steps_is_measured(opened, open_page):
    page = open_page("perplexity")
    page.selectbox(key="curve").set_value("Both")
    page.selectbox(key="curve_granularity").set_value("auto").run()
    page.number_input(key="curve_steps").set_value(2)
    page.number_input(key="count").set_value(2)
    page.selectbox(key="curve_recovery").set_value("none").run()
    job = work_of(page, "Measure the curve")
    visit = page.session_state["visit"]
    assert all(point.decision.why for point in visit.visitor.of(Request()).points)
    assert job.result == 2


def test_jobs_are_listed_with_what_became_of_them(opened, open_page, slow_points, monkeypatch):
    visitor = Visit()
    page = open_page("perplexity", visitor)
    running = measure_curve(page)

    def sidebar():
        from pages.parts.progress import show_jobs

        show_jobs()

    listed = AppTest.from_function(sidebar)
    listed.session_state["visit"] = visitor
    listed.run()
    assert not listed.exception
    assert running.title in "".join(str(each) for each in listed.main.children.values())
    listed.button[0].click().run()
    slow_points.release()
    ended(running)
    listed.run()
    assert f"{running.title} · cancelled" in texts(listed)
    assert not listed.button
