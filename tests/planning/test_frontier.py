import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transact_core.planning.frontier import frontier

VALUES = st.one_of(st.integers(-5, 5).map(float), st.floats(allow_nan=False))
PAIRS = st.lists(st.tuples(VALUES, VALUES), max_size=30)


def beats(one, other) -> bool:
    return one != other and one[0] <= other[0] and one[1] <= other[1]


@given(PAIRS)
def test_it_holds_every_pair_that_no_other_beats_once(pairs):
    best = frontier([cost for cost, _ in pairs], [loss for _, loss in pairs])
    unbeaten = {pair for pair in pairs if not any(beats(other, pair) for other in pairs)}
    assert {pairs[number] for number in best} == unbeaten
    assert len(best) == len(unbeaten)
    assert best == [pairs.index(pairs[number]) for number in best]


@given(PAIRS)
def test_costs_rise_and_losses_fall(pairs):
    best = [pairs[number] for number in frontier(*zip(*pairs, strict=True))] if pairs else []
    for (cost, loss), (next_cost, next_loss) in pairwise(best):
        assert cost < next_cost
        assert loss > next_loss


def test_what_has_no_number_is_left_out():
    assert frontier([1.0, 2.0, math.nan], [math.nan, 3.0, 1.0]) == [1]


def test_lists_of_two_lengths_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        frontier([1.0], [])
