"""Ratios to measured points."""

import math
from collections.abc import Iterable, Iterator

from transact_core.base.errors import Progress, silent
from transact_core.experiments.bench import Bench, Choices, Measurement
from transact_core.experiments.results import decided, find, find_decision, measured
from transact_core.pruning.closed_form import require_recovery

Pair = tuple[float, float]
"""(mha_ratio, mlp_ratio)."""


def sweep(
    bench: Bench,
    ratios: Iterable[Pair],
    choices: Choices,
    progress: Progress = silent,
) -> Iterator[Measurement]:
    """The point of every pair of ratios: known ones at once, then the most informative first.

    A point is kept as soon as it is measured, so a sweep that was stopped goes on where it was.
    """
    pairs = list(ratios)
    known = known_points(bench, pairs, choices, progress)
    bench.dense(progress)
    yield from known.values()
    missing = [pair for pair in pairs if pair not in known]
    for number, pair in enumerate(most_informative_first(missing), start=len(pairs) - len(missing)):

        def counted(stage: str, done: int, total: int, number: int = number) -> None:
            progress(f"Point {number + 1} of {len(pairs)}: {stage.lower()}", done, total)

        yield point_at(bench, pair, choices, counted)


def known_points(
    bench: Bench, pairs: Iterable[Pair], choices: Choices, progress: Progress = silent
) -> dict[Pair, Measurement]:
    """The points that are kept from earlier, by their pair of ratios."""
    require_recovery(choices.recovery)
    bench.scores(choices.importance, progress)
    found = {pair: find_point(bench, pair, choices) for pair in pairs}
    return {pair: point for pair, point in found.items() if point is not None}


def point_at(
    bench: Bench, pair: Pair, choices: Choices, progress: Progress = silent
) -> Measurement:
    """The point at one pair of ratios, from what is kept as far as that goes."""
    decision = decided(bench, *pair, choices, progress)
    return measured(bench, decision, choices.recovery, progress)


def find_point(bench: Bench, pair: Pair, choices: Choices) -> Measurement | None:
    """The kept point at one pair of ratios, or None."""
    decision = find_decision(bench, *pair, choices)
    return find(bench, decision, choices.recovery) if decision else None


def most_informative_first(pairs: Iterable[Pair]) -> list[Pair]:
    """The largest cut, then by turns the pair furthest from all before it.

    Along a line these are its ends, its middle, the middles of the halves, and so on; over a grid
    its corners and then its inside. Of equals the one asked for first comes first.
    """
    left, ordered = list(pairs), []
    distance = [math.hypot(*pair) for pair in left]
    while left:
        next_one = max(range(len(left)), key=distance.__getitem__)
        pair = left.pop(next_one)
        distance.pop(next_one)
        if not ordered:
            distance = [math.inf] * len(left)
        ordered.append(pair)
        distance = [min(d, math.dist(pair, other)) for d, other in zip(distance, left, strict=True)]
    return ordered
