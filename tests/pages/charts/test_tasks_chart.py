"""Charts of tasks, of damage to texts, and of perplexity on several texts."""

import math

import plotly.graph_objects as go
import pytest

from pages.charts.common import on_text
from pages.charts.damage_chart import pieces_frame, texts_chart
from pages.charts.tasks_chart import (
    at_chance,
    narrowing_chart,
    shown_frame,
    tasks_chart,
    tasks_frame,
)
from transact_core.experiments.tasks import Figures, Standing
from transact_core.experiments.text_damage import DamagedPiece, TextDamage


def standing(task="piqa", asked=100, model=0.5, against=0.7, error=0.02, chance=0.5):
    def figures(value):
        return Figures(asked, {"acc": value}, {"acc": error})

    pair = () if against is None else (figures(against), figures(model - against))
    return Standing(task, asked, 200, 0, "1.0", figures(model), *pair, chance=chance)


def title(figure: go.Figure) -> str:
    return figure.layout.title.text


def test_differences_are_drawn_with_95_percent_intervals_and_counted():
    figure = tasks_chart([standing(), standing("boolq", model=0.69)])
    assert title(figure) == "The cut lowers accuracy beyond the 95 % interval in 1 of 2 tasks"
    traces = {trace.name: trace for trace in figure.data}
    assert list(traces["paired difference"].x) == pytest.approx([-20, -1])
    assert list(traces["paired difference"].error_x.array) == pytest.approx([3.92, 3.92])
    assert list(traces["dense"].x) == [0.7, 0.7]
    assert list(traces["pruned"].x) == [0.5, 0.69]
    assert list(traces["guessing"].x) == [0.5, 0.5]


def test_the_dense_model_alone_has_no_differences():
    figure = tasks_chart([standing(against=None, model=0.7), standing("wino", 100, 0.51, None)])
    assert title(figure) == "The dense model is above chance in 1 of 2 tasks of choices"
    assert "pruned" not in {trace.name for trace in figure.data}
    assert set(tasks_frame([standing(against=None)])) >= {"dense", "dense_stderr"}
    assert "pruned" not in tasks_frame([standing(against=None)])


@pytest.mark.parametrize(
    ("model", "against", "who"),
    [(0.5, 0.7, "pruned"), (0.7, 0.5, "dense"), (0.5, 0.51, "both"), (0.6, 0.7, "")],
)
def test_who_is_at_chance_is_said(model, against, who):
    result = standing(model=model, against=against)
    assert at_chance(result) == who
    assert shown_frame([result])["at chance"].tolist() == [who]


def test_figures_are_shown_with_their_errors():
    (row,) = shown_frame([standing()]).to_dict("records")
    assert row["pruned − dense"] == "-0.200 ± 0.020"
    assert (row["questions"], row["chance"]) == ("100 of 200", "0.500")


def test_the_interval_is_drawn_block_by_block():
    figure = narrowing_chart({"piqa": [standing(asked=25, error=0.1), standing(asked=50)]})
    assert title(figure).startswith("The widest interval is ± 3.9 points by now")
    (trace,) = figure.data
    assert list(trace.x) == [25, 50]
    assert list(trace.error_y.array) == pytest.approx([19.6, 3.92])


def test_damage_is_compared_between_texts_and_listed_worst_first():
    guess = (("a", 0.5),)
    pieces = tuple(DamagedPiece(0, f"t{d}", 1, d, 1.0, 2.0, guess, guess) for d in (0.1, 0.9, 0.4))
    texts = [
        TextDamage(source, 64, mean, math.nan, 0.4, pieces)
        for source, mean in (("builtin", 0.1), ("builtin-code", 0.4))
    ]
    assert title(texts_chart(texts)) == (
        "The cut damages Python's source code 4.0 × as much as Python's reference"
    )
    assert pieces_frame(texts[0])["damage_nats"].tolist() == [0.9, 0.4, 0.1]


def test_the_text_stands_on_the_axis_of_perplexity_alone():
    figure = go.Figure(go.Scatter(x=[1], y=[2]))
    figure.update_yaxes(title="perplexity").update_xaxes(title="share")
    on_text(figure, "<b>mine</b>.txt")
    assert figure.layout.yaxis.title.text == "perplexity on &lt;b&gt;mine&lt;/b&gt;.txt"
    assert figure.layout.xaxis.title.text == "share"
