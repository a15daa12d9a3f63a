"""Experiments on the dense model, disturbances and single heads, as jobs; what they found."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from pages.server.jobs import Job
from pages.server.open_models import workbench
from pages.server.start_jobs import start
from pages.server.visits import holding, visit
from transact_core.base.cache import sha256_of_tokens
from transact_core.base.errors import Progress
from transact_core.data.windows import Windows
from transact_core.experiments.head_probe import WithoutHead, attention_pattern, without_head
from transact_core.experiments.premise import Disturbed, disturb_all_layers, disturb_layer_by_layer

PATTERNS_KEPT = 8
"""Attention patterns that a visitor holds; the oldest are dropped first."""


@dataclass
class Findings:
    """What one visitor found out on one bench."""

    disturbed: dict[tuple, Disturbed] = field(default_factory=dict)
    """By (windows, disturbance, strength, layer, site)."""
    without: dict[tuple[int, int], WithoutHead] = field(default_factory=dict)
    """By (layer, head)."""
    patterns: dict[tuple[int, str], Job] = field(default_factory=dict)
    """Attention of a layer on a sample, by layer and fingerprint."""


def findings() -> Findings:
    """What this visitor found out on the bench in view."""
    return holding().found.setdefault("findings", Findings())


def start_strengths(disturbance: str, strengths: list[float], windows: int) -> None:
    """Queues the disturbance of all layers at once; each point is added as it is measured."""
    found, request = findings().disturbed, visit().request

    def work(report: Progress) -> None:
        bench = workbench().bench(request, report)
        for point in disturb_all_layers(bench, disturbance, strengths, windows, report):
            found[windows, disturbance, point.strength, None, point.site] = point

    start("Disturbing all layers", work, ("premise", request))


def start_layers(disturbance: str, strength: float, layers: list[int], windows: int) -> None:
    """Queues the disturbance of one layer at a time; each point is added as it is measured."""
    found, request = findings().disturbed, visit().request

    def work(report: Progress) -> None:
        bench = workbench().bench(request, report)
        for point in disturb_layer_by_layer(bench, disturbance, strength, layers, windows, report):
            found[windows, disturbance, strength, point.layer, point.site] = point

    start("Disturbing layer by layer", work, ("premise", request))


def start_without_heads(heads: list[tuple[int, int]]) -> None:
    """Queues measurements without a head, for each of these pairs (layer index, head index)."""
    found, request = findings().without, visit().request

    def work(report: Progress) -> Iterator[tuple[int, int]]:
        for done_heads, (layer, head) in enumerate(heads, start=1):

            def report_head(
                stage: str, done: int, total: int, name: str = f"{done_heads} of {len(heads)}"
            ) -> None:
                report(f"Without head {name}", done, total)

            bench = workbench().bench(request, report)
            found[layer, head] = without_head(bench, layer, head, report_head)
            del bench
            yield done_heads, len(heads)

    start("Measuring without heads", work, ("heads", request))


def pattern_job(layer: int, windows: Windows) -> Job:
    """The job that runs a sample up to one layer; its result is that of `attention_pattern`.

    Where the last such job was cancelled or failed, a new one is queued.
    """
    request, patterns = visit().request, findings().patterns
    key = (layer, sha256_of_tokens(windows.ids))
    job = patterns.get(key)
    if job is None or (job.finished and job.result is None):

        def work(report: Progress) -> torch.Tensor:
            model = workbench().bench(request, report).loaded.model
            return attention_pattern(model, windows, layer, report)

        # A page waits for it, and it takes a few seconds at most.
        job = workbench().queue.submit("Running the sample", work, urgent=True)
        patterns[key] = job
    while len(patterns) > PATTERNS_KEPT:
        patterns.pop(next(iter(patterns)))
    return job
