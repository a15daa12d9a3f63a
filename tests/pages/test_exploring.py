"""What the exploring pages make of the choices, on the tiny model and without a browser."""

import pytest

from pages.shared import exploring
from pages.shared.workbench import Request
from tests.pages.conftest import ended
from tests.pages.test_pages import button, metrics, texts
from transact_core.activations import SITES
from transact_core.importance import IMPORTANCES


@pytest.fixture(autouse=True)
def one_workbench(opened, monkeypatch):
    monkeypatch.setattr(exploring, "workbench", lambda: opened)


def found(page):
    return page.session_state["findings"][Request()]


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
    job = page.session_state["visit"].job
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
    assert ended(page.session_state["visit"].job).error is None
    page.run()
    assert list(found(page).without) == [(2, 4)]
    assert "Perplexity without it" in metrics(page)
    assert button(page, "Measure without head 4 of layer 2").disabled
    button(page, "Measure without each head of layer 2").click().run()
    ended(page.session_state["visit"].job)
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
    assert ended(page.session_state["visit"].job).error is None
    page.run()
    assert not page.exception
    assert len(page.get("plotly_chart")) == 2
    points = page.session_state["visit"].points[Request()]
    assert {point.recovery for point in points} == {"none"}
    assert button(page, "Measure both curves").disabled
