"""Measured points of a visitor: found, added, looked up on disk or measured."""

from collections.abc import Iterable
from dataclasses import replace

from pages.server.open_models import workbench
from pages.server.request import Cut, Request, first_look
from pages.server.visits import points
from transact_core.base.errors import Progress
from transact_core.experiments.allocate import plan_by_hand
from transact_core.experiments.bench import Bench, Choices, Measurement, identity
from transact_core.experiments.results import find_decision
from transact_core.experiments.sweep import Pair
from transact_core.experiments.sweep import find_point as find_kept_point
from transact_core.experiments.trained_cut import Subject, TrainedCut
from transact_core.pruning.plan import Decision, PruningPlan
from transact_core.workers import work

POINTS_KEPT = 300
"""Of one visitor with one request."""


def find_point(plan: PruningPlan, recovery: str) -> Measurement | None:
    """A point of this visitor with the same cut."""
    wanted = identity(plan, recovery)
    return next((point for point in points() if point.identity == wanted), None)


def asked_by(cut: Cut, known: Iterable[Measurement]) -> Measurement | None:
    """The point, among those known, that was asked for by these very controls."""
    return next((point for point in known if Cut.of(point) == cut), None)


def add_point(known: list[Measurement], point: Measurement) -> None:
    """A point joins others; it takes the place of one with the same cut."""
    others = [other for other in known if other.identity != point.identity]
    known[:] = [*others, point][-POINTS_KEPT:]
    workbench().make_room()


def find_cut(bench: Bench, cut: Cut) -> Decision | None:
    """How a cut was or would be decided; None where that takes trying, and it was not tried."""
    own = asked_by(cut, points())
    return own.decision if own else find_decision(bench, *cut.ratios, cut.choices)


def plan_at(bench: Bench, cut: Cut, decision: Decision | None) -> PruningPlan:
    """The plan of a cut as it was decided, or a first look at one that is not decided yet."""
    if decision:
        return decision.plan
    look = first_look(cut.choices)
    if cut.by_hand:
        return plan_by_hand(bench, replace(look, widths=cut.widths, by_hand=cut.by_hand))
    return bench.plan(*cut.ratios, look)


def kept_at_hand(bench: Bench, ratios: Pair, choices: Choices) -> Measurement | None:
    """The point on disk, where it can be looked up without measuring anything."""
    prepared = bench.prepared(first_look(choices))
    return find_kept_point(bench, ratios, choices) if prepared else None


def point_of(cut: Cut, request: Request, known: list[Measurement], report: Progress) -> Measurement:
    """The point of a cut among those known, or measured now and added to them; for jobs."""
    point = asked_by(cut, known) or measure(cut, request, report)
    add_point(known, point)
    return point


def subject_of(
    cut: Cut,
    trained: TrainedCut | None,
    request: Request,
    known: list[Measurement],
    report: Progress,
) -> Subject:
    """The trained cut where one is named, or else the point of the cut, as `point_of` gives it."""
    return trained or point_of(cut, request, known, report)


def measure(cut: Cut, request: Request, report: Progress) -> Measurement:
    """The point of a cut; for jobs."""
    return workbench().run(request, work.cut, report, cut.ratios, cut.choices)
