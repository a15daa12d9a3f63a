import dataclasses
import re
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transact_core.base.errors import TransActError
from transact_core.importance.rotary_pairs import PairEffects, drop_order
from transact_core.importance.scores import Scores
from transact_core.models.architecture import Architecture
from transact_core.pruning.plan import (
    GRANULARITIES,
    PruningPlan,
    head_counts,
    kept_groups,
    make_plan,
    parse_ratio,
    plan_notices,
    width_notices,
    widths,
)

ratios = (
    st.floats(0, 1, exclude_max=True)
    .map(lambda ratio: round(ratio, 3))
    .filter(lambda ratio: ratio < 1)
)


@st.composite
def architectures(draw) -> Architecture:
    groups, queries = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    heads, head_dim = groups * queries, 2 * draw(st.integers(1, 4))
    return Architecture(
        hidden_size=heads * draw(st.integers(1, 8)),
        intermediate_size=draw(st.integers(1, 70)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        vocab_size=11,
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
    )


def random_pairs(shape: Architecture, random) -> PairEffects:
    half = shape.head_dim // 2
    effects = random(shape.num_key_value_heads * half).unflatten(1, (-1, half))
    inv_freq = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    return PairEffects(effects, drop_order(effects, inv_freq), inv_freq)


@st.composite
def plans(draw) -> tuple[Architecture, Scores, PruningPlan]:
    shape = draw(architectures())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))

    def random(width: int) -> torch.Tensor:
        return torch.rand(shape.num_hidden_layers, width, generator=generator, dtype=torch.float64)

    scores = Scores(
        heads=random(shape.num_attention_heads),
        head_channels=random(shape.mha_width),
        channels=random(shape.intermediate_size),
    )
    plan = make_plan(
        shape,
        scores,
        "activation",
        draw(ratios),
        draw(ratios),
        draw(st.sampled_from(GRANULARITIES)),
        draw(st.integers(1, 9)),
        random_pairs(shape, random),
        draw(st.integers(1, 5)),
    )
    return shape, scores, plan


@given(plans())
def test_a_plan_fits_its_architecture_and_round_trips(made):
    shape, _, plan = made
    plan.check(shape)
    assert PruningPlan.model_validate_json(plan.model_dump_json()) == plan


@given(plans())
def test_the_best_channels_stay(made):
    _, scores, plan = made
    for row, layer in zip(scores.channels, plan.layers, strict=True):
        gone = sorted(set(range(len(row))) - set(layer.kept_channels))
        if gone:
            assert row[gone].max() <= row[list(layer.kept_channels)].min()


@given(plans())
def test_the_best_heads_of_each_group_stay_or_the_best_groups(made):
    shape, scores, plan = made
    queries = shape.queries_per_group
    for row, layer in zip(scores.heads, plan.layers, strict=True):
        groups = kept_groups(layer.kept_heads, shape)
        if len(groups) < shape.num_key_value_heads:
            means = row.unflatten(0, (-1, queries)).mean(1)
            gone = sorted(set(range(shape.num_key_value_heads)) - set(groups))
            assert means[gone].max() <= means[list(groups)].min()
        else:
            for group in groups:
                members = range(group * queries, (group + 1) * queries)
                kept = [head for head in members if head in layer.kept_heads]
                gone = [head for head in members if head not in layer.kept_heads]
                assert not gone or row[gone].max() <= row[kept].min()


@given(
    architectures(),
    ratios,
    ratios,
    st.sampled_from(GRANULARITIES),
    st.integers(1, 9),
    st.integers(1, 5),
)
def test_widths_are_the_nearest_of_whole_units(
    shape, mha_ratio, mlp_ratio, granularity, multiple_of, head_dim_multiple_of
):
    taken = widths(
        shape, mha_ratio, mlp_ratio, granularity, multiple_of, head_dim_multiple_of
    ).applied_to(shape)
    assert taken.num_attention_heads % taken.num_key_value_heads == 0
    if granularity == "head-dims":
        unit = "head_dim"
        units = [
            width for width in range(2, shape.head_dim + 1, 2) if width % head_dim_multiple_of == 0
        ] or [shape.head_dim]
        assert taken.num_attention_heads == shape.num_attention_heads
    else:
        unit = "num_attention_heads"
        units = head_counts(shape, granularity)
        assert taken.head_dim == shape.head_dim
    for name, ratio, dense, allowed in (
        (unit, mha_ratio, getattr(shape, unit), units),
        (
            "intermediate_size",
            mlp_ratio,
            shape.intermediate_size,
            [width for width in range(1, shape.intermediate_size + 1) if width % multiple_of == 0]
            or [shape.intermediate_size],
        ),
    ):
        got, wanted = getattr(taken, name), dense * (1 - Fraction(str(ratio)))
        if ratio == 0:
            assert got == dense
        else:
            assert got in allowed
            distance = abs(got - wanted)
            assert all(
                abs(other - wanted) > distance or (abs(other - wanted) == distance and other <= got)
                for other in allowed
            )


@given(architectures(), ratios, ratios, st.sampled_from(GRANULARITIES))
def test_a_larger_ratio_never_leaves_more(shape, one, other, granularity):
    small, large = sorted((one, other))
    gentle = widths(shape, small, small, granularity).applied_to(shape)
    hard = widths(shape, large, large, granularity).applied_to(shape)
    assert hard.head_dim <= gentle.head_dim
    assert hard.num_attention_heads <= gentle.num_attention_heads
    assert hard.num_key_value_heads <= gentle.num_key_value_heads
    assert hard.intermediate_size <= gentle.intermediate_size


def test_a_tie_takes_the_wider():
    shape = Architecture(40, 5, 1, 8, 8, 4, 11, False, False, False)
    assert widths(shape, 0, 0.5, "query-heads").intermediate_size == 3
    assert head_counts(shape, "query-heads") == list(range(1, 9))
    # Schema 1 had only those that divide a hidden_size of 40.
    assert head_counts(shape, "query-heads", dividing_hidden_size=True) == [1, 2, 4, 5, 8]


def test_a_plan_of_schema_1_still_fits_its_ratio():
    """It took 5 of 8 heads for a quarter, as 6 does not divide a hidden_size of 40."""
    shape = Architecture(40, 5, 1, 8, 8, 4, 11, False, False, False)
    scores = Scores(torch.rand(1, 8), torch.rand(1, 32), torch.rand(1, 5))
    now = make_plan(shape, scores, "activation", 0.25, 0)
    assert now.num_attention_heads == 6
    older = make_plan(shape, scores, "activation", 3 / 8, 0).model_copy(update={"mha_ratio": 0.25})
    assert older.num_attention_heads == 5
    older.check(shape)


@pytest.mark.parametrize("text", ["abc", "", "nan", "inf", "-0.1", "1", "1.5", "0.3.3"])
def test_a_ratio_that_is_none_is_refused(text):
    with pytest.raises(TransActError, match="--mha-ratio"):
        parse_ratio(text, "--mha-ratio")


SHAPE = Architecture(48, 10, 2, 6, 3, 8, 11, False, False, False)


@pytest.fixture
def plan() -> PruningPlan:
    scores = Scores(torch.rand(2, 6), torch.rand(2, 48), torch.rand(2, 10))
    return make_plan(SHAPE, scores, "activation", 0.5, 0.5)


@pytest.mark.parametrize(
    ("layer", "complaint"),
    [
        ({"kept_channels": (0, 1, 2, 3, 10)}, "out of range"),
        ({"kept_channels": (0, 1, 2, 3)}, "where the plan's width is 5"),
        ({"kept_channels": (1, 0, 2, 3, 4)}, "ascending"),
        ({"kept_channels": (0, 0, 2, 3, 4)}, "ascending"),
        ({"kept_heads": (0, 2, 6)}, "out of range"),
        ({"kept_heads": (0, 1, 4)}, "groups"),
    ],
)
def test_choices_that_do_not_fit_are_refused(plan, layer, complaint):
    layers = (plan.layers[0].model_copy(update=layer), plan.layers[1])
    with pytest.raises(TransActError, match=complaint):
        plan.model_copy(update={"layers": layers}).check(SHAPE)


@pytest.fixture
def narrow_plan() -> PruningPlan:
    scores = Scores(torch.rand(2, 6), torch.rand(2, 48), torch.rand(2, 10))
    pairs = random_pairs(SHAPE, lambda width: torch.rand(2, width, dtype=torch.float64))
    return make_plan(SHAPE, scores, "activation", 0.5, 0, "head-dims", pairs=pairs)


def test_narrower_heads_keep_the_best_scored_dims_of_each_group():
    scores = Scores(torch.rand(2, 6), torch.rand(2, 48), torch.rand(2, 10))
    pairs = random_pairs(SHAPE, lambda width: torch.rand(2, width, dtype=torch.float64))
    plan = make_plan(SHAPE, scores, "activation", 0.5, 0, "head-dims", pairs=pairs)
    assert (plan.head_dim, plan.num_attention_heads, len(plan.slots)) == (4, 6, 2)
    for layer, row in zip(plan.layers, scores.head_channels, strict=True):
        for group in range(3):
            means = (row[group * 16 : group * 16 + 8] + row[group * 16 + 8 : group * 16 + 16]) / 2
            assert sorted(means.topk(4).indices.tolist()) == list(layer.value_dims[group])


@pytest.mark.parametrize(
    ("layer", "complaint"),
    [
        ({"slot_pairs": ((0, 1), (0, 1))}, "for 2 key-value heads"),
        ({"slot_pairs": ((0, 1), (0, 1), (1, 1))}, "without repeats"),
        ({"slot_pairs": ((0, 1), (0, 1), (1, 4))}, "out of range"),
        ({"value_dims": ((0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2))}, "plan's width is 4"),
    ],
)
def test_dims_that_do_not_fit_are_refused(narrow_plan, layer, complaint):
    narrow_plan.check(SHAPE)
    layers = (narrow_plan.layers[0].model_copy(update=layer), narrow_plan.layers[1])
    with pytest.raises(TransActError, match=complaint):
        narrow_plan.model_copy(update={"layers": layers}).check(SHAPE)


def test_dims_in_a_plan_of_whole_heads_are_refused(plan, narrow_plan):
    with pytest.raises(TransActError, match="slot_pairs"):
        plan.model_copy(update={"layers": narrow_plan.layers}).check(SHAPE)


def test_widths_that_contradict_the_ratios_are_refused(plan):
    with pytest.raises(TransActError, match="contradict"):
        plan.model_copy(update={"intermediate_size": 6}).check(SHAPE)


def test_a_plan_of_another_depth_is_refused(plan):
    with pytest.raises(TransActError, match="layers"):
        plan.check(dataclasses.replace(SHAPE, num_hidden_layers=3))


# --- multiples and what a ratio becomes ------------------------------------------------------


def test_the_multiple_of_the_mlp_is_not_that_of_the_heads():
    """`--multiple-of 256` left heads whole, as no head_dim is a multiple of that."""
    shape = dataclasses.replace(SHAPE, intermediate_size=512, head_dim=64)
    taken = widths(shape, 0.25, 0.4, "head-dims", 256)
    assert (taken.head_dim, taken.intermediate_size) == (48, 256)
    assert widths(shape, 0.3, 0, "head-dims", 1, 32).head_dim == 32
    assert widths(shape, 0.3, 0.4, "query-heads", 1, 32) == widths(shape, 0.3, 0.4, "query-heads")


LLAMA_3_8B = Architecture(4096, 14336, 32, 32, 8, 128, 128256, False, False, False)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ((0.25, 0.3, "query-heads"), []),
        ((0.0, 0.0, "query-heads"), []),
        ((0.33, 0.3, "query-heads"), []),
        (
            (0.1, 0.0, "query-heads"),
            ["The attention loses nothing where 10.0% .* all 32 query heads .* the next one 24"],
        ),
        ((0.15, 0.0, "query-heads"), [r"loses 25.0% where 15.0% .* keeps 24 of 32 query heads"]),
        ((0.05, 0.0, "head-dims"), []),
        ((0.005, 0.0, "head-dims"), ["loses nothing .* all 128 dims of each head .* next one 126"]),
        ((0.0, 0.004, "query-heads", 256), ["The MLP loses nothing .* in multiples of 256"]),
        ((0.0, 0.3, "query-heads", 65536), ["no fewer than all 14,336 channels"]),
        ((0.2, 0.004, "head-dims", 256, 128), ["attention loses nothing", "MLP loses nothing"]),
    ],
)
def test_a_ratio_that_removes_nothing_or_far_more_says_so(asked, words):
    said = width_notices(LLAMA_3_8B, *asked)
    assert len(said) == len(words)
    for sentence, expected in zip(said, words, strict=True):
        assert re.search(expected, sentence), sentence


@given(architectures(), ratios, ratios, st.sampled_from(GRANULARITIES), st.integers(1, 9))
def test_notices_are_those_of_the_widths(shape, mha_ratio, mlp_ratio, granularity, multiple_of):
    taken = widths(shape, mha_ratio, mlp_ratio, granularity, multiple_of).applied_to(shape)
    said = width_notices(shape, mha_ratio, mlp_ratio, granularity, multiple_of)
    for module, ratio, dense, kept in (
        ("attention", mha_ratio, shape.mha_width, taken.mha_width),
        ("MLP", mlp_ratio, shape.intermediate_size, taken.intermediate_size),
    ):
        removed = 1 - kept / dense
        surprises = ratio > 0 and (removed == 0 or removed >= 1.5 * ratio)
        assert surprises == any(f"The {module} " in sentence for sentence in said)


# --- layers of their own widths --------------------------------------------------------------


def uneven(plan: PruningPlan) -> PruningPlan:
    """The plan with fewer heads and channels in its second layer."""
    last = plan.layers[1]
    heads = tuple(head for head in last.kept_heads if head >= 2)
    second = last.model_copy(update={"kept_heads": heads, "kept_channels": last.kept_channels[:2]})
    return plan.model_copy(
        update={
            "layers": (plan.layers[0], second, *plan.layers[2:]),
            "num_attention_heads": None,
            "num_key_value_heads": None,
            "intermediate_size": None,
        }
    )


def test_a_plan_may_leave_each_layer_its_own_widths(plan):
    other = uneven(plan)
    assert plan.uniform
    assert not other.uniform
    other.check(SHAPE)
    assert PruningPlan.model_validate_json(other.model_dump_json()) == other
    assert [tuple(vars(each).values()) for each in other.layer_widths(SHAPE)] == [
        (3, 3, 5),
        (2, 2, 2),
    ]
    left = other.applied_to(SHAPE, with_biases=True)
    assert left.layers == other.layer_widths(SHAPE)
    assert (left.attention_bias, left.mlp_bias) == (True, True)
    assert (left.num_attention_heads, left.intermediate_size) == (3, 5)
    with pytest.raises(ValueError, match="different widths"):
        _ = other.widths


def test_a_layer_may_stay_whole_where_others_are_cut(plan):
    whole = plan.layers[0].model_copy(
        update={"kept_heads": tuple(range(6)), "kept_channels": tuple(range(10))}
    )
    other = uneven(plan).model_copy(update={"layers": (whole, plan.layers[1])})
    other.check(SHAPE)
    assert not other.cuts_module(0, "mha", SHAPE)
    assert other.cuts_module(1, "mha", SHAPE)
    assert other.cuts_mha(SHAPE)
    assert other.cuts_mlp(SHAPE)


@pytest.mark.parametrize(
    ("layer", "complaint"),
    [
        ({"kept_heads": ()}, "one at least"),
        ({"kept_heads": (0, 1, 2)}, "groups of one size"),
        ({"kept_channels": (3, 10)}, "out of range"),
    ],
)
def test_layers_of_their_own_widths_are_checked_too(plan, layer, complaint):
    other = uneven(plan)
    layers = (other.layers[0].model_copy(update=layer), other.layers[1])
    with pytest.raises(TransActError, match=complaint):
        other.model_copy(update={"layers": layers}).check(SHAPE)


def test_notices_of_a_plan_are_those_of_its_ratios(plan):
    assert plan_notices(plan, SHAPE) == width_notices(SHAPE, 0.5, 0.5, "query-heads") == []
