"""Pairs of ratios to measured points, the most informative ones first."""

import math
from collections.abc import Callable, Iterable, Iterator

from transact_core.base.errors import Progress, silent
from transact_core.experiments.bench import Bench, Choices, Measurement
from transact_core.experiments.results import decided, find, find_decision, measured
from transact_core.pruning.closed_form import require_recovery

Pair = tuple[float, float]
"""(mha_ratio, mlp_ratio)."""

MeasureAll = Callable[[Bench, list[Pair], Choices, Progress], Iterator[Measurement]]
"""Yields the points that are missing, in an order of its own."""


def one_by_one(
    bench: Bench, pairs: list[Pair], choices: Choices, progress: Progress = silent
) -> Iterator[Measurement]:
    """Yields the point of each pair, measured here."""
    for position, pair in enumerate(pairs, start=1):

        def counted(stage: str, done: int, total: int, position: int = position) -> None:
            progress(f"Point {position} of {len(pairs)}: {stage.lower()}", done, total)

        yield point_at(bench, pair, choices, counted)


def sweep(
    bench: Bench,
    ratios: Iterable[Pair],
    choices: Choices,
    progress: Progress = silent,
    measure: MeasureAll = one_by_one,
) -> Iterator[Measurement]:
    """Yields the point of every pair of ratios: known ones first, then the most informative.

    Every point is kept on disk as soon as it is measured, so a sweep that was stopped measures only
    what is missing when it is run again.

    Raises:
        TransActError: the recovery or importance is not known, or as `decide` and `compress` do.
    """
    pairs = list(ratios)
    known = known_points(bench, pairs, choices, progress)
    bench.dense(progress)
    yield from known.values()
    missing = most_informative_first(pair for pair in pairs if pair not in known)
    yield from measure(bench, missing, choices, progress)


def known_points(
    bench: Bench, pairs: Iterable[Pair], choices: Choices, progress: Progress = silent
) -> dict[Pair, Measurement]:
    """The points kept on disk from earlier runs, by their pair of ratios."""
    require_recovery(choices.recovery)
    bench.scores(choices.importance, progress)
    found = {pair: find_point(bench, pair, choices) for pair in pairs}
    return {pair: point for pair, point in found.items() if point is not None}


def point_at(
    bench: Bench, pair: Pair, choices: Choices, progress: Progress = silent
) -> Measurement:
    """The point at one pair of ratios: read from disk where it is kept, or else measured."""
    decision = decided(bench, *pair, choices, progress)
    return measured(bench, decision, choices.recovery, progress)


def find_point(bench: Bench, pair: Pair, choices: Choices) -> Measurement | None:
    """The kept point at one pair of ratios, or None."""
    decision = find_decision(bench, *pair, choices)
    return find(bench, decision, choices.recovery) if decision else None


def most_informative_first(pairs: Iterable[Pair]) -> list[Pair]:
    """The pairs in farthest-point order: the largest cut, then always the pair that is farthest,
    in Euclidean distance, from all pairs before it.

    Along a line these are its two ends, its middle, the middles of the halves, and so on; over a
    grid its corners and then its inside. Of equally distant pairs the first one given comes first.
    """
    remaining, ordered = list(pairs), []
    distances = [math.hypot(*pair) for pair in remaining]
    while remaining:
        farthest = max(range(len(remaining)), key=distances.__getitem__)
        pair = remaining.pop(farthest)
        distances.pop(farthest)
        if not ordered:
            distances = [math.inf] * len(remaining)
        ordered.append(pair)
        distances = [
            min(distance, math.dist(pair, other))
            for distance, other in zip(distances, remaining, strict=True)
        ]
    return ordered
