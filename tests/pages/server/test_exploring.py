"""What the exploring pages make of the choices, on the tiny model and without a browser."""

import numpy as np
import pytest
import torch

from pages.charts import common as charts
from pages.charts import exploring_charts
from pages.server import exploring
from pages.server.request import Request
from tests.pages.conftest import ended
from tests.pages.test_pages import button, metrics, texts
from transact_core.experiments.premise import Disturbed
from transact_core.forward.perplexity import Evaluation
from transact_core.forward.waists import SITES
from transact_core.importance.scores import IMPORTANCES


@pytest.fixture(autouse=True)
def one_workbench(opened, monkeypatch):
    monkeypatch.setattr(exploring, "workbench", lambda: opened)


def found(page):
    return page.session_state["visit"].visitor.of(Request()).found["findings"]


def test_activations_are_shown_at_the_waists_and_between(open_page):
    page = open_page("activations")
    assert not page.exception
    assert len(page.get("plotly_chart")) == 3


@pytest.mark.parametrize("where", ["All layers at once", "Layer by layer"])
def test_the_premise_is_measured_once(open_page, where):
    page = open_page("premise")
    page.segmented_control(key="premise_where").set_value(where).run()
    assert "The chart begins with the first measured point." in texts(page)
    button(page, "Run the experiment").click().run()
    job = page.session_state["visit"].visitor.jobs[-1]
    assert ended(job).error is None
    page.run()
    assert not page.exception
    points = found(page).disturbed
    places = 3 if where == "Layer by layer" else 4
    assert len(points) == places * len(SITES)
    assert len(page.get("plotly_chart")) == 1
    assert "All points are measured." in texts(page)
    assert button(page, "Run the experiment").disabled
    page.selectbox(key="premise_disturbance").set_value("zero at random").run()
    assert not button(page, "Run the experiment").disabled


def test_no_strength_is_no_experiment(open_page):
    page = open_page("premise")
    page.multiselect(key="premise_strengths").set_value([]).run()
    assert not page.exception
    assert button(page, "Run the experiment").disabled


def test_a_head_is_chosen_looked_at_and_measured(opened, open_page):
    page = open_page("heads")
    assert not page.exception
    page.selectbox(key="layer").set_value(2)
    page.selectbox(key="head").set_value(4).run()
    page.text_area(key="head_text").set_value("A while loop repeats.").run()
    assert not page.exception
    assert len(page.get("plotly_chart")) == 3
    button(page, "Measure without head 4 of layer 2").click().run()
    assert ended(page.session_state["visit"].visitor.jobs[-1]).error is None
    page.run()
    assert list(found(page).without) == [(2, 4)]
    assert "Perplexity without the head" in metrics(page)
    assert button(page, "Measure without head 4 of layer 2").disabled
    button(page, "Measure without each head of layer 2").click().run()
    ended(page.session_state["visit"].visitor.jobs[-1])
    page.run()
    assert sorted(found(page).without) == [(2, head) for head in range(6)]
    assert len(page.dataframe[0].value) == 6


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_heads_of_every_importance_are_shown(open_page, importance):
    assert not open_page("heads", importance=importance).exception


@pytest.mark.parametrize("granularity", ["query-heads", "head-dims"])
def test_redundancy_is_estimated_at_once_and_measured_on_demand(open_page, granularity):
    page = open_page("redundancy", granularity=granularity)
    assert not page.exception
    assert len(page.get("plotly_chart")) == 1
    button(page, "Measure both curves").click().run()
    assert ended(page.session_state["visit"].visitor.jobs[-1]).error is None
    page.run()
    assert not page.exception
    assert len(page.get("plotly_chart")) == 2
    points = page.session_state["visit"].visitor.of(Request()).points
    assert {point.recovery for point in points} == {"none"}
    assert button(page, "Measure both curves").disabled


# --- figures ---------------------------------------------------------------------------------


def disturbed(site: str, strength: float, delta: float) -> Disturbed:
    nll = torch.full((2, 3), 1 + delta)
    return Disturbed(site, None, "noise", strength, Evaluation(nll), delta, float("nan"))


def test_the_premise_is_judged_at_a_strength_that_all_sites_have():
    points = [disturbed(site, 0.1, delta) for site, delta in zip(SITES, (0.1, 0.2, 3), strict=True)]
    points.append(disturbed("mha", 0.2, 9.0))
    title = exploring_charts.strengths(points, 2.7).layout.title.text
    assert title == (
        "Disturbed by 10% in all layers, the residual stream costs most: 3.00 nats a token, "
        "MLP waist 0.20, MHA waist 0.10"
    )
    assert "costs most" not in exploring_charts.strengths(points[:2], 2.7).layout.title.text


def test_a_loss_beyond_all_numbers_is_drawn_at_the_edge():
    figure = exploring_charts.strengths([disturbed("mlp", 0.1, 800.0)], 2.7)
    assert figure.data[0].y.tolist() == [exploring_charts.LARGEST]
    assert np.isfinite(figure.data[0].error_y.array).all()


@pytest.mark.parametrize("scores", [np.zeros((2, 5)), np.arange(10.0).reshape(2, 5)])
def test_sorted_curves_need_no_score_above_zero(scores):
    figure = charts.sorted_curves(scores, 0.6, "MLP")
    assert all(np.isfinite(trace.y).all() for trace in figure.data[:2])
    kept = np.array([True, False, True, True, False])
    curve = charts.layer_curve(scores[0], kept, 0, "MLP")
    assert curve.layout.title.text.startswith("Layer 0 keeps 3 of 5 MLP channels")
    assert curve.data[-1].customdata.tolist() == np.argsort(-scores[0], kind="stable").tolist()


def test_a_wide_layer_is_drawn_by_few_points():
    scores = np.random.default_rng(0).random((3, 14_336))
    figure = charts.sorted_curves(scores, None, "MLP")
    assert {len(trace.y) for trace in figure.data[:3]} == {charts.MAX_POINTS}
    assert figure.data[0].y[0] == pytest.approx(1)


def test_the_clickable_map_has_a_point_for_every_head():
    figure = exploring_charts.clickable_heads(np.ones((3, 4)), (2, 1), "")
    points = figure.data[-1]
    assert sorted(zip(points.y.tolist(), points.x.tolist(), strict=True)) == [
        (layer, head) for layer in range(3) for head in range(4)
    ]


def test_tokens_in_a_chart_are_no_markup():
    pattern = np.tril(np.ones((2, 2))) / np.array([[1], [2]])
    figure = exploring_charts.attention(pattern, ["<b>", "\n"], 0, 0)
    assert list(figure.layout.xaxis.ticktext) == ["&lt;b&gt;", "⏎"]
    assert "&lt;b&gt;" in str(figure.data[0].customdata)
