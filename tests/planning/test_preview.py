import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pruning.test_plan import architectures, plans
from transact_core.forward.statistics import ActivationStatistics, ModuleStatistics
from transact_core.forward.waists import head_rows
from transact_core.importance.scores import Scores
from transact_core.models.architecture import Architecture
from transact_core.models.footprint import footprint
from transact_core.planning.preview import (
    POSITIONS,
    cost_of,
    energy_kept,
    layer_costs,
    maps,
    relative,
    shades,
    structure,
)
from transact_core.pruning.plan import GRANULARITIES, widths, widths_of_layer

positions = st.sampled_from(POSITIONS)


def option_at(table, mha: int, mlp: int) -> tuple[int, int]:
    return table.mha.option_at[mha], table.mlp.option_at[mlp]


@settings(max_examples=40)
@given(
    shape=architectures(),
    mha=positions,
    mlp=positions,
    granularity=st.sampled_from(GRANULARITIES),
    multiple_of=st.sampled_from([1, 4]),
    biases=st.booleans(),
    own_bias=st.booleans(),
    context=st.integers(1, 100_000),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_costs_of_all_positions_are_those_of_the_footprint(
    shape, mha, mlp, granularity, multiple_of, biases, own_bias, context, dtype
):
    shape = dataclasses.replace(shape, attention_bias=own_bias)
    table = structure(shape, granularity, multiple_of, biases, multiple_of)
    cut = widths(shape, mha / 100, mlp / 100, granularity, multiple_of, multiple_of)
    expected = footprint(cut.applied_to(shape, biases), dtype, context)
    chosen = option_at(table, mha, mlp)
    cost, size = table.cost(*chosen), {"float32": 4, "bfloat16": 2}[dtype]
    assert cost.parameters == expected.parameters
    assert cost.parameters * size == expected.weight_bytes
    assert cost.kv_values * size == expected.kv_bytes_per_token
    assert cost.flops + cost.flops_per_context * context == expected.flops_per_token
    assert table.mha.options[chosen[0]].width == expected.mha_width
    assert table.mlp.options[chosen[1]].width == expected.mlp_width


@settings(max_examples=40)
@given(architectures(), st.sampled_from(GRANULARITIES), st.sampled_from([1, 4]))
def test_options_go_from_the_dense_width_down(shape, granularity, multiple_of):
    table = structure(shape, granularity, multiple_of)
    for side, dense in ((table.mha, shape.mha_width), (table.mlp, shape.intermediate_size)):
        found = [option.width for option in side.options]
        assert found == sorted(set(found), reverse=True)
        assert found[0] == dense
        assert all(value == 0 for value in vars(side.options[0].saving).values())
        assert {side.option_at[side.position_of(each)] for each in range(len(found))} == set(
            range(len(found))
        )


def statistics_for(shape, seed: int) -> ActivationStatistics:
    generator = torch.Generator().manual_seed(seed)

    def module(width: int) -> ModuleStatistics:
        energy = torch.rand(
            shape.num_hidden_layers, width, generator=generator, dtype=torch.float64
        )
        return ModuleStatistics(energy, energy, energy, tokens=1)

    widths = (shape.mha_width, shape.intermediate_size, shape.hidden_size)
    return ActivationStatistics(*map(module, widths))


def kept_channels_of_attention(layer, shape) -> list[int]:
    if not layer.value_dims:
        return head_rows(layer.kept_heads, shape.head_dim).tolist()
    return [
        head * shape.head_dim + dim
        for head in layer.kept_heads
        for dim in layer.value_dims[head // shape.queries_per_group]
    ]


@settings(max_examples=40)
@given(plans(), st.integers(0, 1000))
def test_energy_and_maps_are_those_of_the_plan(drawn, seed):
    shape, scores, plan = drawn
    table = structure(
        shape, plan.granularity, plan.multiple_of, head_dim_multiple_of=plan.head_dim_multiple_of
    )
    statistics = statistics_for(shape, seed)
    energy = energy_kept(table, scores, statistics, shape)
    drawn_maps = maps(table, scores, shape)
    chosen = widths(
        shape,
        plan.mha_ratio,
        0.0,
        plan.granularity,
        plan.multiple_of,
        plan.head_dim_multiple_of,
    )
    mha = next((n for n, each in enumerate(table.mha.options) if each.widths == chosen), None)
    mlp = next(
        (n for n, each in enumerate(table.mlp.options) if each.width == plan.intermediate_size),
        None,
    )
    for number, layer in enumerate(plan.layers):
        if mha is not None:
            row = statistics.mha.sum_of_squares[number]
            kept = kept_channels_of_attention(layer, shape)
            assert energy.mha[mha, number] == pytest.approx((row[kept].sum() / row.sum()).item())
            stays = np.flatnonzero(drawn_maps.stays_until[number] >= mha)
            assert tuple(stays) == layer.kept_heads
        if mlp is not None:
            row = statistics.mlp.sum_of_squares[number]
            kept = list(layer.kept_channels)
            assert energy.mlp[mlp, number] == pytest.approx((row[kept].sum() / row.sum()).item())


def test_a_layer_without_energy_has_none_to_lose():
    shape = small_shape()
    zero = torch.zeros(1, 8, dtype=torch.float64)
    quiet = ModuleStatistics(zero, zero, zero, tokens=1)
    table = structure(shape, "query-heads")
    kept = energy_kept(table, even_scores(), ActivationStatistics(quiet, quiet, quiet), shape)
    assert (kept.mha == 1).all()
    assert (kept.mlp == 1).all()
    assert kept.mean(0, 0) == 1


def small_shape():
    return Architecture(8, 8, 1, 4, 2, 2, 11, False, False, False)


def even_scores():
    ones = torch.ones(1, 8, dtype=torch.float64)
    return Scores(ones[:, :4], ones, ones)


def test_ranked_channels_fall_from_the_best_to_the_worst():
    generator = torch.Generator().manual_seed(0)
    shape = dataclasses.replace(small_shape(), intermediate_size=1000)
    channels = torch.rand(1, 1000, generator=generator, dtype=torch.float64)
    ones = torch.ones(1, 8, dtype=torch.float64)
    drawn = maps(structure(shape, "query-heads"), Scores(ones[:, :4], ones, channels), shape)
    row = drawn.ranked_channels.values[0]
    assert row.shape == (256,)
    assert (np.diff(row) <= 0).all()
    assert row[[0, -1]].tolist() == [1, pytest.approx((channels.min() / channels.max()).item())]
    assert len(drawn.ranked_channels.in_bytes()) == 256


@pytest.mark.parametrize(
    ("scores", "scale", "values"),
    [
        ([[1, 0.5, 0.4]], "linear", [1, 0.5, 0.4]),
        ([[1, 0.1, 0.01, 1e-9]], "log", [1, 2 / 3, 1 / 3, 0]),
        ([[2, 0, 1]], "order", [1, 0, 0.5]),
        ([[-1, -2, -3.5]], "log", [0, 0, 0]),
    ],
)
def test_shades_tell_scores_apart(scores, scale, values):
    made = shades(np.array(scores, dtype=float), logarithmic_below=0.3)
    assert made.scale == scale
    assert made.values[0] == pytest.approx(values)


def test_relative_scores_have_no_size_without_a_best():
    assert relative(np.array([[0.0, 0.0], [1.0, 2.0]])).tolist() == [[0, 0], [0.5, 1]]


def test_costs_subtract_by_name():
    cost = cost_of(small_shape())
    assert vars(cost - cost) == dict.fromkeys(vars(cost), 0)


@settings(max_examples=40)
@given(
    shape=architectures(),
    granularity=st.sampled_from(("query-heads", "kv-groups")),
    multiple_of=st.sampled_from([1, 4]),
    biases=st.booleans(),
    data=st.data(),
)
def test_costs_of_single_layers_are_those_of_the_architecture(
    shape, granularity, multiple_of, biases, data
):
    costs = layer_costs(shape, granularity, multiple_of, biases)
    kept = {
        module: [data.draw(st.sampled_from(each.units)) for _ in range(shape.num_hidden_layers)]
        for module, each in costs.items()
    }
    cut = shape.with_layers(
        [
            widths_of_layer(shape, granularity, heads, channels)
            for heads, channels in zip(kept["mha"], kept["mlp"], strict=True)
        ]
    )
    if biases:
        removed = {
            module: any(units < costs[module].units[-1] for units in of_layers)
            for module, of_layers in kept.items()
        }
        cut = dataclasses.replace(
            cut,
            attention_bias=cut.attention_bias or removed["mha"],
            mlp_bias=cut.mlp_bias or removed["mlp"],
        )
    saved = cost_of(shape) - cost_of(cut)
    found = [costs[module].saving(kept[module]) for module in costs]
    for name in vars(saved):
        assert sum(getattr(each, name) for each in found) == getattr(saved, name), name
