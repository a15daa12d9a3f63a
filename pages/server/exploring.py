"""Experiments on the dense model, disturbances and single heads, as jobs; what they found."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from pages.server.jobs import Job
from pages.server.open_models import workbench
from pages.server.start_jobs import start
from pages.server.visits import holding, visit
from transact_core.base.errors import Progress
from transact_core.experiments.head_probe import WithoutHead
from transact_core.experiments.premise import Disturbed
from transact_core.workers import work

PATTERNS_KEPT = 8
"""Attention patterns that a visitor holds; the oldest are dropped first."""


@dataclass
class Findings:
    """What one visitor found out on one bench."""

    disturbed: dict[tuple, Disturbed] = field(default_factory=dict)
    """By (windows, disturbance, strength, layer, site)."""
    without: dict[tuple[int, int], WithoutHead] = field(default_factory=dict)
    """By (layer, head)."""
    patterns: dict[tuple[int, str, int], Job] = field(default_factory=dict)
    """Attention of a layer on a sample, by layer, text and number of tokens."""


def findings() -> Findings:
    """What this visitor found out on the bench in view."""
    return holding().found.setdefault("findings", Findings())


def start_strengths(disturbance: str, strengths: list[float], windows: int) -> None:
    """Queues the disturbance of all layers at once; each point is added as it is measured."""
    found, request = findings().disturbed, visit().request

    def disturbing(report: Progress) -> None:
        def keep(point: Disturbed) -> None:
            found[windows, disturbance, point.strength, None, point.site] = point

        workbench().run(
            request, work.disturb_all, report, disturbance, strengths, windows, received=keep
        )

    start("Disturbing all layers", disturbing, ("premise", request))


def start_layers(disturbance: str, strength: float, layers: list[int], windows: int) -> None:
    """Queues the disturbance of one layer at a time; each point is added as it is measured."""
    found, request = findings().disturbed, visit().request

    def disturbing(report: Progress) -> None:
        def keep(point: Disturbed) -> None:
            found[windows, disturbance, strength, point.layer, point.site] = point

        workbench().run(
            request,
            work.disturb_each,
            report,
            disturbance,
            strength,
            layers,
            windows,
            received=keep,
        )

    start("Disturbing layer by layer", disturbing, ("premise", request))


def start_without_heads(heads: list[tuple[int, int]]) -> None:
    """Queues measurements without a head, for each of these pairs (layer index, head index)."""
    found, request = findings().without, visit().request

    def leaving_out(report: Progress) -> Iterator[tuple[int, int]]:
        for done_heads, (layer, head) in enumerate(heads, start=1):

            def report_head(
                stage: str, done: int, total: int, name: str = f"{done_heads} of {len(heads)}"
            ) -> None:
                report(f"Without head {name}", done, total)

            found[layer, head] = workbench().run(
                request, work.leave_out_head, report_head, layer, head
            )
            yield done_heads, len(heads)

    start("Measuring without heads", leaving_out, ("heads", request))


def pattern_job(layer: int, text: str, tokens: int) -> Job:
    """The job that runs a sample up to one layer; its result is that of `work.attend`.

    Where the last such job was cancelled or failed in an unforeseen way, a new one is queued.
    """
    request, patterns = visit().request, findings().patterns
    key = (layer, text, tokens)
    job = patterns.get(key)
    if job is None or (job.finished and job.result is None and not job.refused):
        # A page waits for it, and it takes a few seconds at most.
        job = (
            workbench()
            .lane(request)
            .queue.submit(
                "Running the sample",
                lambda report: workbench().run(request, work.attend, report, text, tokens, layer),
                urgent=True,
            )
        )
        patterns[key] = job
    while len(patterns) > PATTERNS_KEPT:
        patterns.pop(next(iter(patterns)))
    return job
