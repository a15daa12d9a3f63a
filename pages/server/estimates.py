"""How long jobs will take, before they are started: from points measured here, or from FLOPs."""

from collections.abc import Sequence

import numpy as np

from pages.server.open_models import workbench
from pages.server.request import Cut, Request, first_look
from pages.server.visits import points
from transact_core.experiments.allocate import (
    KINDS_OF_TEXT,
    TRIALS,
    WINDOW_TOKENS,
    WINDOWS_A_KIND,
    fitted_on,
)
from transact_core.experiments.bench import Bench, Choices
from transact_core.experiments.sweep import Pair
from transact_core.planning.damage import NARROW_RATIOS
from transact_core.planning.duration import Feed, cut_flops, pricing_flops, trial_flops
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
    looked_at = first_look(choices)
    repairs = sum(_cut_flops(bench, pair, looked_at) for pair in ratios)
    allocating = 0.0
    if choices.widths in ("allocated", "traded"):
        allocating = allocating_seconds(bench, request, ratios, choices)
        allocating += pricing_seconds(bench, request, choices) or 0.0
    times = choices.steps
    times *= AUTO_TIMES if choices.granularity == "auto" else 1
    times *= SEQUENTIAL_TIMES if choices.sequential else 1
    return times * repairs / pace + allocating


def allocating_seconds(
    bench: Bench, request: Request, ratios: Sequence[Pair], choices: Choices
) -> float | None:
    """Of the trial cuts by which widths are chosen; None while nothing is timed."""
    pace = workbench().pace(request)
    if pace is None:
        return None
    return sum(_trials_flops(bench, pair, first_look(choices)) for pair in ratios) / pace


def pricing_seconds(bench: Bench, request: Request, choices: Choices) -> float | None:
    """Of measuring what the cuts of single layers lose, and the errors of all widths where they are
    not known; None while nothing is timed."""
    pace = workbench().pace(request)
    if pace is None or workbench().prices(request, choices) is not None:
        return None if pace is None else 0.0
    errors = (
        0.0
        if bench.damage_known(first_look(choices))
        else learning_seconds(bench, request, first_look(choices))
    )
    flops = pricing_flops(
        bench.loaded.architecture, choices.recovery, _fitted_on(bench), _held_out(bench)
    )
    return (errors or 0.0) + flops / pace


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


def _fitted_on(bench: Bench) -> Feed:
    """What repairs are fitted on where widths are allocated."""
    windows = fitted_on(bench.calibration)
    return Feed(windows.tokens, windows.sequence_length)


def _held_out(bench: Bench) -> Feed:
    """The held-out windows that widths are allocated by, where each text has enough."""
    length = min(WINDOW_TOKENS, bench.calibration.sequence_length)
    return Feed(KINDS_OF_TEXT * WINDOWS_A_KIND * length, length)


def _trials_flops(bench: Bench, ratios: Pair, choices: Choices) -> float:
    shape = bench.loaded.architecture
    cut = widths(shape, *ratios, choices.granularity, choices.multiple_of).applied_to(shape)
    return TRIALS * trial_flops(shape, cut, choices.recovery, _fitted_on(bench), _held_out(bench))


def _cut_flops(bench: Bench, ratios: Pair, choices: Choices) -> float:
    shape = bench.loaded.architecture
    cut = widths(shape, *ratios, choices.granularity, choices.multiple_of).applied_to(shape)
    calibration, evaluation = (
        Feed(windows.tokens, windows.sequence_length)
        for windows in (bench.calibration, bench.evaluation)
    )
    return cut_flops(shape, cut, choices.recovery, calibration, evaluation)
