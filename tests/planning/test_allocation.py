"""Widths by one multiplier, against all widths tried one after the other."""

from itertools import product

import numpy as np
import pytest

from transact_core.planning.allocation import (
    CALIBRATION_SHARE,
    EXPONENTS,
    LEAST_LOSS,
    Item,
    allocate,
    cost_of,
    loss_law,
    loss_of,
    together,
    weights_of_kinds,
)


def least_loss(items: list[Item], budget: float) -> float:
    """The slow reference: every combination of widths that fits."""
    return min(
        loss_of(items, places)
        for places in product(*(range(len(item.widths)) for item in items))
        if cost_of(items, places) <= budget
    )


def random_item(generator: np.random.Generator, unit: int, convex: bool) -> Item:
    widths = np.arange(1, 6)
    drops = generator.exponential(generator.lognormal(0, 2), 4)
    drops = np.sort(drops)[::-1] if convex else drops
    losses = np.concatenate([drops[::-1].cumsum()[::-1], [0.0]])
    return Item(widths, widths * unit, losses)


@pytest.mark.parametrize("seed", range(20))
def test_convex_losses_are_allocated_best(seed):
    generator = np.random.default_rng(seed)
    items = [random_item(generator, unit=3, convex=True) for _ in range(4)]
    budget = 3 * int(generator.integers(4, 20))
    found = allocate(items, budget)
    assert cost_of(items, found.places) == budget
    assert loss_of(items, found.places) == pytest.approx(least_loss(items, budget))


@pytest.mark.parametrize("seed", range(20))
def test_other_losses_are_within_the_bound(seed):
    generator = np.random.default_rng(seed)
    items = [random_item(generator, int(generator.integers(1, 8)), convex=False) for _ in range(4)]
    sizes = [cost_of(items, [end] * 4) for end in (0, 4)]
    budget = int(generator.integers(sizes[0], sizes[1]))
    found = allocate(items, budget)
    cost = cost_of(items, found.places)
    assert cost <= budget
    # No single module could have been wider.
    assert all(
        place == 4 or cost - item.costs[place] + item.costs[place + 1] > budget
        for item, place in zip(items, found.places, strict=True)
    )
    by_multiplier = [int(np.argmin(item.losses + found.multiplier * item.costs)) for item in items]
    bound = found.multiplier * (budget - cost_of(items, by_multiplier))
    assert loss_of(items, found.places) <= least_loss(items, budget) + bound + 1e-9


def test_what_costs_less_of_the_loss_gives_more():
    widths = np.arange(1, 11)
    dear, cheap = (Item(widths, widths, price * (10 - widths) ** 2.0) for price in (10.0, 1.0))
    assert allocate([dear, cheap], 12).widths([dear, cheap]) == [9, 3]
    assert allocate([dear, cheap.from_width(5)], 12).widths([dear, cheap.from_width(5)]) == [7, 5]


def test_a_budget_for_all_cuts_nothing_and_one_for_none_is_refused():
    item = Item(np.array([1, 2]), np.array([1, 2]), np.array([1.0, 0.0]))
    assert allocate([item, item], 4).places == (1, 1)
    assert allocate([item, item], 9).multiplier == 0
    with pytest.raises(ValueError, match="over the budget"):
        allocate([item, item], 1)


def test_a_flat_loss_still_spends_the_budget():
    widths = np.arange(1, 6)
    flat = Item(widths, widths, np.zeros(5))
    assert cost_of([flat, flat], allocate([flat, flat], 7).places) == 7


def test_the_law_goes_through_what_was_measured():
    law = loss_law([0.1, 0.4], [0.02, 0.12])
    np.testing.assert_allclose(law.at([0.0, 0.1, 0.4]), [0, 0.02, 0.12])
    assert law.exponent == pytest.approx(np.log(6) / np.log(4))
    assert law.through(0.2, 1.0).at([0.2, 0.8]) == pytest.approx([1.0, 6.0])
    assert loss_law([0.3], [0.06]).at([0.15]) == pytest.approx([0.03])
    assert loss_law([0.1, 0.2], [1e-12, 1e-12]).at([1.0])[0] < 10 * LEAST_LOSS
    assert loss_law([0.1, 0.4], [0.01, 5.0]).exponent == EXPONENTS[1]
    flat = loss_law([0.1, 0.4], [0.1, 0.1])
    assert flat.exponent == EXPONENTS[0]
    # Outside the limits it goes between the two.
    np.testing.assert_allclose(flat.at([0.1, 0.4]), [0.05, 0.2])
    assert loss_law([0.0], [0.0]).at([1.0])[0] == LEAST_LOSS


def test_every_kind_of_text_counts_the_same():
    weights = weights_of_kinds(["own", "other"], "own")
    found = together(np.array([[1.0, 0.3], [3.0, 0.1]]), weights)
    # Shares of 1/4 and 3/4 on the first kind and of 3/4 and 1/4 on the second; sums of 4 and 0.4.
    first, second = weights
    assert first == CALIBRATION_SHARE
    scale = 4 * first + 0.4 * second
    expected = [(first + 3 * second) / 4 * scale, (3 * first + second) / 4 * scale]
    np.testing.assert_allclose(found, expected)
    assert weights_of_kinds(["own"], "own") == [1]
    assert weights_of_kinds(["other", "own", "third"], "own") == pytest.approx([0.2, 0.6, 0.2])
    assert weights_of_kinds(["other", "third"], "own") == pytest.approx([0.5, 0.5])
    assert together(np.array([[-1.0], [2.0]]), np.ones(1)).tolist() == [0.0, 2.0]
