"""Ratios to measured points."""

from collections.abc import Iterable, Iterator

from transact_core.bench import Bench, Choices, Measurement, compress
from transact_core.decide import decide
from transact_core.errors import Progress, silent
from transact_core.recovery import require_recovery


def sweep(
    bench: Bench,
    ratios: Iterable[tuple[float, float]],
    choices: Choices,
    progress: Progress = silent,
) -> Iterator[Measurement]:
    """Measures pairs of (mha_ratio, mlp_ratio) one after the other."""
    require_recovery(choices.recovery)
    bench.scores(choices.importance, progress)
    bench.dense(progress)
    pairs = list(ratios)
    for number, (mha_ratio, mlp_ratio) in enumerate(pairs, start=1):

        def counted(stage: str, done: int, total: int, number: int = number) -> None:
            progress(f"Point {number} of {len(pairs)}: {stage.lower()}", done, total)

        decision = decide(bench, mha_ratio, mlp_ratio, choices, counted)
        yield compress(bench, decision.plan, choices.recovery, counted)[1]
