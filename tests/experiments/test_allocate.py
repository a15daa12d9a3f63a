"""Widths of their own for each layer, chosen on a small model."""

import pytest
import torch

from tests.conftest import KINDS, bench_of, make_model
from transact_core.base.errors import TransActError
from transact_core.data.windows import WindowSpec
from transact_core.experiments import allocate
from transact_core.experiments.allocate import (
    allocated_plan,
    filled,
    loss_laws,
    plan_by_hand,
    price_windows,
)
from transact_core.experiments.bench import Choices
from transact_core.experiments.cut_spec import BenchSpec, open_bench
from transact_core.experiments.decide import decide
from transact_core.experiments.results import decided
from transact_core.planning.width_table import FLOOR

OWN = Choices(widths="allocated")


pytestmark = pytest.mark.usefixtures("short_texts")
BY_HAND = ((6, 48), (3, 16), (6, 48), (3, 25))


def by_hand(**others) -> Choices:
    return Choices(widths="by-hand", by_hand=BY_HAND, **others)


@pytest.fixture
def bench(tokenizer, windows):
    """One of 4 layers whose second matters least: what it adds is small."""
    model = make_model(**KINDS["gqa"] | {"num_hidden_layers": 4, "intermediate_size": 48})
    for weight in (
        model.model.layers[1].mlp.down_proj.weight,
        model.model.layers[2].self_attn.o_proj.weight,
    ):
        weight.mul_(0.02)
    return bench_of(model, tokenizer, windows)


def test_the_layers_that_matter_least_lose_most_at_equal_parameters(bench):
    shape = bench.loaded.architecture
    uniform = bench.plan(0.5, 0.3, Choices())
    made = allocated_plan(bench, 0.5, 0.3, OWN)
    made.plan.check(shape)
    assert not made.plan.uniform
    widths = made.plan.layer_widths(shape)
    channels = [each.intermediate_size for each in widths]
    assert sum(channels) == 4 * uniform.intermediate_size
    assert channels[1] == min(channels) < uniform.intermediate_size
    assert min(channels) >= FLOOR * uniform.intermediate_size
    heads = [each.num_attention_heads for each in widths]
    assert sum(heads) == 4 * uniform.num_attention_heads
    assert heads[2] == min(heads)
    assert all(each.num_key_value_heads == 3 for each in widths)
    assert 1 <= len(made.divergences) <= allocate.TRIALS
    parameters = [plan.applied_to(shape).parameters for plan in (made.plan, uniform)]
    assert parameters[0] == parameters[1]
    again = allocated_plan(bench, 0.5, 0.3, OWN)
    assert (again.plan, again.divergences) == (made.plan, made.divergences)


def test_traded_widths_have_the_same_parameters_in_all(bench):
    shape = bench.loaded.architecture
    uniform = bench.plan(0.5, 0.3, Choices()).applied_to(shape).parameters
    plan = allocated_plan(bench, 0.5, 0.3, Choices(widths="traded")).plan
    of_channel = 3 * shape.hidden_size
    assert uniform - of_channel < plan.applied_to(shape).parameters <= uniform


@pytest.mark.parametrize("widths", ["allocated", "traded"])
def test_a_module_of_ratio_0_stays_untouched(bench, widths):
    shape = bench.loaded.architecture
    plan = allocated_plan(bench, 0, 0.4, Choices(widths=widths)).plan
    assert not plan.cuts_mha(shape)
    assert plan.cuts_mlp(shape)
    assert allocated_plan(bench, 0, 0, Choices(widths=widths)).plan == bench.plan(0, 0, Choices())


def test_multiples_hold_in_each_layer_and_kept_layers_stay_whole(bench):
    shape = bench.loaded.architecture
    choices = Choices(widths="allocated", multiple_of=8, keep_layers=(0, 3))
    plan = allocated_plan(bench, 0, 0.25, choices).plan
    channels = [each.intermediate_size for each in plan.layer_widths(shape)]
    assert channels[0] == channels[3] == 48
    assert sum(channels) == 4 * 40 - 4 * 40 % 8
    assert all(width % 8 == 0 for width in channels)
    assert not plan.cuts_module(0, "mlp", shape)


def test_whole_groups_are_given_to_layers(bench):
    shape = bench.loaded.architecture
    choices = Choices(widths="allocated", granularity="kv-groups")
    widths = allocated_plan(bench, 0.34, 0, choices).plan.layer_widths(shape)
    assert all(each.num_attention_heads == 2 * each.num_key_value_heads for each in widths)
    assert sum(each.num_key_value_heads for each in widths) == 4 * 2


@pytest.mark.parametrize("recovery", ["none", "bias"])
def test_other_recoveries_are_priced_as_they_repair(bench, recovery):
    made = allocated_plan(bench, 0, 0.4, Choices(widths="allocated", recovery=recovery))
    assert not made.plan.uniform


def test_the_decision_tells_how_it_was_made_and_is_kept(bench):
    decision = decided(bench, 0, 0.4, OWN)
    assert decision.widths == "allocated"
    assert "allocated in" in decision.how_allocated
    assert decided(bench, 0, 0.4, OWN) == decision
    uniform = decide(bench, 0, 0.4, Choices())
    assert (uniform.widths, uniform.how_allocated) == ("uniform", None)
    assert uniform.plan == bench.plan(0, 0.4, Choices())
    assert decide(bench, 0, 0, OWN).how_allocated is None


def test_sequential_choices_and_auto_keep_the_allocated_widths(bench):
    choices = Choices(
        widths="allocated", importance="reconstruction", sequential=True, granularity="auto"
    )
    decision = decide(bench, 0.5, 0.4, choices)
    shape = bench.loaded.architecture
    assert decision.granularity_losses
    assert "head-dims" not in decision.granularity_losses
    assert decision.sequential
    uniform = bench.plan(0.5, 0.4, Choices(importance="reconstruction"))
    assert sum(each.intermediate_size for each in decision.plan.layer_widths(shape)) == (
        4 * uniform.intermediate_size
    )


@pytest.mark.parametrize(
    ("choices", "complaint"),
    [
        (Choices(keep_layers=(0,)), "allocated or traded"),
        (Choices(widths="allocated", granularity="head-dims"), "same dimensions"),
        (Choices(widths="traded", steps=2), "in one step"),
        (Choices(widths="allocated", keep_layers=(4,)), "no layer 4.*0 to 3"),
        (Choices(widths="allocated", keep_layers=(0, 1, 2, 3)), "nothing can be cut"),
        (Choices(widths="allocated", keep_layers=(0, 1, 2)), "keep fewer layers"),
        (Choices(widths="even"), "'even' are not known"),
        (Choices(by_hand=BY_HAND), "where the widths are by-hand"),
        (Choices(widths="by-hand"), "0 layers, where the model has 4"),
        (by_hand(keep_layers=(0,)), "name the dense width"),
        (by_hand(granularity="auto"), "in place of auto"),
        (by_hand(granularity="kv-groups"), "Layer 1 cannot keep 3 query heads by kv-groups"),
        (by_hand(granularity="head-dims"), "same dimensions"),
        (by_hand(multiple_of=16), "Layer 3 cannot keep 25 channels.*multiples of 16"),
        (by_hand(steps=2), "in one step"),
    ],
)
def test_choices_that_exclude_each_other_are_refused(bench, choices, complaint):
    with pytest.raises(TransActError, match=complaint):
        decide(bench, 0.5, 0.5, choices)


def test_held_out_windows_are_of_several_kinds_and_used_for_nothing_else(checkpoint, text_file):
    windows = WindowSpec(str(text_file), "builtin", 640, 640, 32, ("builtin-code",))
    bench = open_bench(BenchSpec(str(checkpoint), windows=windows))
    held_out, kinds = price_windows(bench)
    assert kinds == (str(text_file),) * 2 + ("builtin",) * 2 + ("builtin-code",) * 2
    assert held_out.ids.shape == (6, 32)
    seen = {
        tuple(row.tolist())
        for text in (bench.calibration, bench.evaluation, *bench.others)
        for row in text.ids
    }
    assert not seen & {tuple(row.tolist()) for row in held_out.ids}
    assert torch.equal(price_windows(bench)[0].ids, held_out.ids)
    bench.seed = 1
    assert not torch.equal(price_windows(bench)[0].ids, held_out.ids)


def test_widths_by_hand_are_cut_as_they_are_named_whatever_the_ratios(bench):
    shape = bench.loaded.architecture
    decision = decided(bench, 0.9, 0.1, by_hand())
    plan = decision.plan
    plan.check(shape)
    assert (plan.mha_ratio, plan.mlp_ratio) == (0.25, round(1 - 137 / 192, 4))
    widths = [
        (each.num_attention_heads, each.intermediate_size) for each in plan.layer_widths(shape)
    ]
    assert tuple(widths) == BY_HAND == decision.by_hand
    # The best-scored units stay, as in a uniform cut.
    alike = bench.plan(0.5, 1 - 16 / 48, Choices())
    assert plan.layers[1] == alike.layers[1]
    dense = tuple((6, 48) for _ in range(4))
    assert plan_by_hand(bench, Choices(widths="by-hand", by_hand=dense)) == bench.plan(
        0, 0, Choices()
    )


def test_the_rest_is_filled_as_the_allocator_would(bench):
    shape = bench.loaded.architecture
    laws = loss_laws(bench, Choices())
    assert set(laws) == {"mha", "mlp"}
    free = filled(bench, 0.5, 0.3, Choices(), laws, {})
    uniform = bench.plan(0.5, 0.3, Choices()).widths
    assert sum(heads for heads, _ in free) == 4 * uniform.num_attention_heads
    assert sum(channels for _, channels in free) == 4 * uniform.intermediate_size
    assert min(free, key=lambda each: each[1]) == free[1]
    fixed = filled(bench, 0.5, 0.3, Choices(multiple_of=2), laws, {"mlp": {1: 48}, "mha": {}})
    assert fixed[1][1] == 48
    assert sum(channels for _, channels in fixed) == 4 * uniform.intermediate_size
    assert all(channels % 2 == 0 for _, channels in fixed)
    assert all(0 < heads <= shape.num_attention_heads for heads, _ in fixed)
