"""How long jobs will take, before they are started: from points measured here, or from FLOPs."""

from collections.abc import Sequence

import numpy as np

from pages.server.open_models import workbench
from pages.server.request import Cut, Request, first_look
from pages.server.visits import points
from transact_core.experiments.bench import Bench, Choices
from transact_core.experiments.sweep import Pair
from transact_core.planning.damage import NARROW_RATIOS
from transact_core.planning.duration import Feed, cut_flops
from transact_core.pruning.plan import widths

AUTO_TIMES = 3
"""Times the work of one cut that `auto` takes: it tries each granularity."""
SEQUENTIAL_TIMES = 3
"""And a sequential choice of units, which scores each module on a stream of its own."""


def cuts_seconds(
    bench: Bench, request: Request, ratios: Sequence[Pair], choices: Choices
) -> float | None:
    """Of cutting, repairing and measuring at each pair of ratios; None while nothing is timed.

    From this visitor's points with the same choices where there are any, whose mean it is, and
    otherwise from FLOPs at the pace at which the dense model was measured.
    """
    if choices.single_pass:
        alike = [
            point.seconds
            for point in points()
            if (point.plan.granularity, point.recovery) == (choices.granularity, choices.recovery)
            and Cut.of(point).choices.single_pass
        ]
        if alike:
            return len(ratios) * float(np.mean(alike))
    pace = workbench().pace(request)
    if pace is None:
        return None
    times = choices.steps
    times *= AUTO_TIMES if choices.granularity == "auto" else 1
    times *= SEQUENTIAL_TIMES if choices.sequential else 1
    looked_at = first_look(choices)
    return times * sum(_cut_flops(bench, pair, looked_at) for pair in ratios) / pace


def learning_seconds(bench: Bench, request: Request, choices: Choices) -> float | None:
    """Of measuring what each layer loses at every width; None while nothing is timed."""
    seconds, pace = workbench().damage_seconds(request, bench), workbench().pace(request)
    if seconds is None or pace is None or choices.granularity != "head-dims":
        return seconds
    tried = [_cut_flops(bench, (ratio, 0.0), first_look(choices)) for ratio in NARROW_RATIOS]
    return seconds + sum(tried) / pace


def pace_in_words(request: Request) -> str:
    """What an estimate is worked out from."""
    pace = workbench().pace(request)
    if pace is None:
        return "Not estimated: the dense model has not been timed yet."
    return (
        f"Estimated from the work's FLOPs at the {pace / 1e9:,.0f} GFLOP/s at which this machine "
        "ran the dense model; an order of magnitude: seconds, minutes or hours."
    )


def _cut_flops(bench: Bench, ratios: Pair, choices: Choices) -> float:
    shape = bench.loaded.architecture
    cut = widths(shape, *ratios, choices.granularity, choices.multiple_of).applied_to(shape)
    calibration, evaluation = (
        Feed(windows.tokens, windows.sequence_length)
        for windows in (bench.calibration, bench.evaluation)
    )
    return cut_flops(shape, cut, choices.recovery, calibration, evaluation)
