from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pages.charts import common as charts
from pages.charts import curve_chart, plan_charts, tradeoff_charts
from pages.parts import help_texts as options
from transact_core.experiments.allocate import plan_by_hand
from transact_core.experiments.bench import Choices
from transact_core.forward.perplexity import Evaluation
from transact_core.importance.scores import IMPORTANCES
from transact_core.pruning.closed_form import LayerFit
from transact_core.pruning.plan import LayerPlan, PruningPlan


def title(figure) -> str:
    return figure.layout.title.text


def narrower(slots=(0, 2)) -> PruningPlan:
    """Two layers of two KV heads, two of four pairs in each; layer 1 puts others into the slots."""
    rows = [((0, 2), (0, 2)), ((0, 3), (1, 2))]
    return PruningPlan(
        mha_ratio=0.5,
        mlp_ratio=0,
        granularity="head-dims",
        importance="activation",
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=3,
        head_dim=4,
        slots=slots,
        layers=[
            LayerPlan(
                kept_heads=(0, 1),
                kept_channels=(0, 1, 2),
                slot_pairs=pairs,
                value_dims=((0, 1, 2, 3), (0, 1, 2, 3)),
            )
            for pairs in rows
        ],
    )


def point(importance="activation", recovery="least-squares", mha=50, granularity="query-heads"):
    plan = SimpleNamespace(importance=importance, granularity=granularity)
    cost = SimpleNamespace(mha_width=mha, mlp_width=50, parameters=1_000_000)
    return SimpleNamespace(
        plan=plan,
        decision=SimpleNamespace(widths="uniform"),
        footprint=cost,
        recovery=recovery,
        perplexity=12.0,
        delta_nll_se=0.01,
    )


def names(points) -> list[str]:
    dense = Evaluation(torch.ones(2, 3))
    figure = curve_chart.perplexity_curve(points, dense, (100, 100))
    return [trace.name for trace in figure.data]


def test_every_importance_has_its_line():
    assert set(options._MEASURES) == set(IMPORTANCES)
    assert all(f"`{name}`" in options.IMPORTANCE_HELP for name in IMPORTANCES)


def test_the_line_of_an_importance_that_is_not_in_the_table_is_its_docstring(monkeypatch):
    def added(evidence):
        """The phase of the moon.

        More.
        """

    monkeypatch.setitem(IMPORTANCES, "added", added)
    assert options.measures("added") == "The phase of the moon"


@pytest.mark.parametrize("scores", [np.zeros((2, 3)), -np.ones((2, 3)), np.eye(2, 3)])
def test_shares_need_no_score_above_zero(scores):
    share = charts.relative(scores)
    assert np.isfinite(share).all()
    assert share.min() >= 0
    assert share.max() <= 1
    for ordered in (True, False):
        charts.channel_map(scores, ordered)
    charts.head_map(scores, title=charts.head_differences(scores))


def test_heads_that_score_alike_are_not_said_to_differ():
    assert charts.head_differences(np.ones((2, 3))) == "All heads of a layer score alike"
    assert charts.head_differences(np.array([[1, 2], [1, 9.0]])) == "Heads differ most in layer 1"


def test_an_order_of_elimination_is_not_taken_for_sizes():
    order = np.array([[2.0, 0, 1], [0, 1, 2]])
    assert charts.are_positions(order)
    assert not charts.are_positions(order + 1)
    figure = charts.channel_map(order, ordered=False)
    assert "order of elimination" in title(figure)
    assert figure.data[0].z.tolist() == [[1, 0, 0.5], [0, 0.5, 1]]


def test_scores_of_one_size_are_shown_on_a_linear_scale():
    near, far = np.array([[1.0, 0.8, 0.6]]), np.array([[1.0, 0.01, 0.001]])
    assert title(charts.channel_map(near, True)).startswith("Half of the MLP channels score under")
    assert charts.channel_map(near, True).data[0].zmin == 0
    assert title(charts.channel_map(far, True)).startswith("67% of MLP channels score under a")
    assert charts.channel_map(far, True).data[0].zmin == -3


def test_heads_far_below_their_best_are_shown_on_a_logarithmic_scale():
    assert charts.head_map(np.array([[1, 0.01, 0.001]])).data[0].z[0].tolist() == [0, -2, -3]
    assert charts.head_map(np.array([[1, 0.5, 0.25]])).data[0].z[0].tolist() == [1, 0.5, 0.25]


def test_a_map_of_pairs_tells_what_stays_and_in_which_slot():
    effects = np.tile([4.0, 1.0, 3.0, 2.0], (2, 2, 1))
    figure = plan_charts.pair_map(effects, narrower(), np.array([1, 0.1, 0.01, 0.001]))
    stays, goes, slots = figure.data
    assert (~np.isnan(stays.z)).tolist() == [
        [True, False, True, False],
        [True, False, True, False],
        [True, False, False, True],
        [False, True, True, False],
    ]
    assert (np.isnan(stays.z) != np.isnan(goes.z)).all()
    assert stays.customdata[2, 3].tolist() == pytest.approx([1, 0, 0.2, 2])
    assert list(slots.x) == [0, 2]
    assert title(figure) == "2 of 4 rotary pairs hold 60.0% of a head's effect"


def test_a_map_of_pairs_without_effects_or_without_a_cut_is_drawn():
    whole = narrower().model_copy(update={"head_dim": None, "slots": ()})
    figure = plan_charts.pair_map(np.zeros((2, 2, 4)), whole, np.ones(4))
    assert title(figure) == "All 4 rotary pairs stay"
    assert np.isnan(figure.data[1].z).all()


def test_a_repair_is_called_by_its_name():
    def fits(*ridges):
        return [
            LayerFit(n, "mlp", 0.5, 0.5 if ridge is None else 0.4, ridge)
            for n, ridge in enumerate(ridges)
        ]

    assert title(plan_charts.layer_fits(fits(0.1, 1.0), "least-squares")) == (
        "Least squares lowers the error of 2 of 2 cut modules"
    )
    assert title(plan_charts.layer_fits(fits(0.0, None), "bias")) == (
        "A bias lowers the error of 1 of 2 cut modules; 1 keep the bare cut"
    )
    assert title(plan_charts.layer_fits(fits(0.1), "a-new-one")) == (
        "The recovery a-new-one lowers the error of 1 of 1 cut modules"
    )
    assert title(plan_charts.layer_fits(fits(None), "bias")) == (
        "No repair did better than the bare cut in any of 1 modules"
    )


def test_series_are_told_apart_by_no_more_than_differs():
    assert names([point(), point()]) == ["both, least-squares", "dense"]
    assert names([point(recovery="bias"), point(recovery="none")]) == [
        "both, bias",
        "both, bare cut",
        "dense",
    ]
    assert names([point(recovery="a-new-one"), point()]) == [
        "both, a-new-one",
        "both, least-squares",
        "dense",
    ]
    assert names([point("taylor"), point()]) == [
        "both, least-squares, activation",
        "both, least-squares, taylor",
        "dense",
    ]
    assert names([point(), point(granularity="head-dims"), point(mha=100)]) == [
        "MLP only, least-squares",
        "both, least-squares, head-dims",
        "both, least-squares, query-heads",
        "dense",
    ]


def test_cuts_that_are_no_steps_along_one_line_are_not_joined():
    steps = [point(), measured(mha=40, mlp=40)]
    steps[1].recovery = "least-squares"
    assert curve_chart.perplexity_curve(steps, None, (100, 100)).data[0].mode == "lines+markers"
    steps.append(point(mha=80))
    assert curve_chart.perplexity_curve(steps, None, (100, 100)).data[0].mode == "markers"


def test_importance_is_told_in_the_hover():
    figure = curve_chart.perplexity_curve([point("taylor", "bias")], None, (100, 100))
    assert figure.data[0].customdata[0][4] == "taylor"
    assert "bias" in figure.data[0].hovertemplate


def measured(
    mha=50,
    mlp=50,
    parameters=1_000_000,
    kv=100,
    perplexity=12.0,
    importance="activation",
    widths="uniform",
):
    plan = SimpleNamespace(
        importance=importance,
        granularity="query-heads",
        mha_ratio=1 - mha / 100,
        mlp_ratio=1 - mlp / 100,
    )
    cost = SimpleNamespace(
        mha_width=mha, mlp_width=mlp, parameters=parameters, kv_bytes_per_token=kv
    )
    return SimpleNamespace(
        plan=plan,
        decision=SimpleNamespace(widths=widths),
        footprint=cost,
        recovery="none",
        perplexity=perplexity,
        delta_nll=float(np.log(perplexity / 10)),
        delta_nll_se=0.01,
        row=lambda: {
            "mha_ratio": 1 - mha / 100,
            "mlp_ratio": 1 - mlp / 100,
            "parameters": parameters,
            "kv_bytes_per_token": kv,
            "perplexity": perplexity,
        },
    )


def test_colours_tell_what_they_are_asked_to():
    points = [point("taylor"), point("activation"), point("activation", mha=100)]
    figure = curve_chart.perplexity_curve(points, None, (100, 100), coloured_by="importance")
    by_importance = {trace.customdata[0][4]: trace.line.color for trace in figure.data}
    assert len(set(by_importance.values())) == 2
    for trace in figure.data:
        assert trace.line.color == by_importance[trace.customdata[0][4]]


def test_the_frontier_joins_what_no_other_beats():
    dense = (
        SimpleNamespace(parameters=2_000_000, kv_bytes_per_token=100),
        Evaluation(torch.full((2, 3), float(np.log(10)))),
    )
    points = [
        measured(mlp=100, parameters=1_500_000, perplexity=11),
        measured(parameters=1_600_000, perplexity=13),
        measured(mha=100, parameters=1_000_000, perplexity=20),
    ]
    table = tradeoff_charts.frontier_table(points, dense, "parameters")
    assert table["on_frontier"].tolist() == [True, False, True, True]
    figure = tradeoff_charts.frontier_chart(points, dense, (100, 100), "parameters")
    line = figure.data[0]
    assert list(line.x) == [1.0, 1.5, 2.0]
    assert list(line.y) == pytest.approx([20, 11, 10])
    symbols = {trace.name: trace.marker.symbol for trace in figure.data[1:]}
    assert symbols["both"] == ("circle-open",)
    assert title(figure) == "Within 1.2 × dense: 1.5 of 2.0 M parameters"
    cache = tradeoff_charts.frontier_chart(points, dense, (100, 100), "kv_bytes_per_token")
    assert "saves KV cache" in title(cache)


def test_the_map_holds_the_best_of_each_measured_pair_and_nothing_else():
    points = [
        measured(perplexity=15),
        measured(perplexity=11, importance="taylor"),
        measured(mlp=100, perplexity=30),
        measured(mha=100, mlp=100, perplexity=10),
    ]
    figure = tradeoff_charts.ratio_map(points, (100, 100))
    (squares,) = figure.data
    assert list(zip(squares.x, squares.y, strict=True)) == [(0.5, 0.0), (0.5, 0.5)]
    assert list(squares.text) == ["3.00", "1.10"]
    assert squares.customdata[1][3] == "taylor"
    assert title(figure).startswith("1 of 2 measured pairs cost at most 1.2 ×")
    assert "No pair" in title(tradeoff_charts.ratio_map([], (100, 100)))


def test_widths_of_their_own_have_lines_of_their_own():
    points = [measured(), measured(widths="allocated")]
    figure = curve_chart.perplexity_curve(points, None, (100, 100))
    assert [trace.name for trace in figure.data] == [
        "both, bare cut, allocated",
        "both, bare cut, uniform",
    ]
    assert curve_chart.points_table(points)["widths"].tolist() == ["uniform", "allocated"]
    assert "allocated: means" in figure.data[0].customdata[0][5]


def test_equally_large_cuts_are_compared_by_how_widths_were_given():
    sized = [(9e5, 14.0), (8e5, 18.0)]
    uniform = [measured(parameters=int(size), perplexity=loss) for size, loss in sized]
    own = [
        measured(parameters=int(size) + 1000, perplexity=loss - 2, widths="allocated")
        for size, loss in sized
    ]
    figure = tradeoff_charts.equal_parameters_chart([*uniform, *own])
    assert [trace.name for trace in figure.data] == ["uniform", "allocated"]
    assert list(figure.data[1].x) == [0.801, 0.901]
    # Where the two differ most: dense is 10.
    assert figure.layout.title.text == (
        "At 0.9 M parameters allocated costs 1.20 × the dense perplexity, uniform 1.40 ×"
    )
    assert figure.layout.xaxis.title.text == "parameters (M)"
    symbols = {trace.marker.symbol for trace in figure.data}
    assert len(symbols) == 2
    far = measured(parameters=700_000, widths="traded")
    title = tradeoff_charts.equal_parameters_chart([uniform[0], far]).layout.title.text
    assert title.startswith("No uniform cut was measured that is as large")


def test_bars_of_every_layer_say_which_keeps_least(gqa_bench):
    shape = gqa_bench.loaded.architecture
    choices = Choices(widths="by-hand", by_hand=((6, 40), (3, 10), (6, 40)))
    plan = plan_by_hand(gqa_bench, choices)
    figure = plan_charts.layer_widths(plan, shape)
    assert figure.layout.title.text == "Layer 1 keeps least: 25% of its MLP"
    assert list(figure.data[0].y) == [1, 0.5, 1]
    table = plan_charts.widths_table(plan, shape)
    assert table["key_value_heads"].tolist() == [3, 3, 3]
    assert "10 to 40 of 40" in plan_charts.kept_channels(plan, 40).layout.title.text
    uniform = plan_charts.layer_widths(gqa_bench.plan(0.5, 0.3, Choices()), shape)
    assert uniform.layout.title.text == "Every layer keeps 50% of its MHA and 70% of its MLP"
