"""Charts of a training as it goes on."""

import pytest

from pages.charts.recover_charts import (
    divergence_chart,
    divergence_frame,
    loss_chart,
    loss_frame,
    text_names,
)
from pages.parts.figure import NARROW
from transact_core.training.loop import Curve, Evaluated, Watched


def curve(*looks, losses=()):
    """Looks are (step, KL on one text, KL on the other); the NLL is 2 nats above each."""
    return Curve(
        list(losses),
        [
            Evaluated(step, {"builtin": Watched(a, 2 + a), "my<b>.txt": Watched(b, 2 + b)})
            for step, a, b in looks
        ],
        {"builtin": 2.0, "my<b>.txt": 2.0},
    )


def title(figure) -> str:
    return figure.layout.title.text.replace("<br>", " ")


def test_before_the_first_step_it_is_said_what_comes():
    assert "known after the first step" in title(loss_chart(curve(), 64, 10))
    assert "looked at first" in title(divergence_chart(curve(), 64, 10))
    figure = divergence_chart(curve((0, 0.5, 1.5)), 64, 10)
    assert title(figure) == "Untrained: up to 1.50 nats a token away"


def test_the_divergence_is_drawn_for_each_text_and_the_best_look_is_marked():
    shown = curve((0, 0.5, 1.5), (4, 0.2, 1.4), (8, 0.3, 1.6), losses=[1.0] * 8)
    figure = divergence_chart(shown, 64, 10)
    assert title(figure) == "Nearer to the dense model on 1 of 2 texts"
    one, other = figure.data
    assert list(one.x) == [0, 256, 512]
    assert list(one.y) == [0.5, 0.2, 0.3]
    assert list(other.y) == [1.5, 1.4, 1.6]
    assert (one.name, other.name) == ("Python's reference", "my&lt;b&gt;.txt")
    assert one.line.color != other.line.color
    assert one.marker.symbol != other.marker.symbol
    (best,) = figure.layout.shapes
    assert best.x0 == 256
    assert "nats a token" in figure.layout.yaxis.title.text
    assert "tokens" in figure.layout.xaxis.title.text
    frame = divergence_frame(shown, 64)
    # 0.3 of 0.5 lost nats are back, and none of the other's.
    assert frame["share_back"].tolist() == pytest.approx([0, 0, 0.6, 1 / 15, 0.4, -1 / 15])


def test_titles_fit_on_one_line_of_half_a_page():
    shown = curve((0, 0.5, 1.5), (4, 0.2, 1.4), losses=[3.0] * 60 + [1.0] * 60)
    for figure in (divergence_chart(shown, 64, 10), loss_chart(shown, 64, 10)):
        assert len(title(figure)) <= NARROW


def test_the_axis_of_tokens_is_as_long_as_the_training_from_the_beginning():
    figures = [loss_chart(curve(losses=[2.0] * steps), 64, 100) for steps in (1, 50)]
    assert figures[0].layout.xaxis.range == figures[1].layout.xaxis.range


def test_the_loss_is_smoothed_and_its_ends_are_compared():
    losses = [3.0, 1.0] * 20 + [2.0, 0.0] * 20
    figure = loss_chart(curve(losses=losses), 64, 100)
    assert title(figure) == "Loss fell from 2.000 to 1.000 nats a token"
    raw, smooth = figure.data
    assert list(raw.y) == losses
    assert smooth.name == "mean of 4 steps"
    assert smooth.y[-1] == pytest.approx(1.0)
    assert loss_frame(curve(losses=losses), 64)["tokens"].tolist()[:2] == [64, 128]
    assert "rose" in title(loss_chart(curve(losses=losses[::-1]), 64, 100))
    # A few steps show no direction.
    few = loss_chart(curve(losses=[3.0, 1.0]), 64, 100)
    assert title(few) == "Loss 2.000 nats a token so far"


def test_texts_of_one_name_are_told_apart():
    names = text_names(["generated:100:1", "generated:200:2", "builtin", "generated:9:3:chat"])
    assert list(names.values()) == [
        "generated:100:1",
        "generated:200:2",
        "Python's reference",
        "answers by the model",
    ]
