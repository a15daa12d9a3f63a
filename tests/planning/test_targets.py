"""The search against a plain loop over all 96 × 96 positions."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.planning.test_preview import even_scores, small_shape, statistics_for
from tests.pruning.test_plan import architectures
from transact_core.base.errors import TransActError
from transact_core.models.footprint import footprint
from transact_core.planning.law import Ratio
from transact_core.planning.preview import POSITIONS, energy_kept, structure
from transact_core.planning.targets import Target, find
from transact_core.pruning.plan import GRANULARITIES, widths


def cost_at(shape, granularity, mha, mlp):
    return footprint(widths(shape, mha / 100, mlp / 100, granularity).applied_to(shape), "float32")


@settings(max_examples=15)
@given(
    shape=architectures(),
    granularity=st.sampled_from(GRANULARITIES),
    share=st.floats(0.3, 1.2),
    goal=st.sampled_from(["parameters", "flops", "kv-cache"]),
)
def test_a_size_is_met_with_the_most_parameters_or_refused(shape, granularity, share, goal):
    dense = footprint(shape, "float32")

    def size(cost) -> float:
        if goal == "parameters":
            return cost.parameters
        if goal == "flops":
            return cost.flops_per_token
        return cost.kv_bytes_per_token / dense.kv_bytes_per_token

    at_most = share * size(dense)
    costs = [cost_at(shape, granularity, *pair) for pair in product(POSITIONS[::12], repeat=2)]
    meeting = [cost.parameters for cost in costs if size(cost) <= at_most]
    try:
        found = find(Target(goal, at_most), structure(shape, granularity))
    except TransActError:
        assert not meeting
        return
    taken = cost_at(shape, granularity, found.mha_position, found.mlp_position)
    assert size(taken) <= at_most
    assert taken.parameters >= max(meeting, default=0)
    assert 0 < found.meeting <= found.of


def test_a_file_is_found_among_the_widths_that_can_be_written():
    shape = small_shape()
    table = structure(shape, "query-heads")
    widths_of = {
        (mha.width, mlp.width): 1000 * mha.width + mlp.width
        for mha, mlp in product(table.mha.options[1:], table.mlp.options)
    }
    largest = table.mha.options[1].width, table.mlp.options[0].width
    found = find(Target("file", widths_of[largest]), table, file_bytes=widths_of)
    taken = table.mha.option_at[found.mha_position], table.mlp.option_at[found.mlp_position]
    # The dense heads would keep more, but cannot be written.
    assert taken == (1, 0)
    assert found.meeting == found.of == len(widths_of)
    with pytest.raises(TransActError, match=r"comes down to a file of 0\.0 MB"):
        find(Target("file", 1), table, file_bytes=widths_of)
    with pytest.raises(TransActError, match="can be written as such a file"):
        find(Target("file", 1), table, file_bytes={})


def test_energy_decides_where_nothing_is_predicted():
    shape = small_shape()
    table = structure(shape, "query-heads")
    energy = energy_kept(table, even_scores(), statistics_for(shape, 3), shape)
    at_most = table.dense.parameters - 100
    found = find(Target("parameters", at_most), table, None, energy)
    taken = table.mha.option_at[found.mha_position], table.mlp.option_at[found.mlp_position]
    others = [
        energy.mean(*pair)
        for pair in product(range(len(table.mha.options)), range(len(table.mlp.options)))
        if table.cost(*pair).parameters <= at_most
    ]
    assert energy.mean(*taken) == max(others)
    assert "energy" in found.why


def predicted(table):
    """Dearer the more is cut, MHA three times as much."""
    prediction = {}
    for mha, mlp in product(table.mha.options, table.mlp.options):
        middle = 4 - 3 * mha.width / table.mha.options[0].width * 0.75
        middle -= 0.75 * mlp.width / table.mlp.options[0].width
        prediction[mha.width, mlp.width] = Ratio(middle * 0.9, middle, middle * 1.1)
    return prediction


def test_prediction_decides_where_there_is_one():
    table = structure(small_shape(), "query-heads")
    at_most = table.dense.parameters - 60
    found = find(Target("parameters", at_most), table, predicted(table))
    # The MLP can carry it alone, at a third of the price.
    assert found.mha_position == 0
    assert "predicted" in found.why


def test_a_perplexity_is_met_with_the_fewest_parameters():
    table = structure(small_shape(), "query-heads")
    prediction = predicted(table)
    found = find(Target("perplexity", 1.5), table, prediction)
    taken = (
        table.mha.options[table.mha.option_at[found.mha_position]].width,
        table.mlp.options[table.mlp.option_at[found.mlp_position]].width,
    )
    assert prediction[taken].mid <= 1.5
    fewest = min(
        table.cost(mha, mlp).parameters
        for (mha, one), (mlp, other) in product(
            enumerate(table.mha.options), enumerate(table.mlp.options)
        )
        if prediction[one.width, other.width].mid <= 1.5
    )
    option = table.mha.option_at[found.mha_position], table.mlp.option_at[found.mlp_position]
    assert table.cost(*option).parameters == fewest


def test_what_cannot_be_found_is_said():
    table = structure(small_shape(), "query-heads")
    with pytest.raises(TransActError, match="measure a point"):
        find(Target("perplexity", 1.5), table)
    with pytest.raises(TransActError, match=r"comes down to 10% of the KV cache; the least"):
        find(Target("kv-cache", 0.1), table)
