"""Which of several measured models no other beats."""

from collections.abc import Sequence


def frontier(costs: Sequence[float], losses: Sequence[float]) -> list[int]:
    """Indices of the Pareto-optimal pairs of cost and loss, by rising cost and falling loss.

    A pair is beaten by another that is nowhere larger and somewhere smaller; of equal pairs the
    first stands for all. Pairs with NaN are left out.
    """
    order = sorted(
        (
            number
            for number, (cost, loss) in enumerate(zip(costs, losses, strict=True))
            if cost == cost and loss == loss
        ),
        key=lambda number: (costs[number], losses[number]),
    )
    best: list[int] = []
    for number in order:
        if not best or losses[number] < losses[best[-1]]:
            best.append(number)
    return best
