import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import FEW_KINDS, KINDS, bench_of, make_model, same_weights, snapshot
from tests.pruning.test_plan import architectures, ratios
from transact_core.base.errors import TransActError
from transact_core.experiments.bench import Bench, Choices
from transact_core.experiments.decide import decide, held_out_loss, schedule
from transact_core.forward.perplexity import evaluate
from transact_core.importance.elimination import eliminate_module
from transact_core.models.architecture import Architecture
from transact_core.pruning.closed_form import recover
from transact_core.pruning.plan import GRANULARITIES, head_counts, widths
from transact_core.pruning.surgery import prune


def test_one_step_of_a_fixed_granularity_is_the_plain_plan(gqa_bench):
    decision = decide(gqa_bench, 0.5, 0.3, Choices())
    assert decision.plan == gqa_bench.plan(0.5, 0.3, Choices())
    assert (decision.granularity_losses, decision.earlier_steps, decision.why) == ({}, (), None)


def test_auto_takes_the_lowest_held_out_loss(gqa_bench):
    decision = decide(gqa_bench, 0.34, 0.3, Choices(granularity="auto"))
    assert set(decision.granularity_losses) == set(GRANULARITIES)
    best = min(decision.granularity_losses, key=decision.granularity_losses.get)
    assert decision.plan == gqa_bench.plan(0.34, 0.3, Choices(granularity=best))
    for granularity, loss in decision.granularity_losses.items():
        assert f"{granularity} {loss:.3f}" in decision.why


def test_auto_leaves_out_what_cannot_be_had(tokenizer, windows):
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    bench = bench_of(make_model(**KINDS["mha"], rope_parameters=rope), tokenizer, windows)
    assert set(decide(bench, 0.5, 0, Choices(granularity="auto")).granularity_losses) == {
        "kv-groups"
    }


def test_auto_leaves_out_what_would_cut_nothing(gqa_bench):
    """An uncut model loses least: at 0.15 the nearest number of heads is all of them."""
    decision = decide(gqa_bench, 0.15, 0, Choices(granularity="auto"))
    assert set(decision.granularity_losses) == {"head-dims"}
    assert decision.plan.head_dim == 6
    nothing = decide(gqa_bench, 0.01, 0, Choices(granularity="auto"))
    assert nothing.granularity_losses == {}
    assert not nothing.plan.cuts_anything(gqa_bench.loaded.architecture)


def test_auto_without_an_attention_cut_tries_nothing(gqa_bench):
    decision = decide(gqa_bench, 0, 0.3, Choices(granularity="auto"))
    assert decision.granularity_losses == {}
    assert decision.plan.num_attention_heads == 6


def test_held_out_loss_without_repair_is_that_of_the_pruned_model(gqa_bench):
    plan = gqa_bench.plan(0.5, 0.3, Choices())
    model = prune(gqa_bench.loaded.model, plan)
    measured = evaluate(model, gqa_bench.calibration).mean_nll
    loss = held_out_loss(gqa_bench.loaded.model, plan, gqa_bench.calibration, "none")
    assert loss == pytest.approx(measured, rel=1e-5)


@pytest.mark.parametrize(("count", "tried"), [(4, [0, 2]), (3, [0, 1, 2])])
def test_auto_tries_on_half_of_the_windows_if_those_can_be_dealt(gqa_bench, count, tried):
    calibration = replace(gqa_bench.calibration, ids=gqa_bench.calibration.ids[:count])
    bench = Bench(gqa_bench.loaded, calibration, gqa_bench.evaluation)
    choices = Choices(granularity="auto", recovery="none")
    for granularity, loss in decide(bench, 0.34, 0, choices).granularity_losses.items():
        plan = bench.plan(0.34, 0, replace(choices, granularity=granularity))
        half = replace(calibration, ids=calibration.ids[tried])
        expected = held_out_loss(bench.loaded.model, plan, half, "none")
        assert loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("model", FEW_KINDS, indirect=True)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_steps_end_at_the_asked_widths_and_only_ever_remove(bench, granularity):
    dense = snapshot(bench.loaded.model)
    choices = Choices(granularity=granularity, steps=3)
    decision = decide(bench, 0.67, 0.6, choices)
    assert decision.plan.widths == bench.plan(0.67, 0.6, replace(choices, steps=1)).widths
    assert same_weights(bench.loaded.model, dense)
    channels = [40, *(step.intermediate_size for step in decision.earlier_steps)]
    assert channels == sorted(channels, reverse=True)
    assert decision.earlier_steps[-1].intermediate_size > decision.plan.intermediate_size
    assert all(math.isfinite(step.perplexity) for step in decision.earlier_steps)


def test_later_steps_score_the_pruned_model(gqa_bench, monkeypatch):
    seen = []
    from transact_core.experiments import decide as module

    real = module.score

    def watched(importance, evidence):
        seen.append(evidence.architecture.intermediate_size)
        return real(importance, evidence)

    monkeypatch.setattr(module, "score", watched)
    decide(gqa_bench, 0, 0.6, Choices(steps=4))
    assert seen == [34, 28, 22]


@given(architectures(), ratios, ratios, st.sampled_from(GRANULARITIES), st.integers(1, 5))
def test_a_schedule_falls_to_the_target(shape, mha_ratio, mlp_ratio, granularity, steps):
    choices = Choices(granularity=granularity, steps=steps)
    taken = [
        widths(shape, *pair, granularity).applied_to(shape)
        for pair in schedule(shape, mha_ratio, mlp_ratio, choices)
    ]
    assert len(taken) == steps
    for before, after in zip([shape, *taken], taken, strict=False):
        assert after.mha_width <= before.mha_width
        assert after.intermediate_size <= before.intermediate_size
    allowed = head_counts(shape, granularity) if granularity != "head-dims" else []
    for cut in taken[:-1]:
        assert not allowed or cut.num_attention_heads in allowed
    # The paper's rule, on the MLP's width.
    width, target = shape.intermediate_size, taken[-1].intermediate_size
    for left, cut in zip(range(steps, 0, -1), taken, strict=True):
        width -= (width - target) // left
        assert cut.intermediate_size == width


def test_scores_return_to_their_places_in_the_dense_model(gqa_bench):
    from transact_core.experiments.decide import _in_dense_places
    from transact_core.importance.scores import Evidence, score
    from transact_core.pruning.surgery import prune

    plan = gqa_bench.plan(0.5, 0.3, Choices())
    model = prune(gqa_bench.loaded.model, plan)
    cut = Architecture.from_config(model.config)
    small = score("activation", Evidence(model, gqa_bench.calibration, cut))
    placed = _in_dense_places(small, plan, gqa_bench.scores("activation"))
    for number, layer in enumerate(plan.layers):
        assert torch.equal(
            placed.channels[number, list(layer.kept_channels)], small.channels[number]
        )
        assert torch.equal(placed.heads[number, list(layer.kept_heads)], small.heads[number])
        gone = sorted(set(range(40)) - set(layer.kept_channels))
        assert (placed.channels[number, gone] == -torch.inf).all()


SEQUENTIAL = Choices(importance="reconstruction", sequential=True)


@pytest.mark.parametrize("model", FEW_KINDS, indirect=True)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("recovery", ["least-squares", "bias"])
def test_sequential_choices_are_those_of_the_stream_they_lead_to(bench, granularity, recovery):
    dense = bench.loaded.model
    before = snapshot(dense)
    choices = replace(SEQUENTIAL, granularity=granularity, recovery=recovery)
    decision = decide(bench, 0.5, 0.4, choices)
    plan = decision.plan
    assert decision.sequential
    assert plan.widths == bench.plan(0.5, 0.4, choices).widths
    assert same_weights(dense, before)

    scores = copy.deepcopy(bench.scores("reconstruction"))

    def look(number, module, transitional, weights):
        # An elimination weights squares by the square of what a repair does.
        rows = (transitional * weights[..., None]).flatten(0, 1)
        layer = dense.model.layers[number]
        for name, row in eliminate_module(layer, number, module, [rows]).items():
            getattr(scores, name)[number] = row
        chosen = bench.plan(0.5, 0.4, choices, scores=scores).layers[number]
        if module == "mlp":
            assert chosen.kept_channels == plan.layers[number].kept_channels
        else:
            assert chosen.kept_heads == plan.layers[number].kept_heads
        return plan.layers[number]

    model = prune(dense, plan, with_biases=recovery == "bias")
    recover(dense, model, plan, bench.calibration, recovery, choose=look)


def test_sequential_choices_begin_with_the_dense_stream_and_leave_it(gqa_bench):
    at_once = gqa_bench.plan(0, 0.6, SEQUENTIAL)
    one_by_one = decide(gqa_bench, 0, 0.6, SEQUENTIAL).plan
    assert one_by_one.layers[0] == at_once.layers[0]
    assert one_by_one.layers != at_once.layers


def test_sequential_cutting_of_nothing_is_the_plain_plan(gqa_bench):
    assert decide(gqa_bench, 0, 0, SEQUENTIAL).plan == gqa_bench.plan(0, 0, SEQUENTIAL)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"importance": "activation"}, "activation"),
        ({"recovery": "none"}, "least-squares"),
        ({"steps": 2}, "one step"),
    ],
)
def test_sequential_choices_need_what_they_stand_on(gqa_bench, change, word):
    with pytest.raises(TransActError, match=word):
        decide(gqa_bench, 0.5, 0.5, replace(SEQUENTIAL, **change))
