"""The Pareto frontier of measured models."""

from collections.abc import Sequence


def frontier(costs: Sequence[float], losses: Sequence[float]) -> list[int]:
    """Indices of the Pareto-optimal pairs of cost and loss, by rising cost and falling loss.

    Another pair dominates one if neither of its values is larger and one is smaller. Of equal
    pairs the first is taken. Pairs with NaN are left out.
    """
    order = sorted(
        (
            index
            for index, (cost, loss) in enumerate(zip(costs, losses, strict=True))
            if cost == cost and loss == loss
        ),
        key=lambda index: (costs[index], losses[index]),
    )
    best: list[int] = []
    for index in order:
        if not best or losses[index] < losses[best[-1]]:
            best.append(index)
    return best
