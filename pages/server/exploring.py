"""What a visitor finds out about a model before cutting it, and the jobs that find it out."""

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


@dataclass
class Findings:
    """Of one visitor on one bench."""

    disturbed: dict[tuple, Disturbed] = field(default_factory=dict)
    """By (windows, disturbance, strength, layer, site)."""
    without: dict[tuple[int, int], WithoutHead] = field(default_factory=dict)
    """By (layer, head)."""
    patterns: dict[tuple[int, str], Job] = field(default_factory=dict)
    """Attention of a layer on a sample, by layer and fingerprint."""


def findings() -> Findings:
    """This visitor's own, on the bench in view."""
    return holding().found.setdefault("findings", Findings())


def start_strengths(disturbance: str, strengths: list[float], windows: int) -> None:
    """Queues the disturbance of all layers at once; its points join this visitor's one by one."""
    found, request = findings().disturbed, visit().request

    def work(report: Progress) -> None:
        bench = workbench().bench(request, report)
        for point in disturb_all_layers(bench, disturbance, strengths, windows, report):
            found[windows, disturbance, point.strength, None, point.site] = point

    start("Disturbing all layers", work, ("premise", request))


def start_layers(disturbance: str, strength: float, layers: list[int], windows: int) -> None:
    """Queues the disturbance of one layer after the other."""
    found, request = findings().disturbed, visit().request

    def work(report: Progress) -> None:
        bench = workbench().bench(request, report)
        for point in disturb_layer_by_layer(bench, disturbance, strength, layers, windows, report):
            found[windows, disturbance, strength, point.layer, point.site] = point

    start("Disturbing layer by layer", work, ("premise", request))


def start_without_heads(heads: list[tuple[int, int]]) -> None:
    """Queues the measuring of the model without each of these (layer, head), one at a time."""
    found, request = findings().without, visit().request

    def work(report: Progress) -> Iterator[tuple[int, int]]:
        for number, (layer, head) in enumerate(heads, start=1):

            def told(stage: str, done: int, total: int, name: str = f"{number} of {len(heads)}"):
                report(f"Without head {name}", done, total)

            bench = workbench().bench(request, report)
            found[layer, head] = without_head(bench, layer, head, told)
            del bench
            yield number, len(heads)

    start("Measuring without heads", work, ("heads", request))


def pattern_job(layer: int, windows: Windows) -> Job:
    """The job that reads a sample up to one layer; its result is `heads.attention_pattern`'s.

    A job that was cancelled or failed is given anew.
    """
    request, patterns = visit().request, findings().patterns
    key = (layer, sha256_of_tokens(windows.ids))
    job = patterns.get(key)
    if job is None or (job.finished and job.result is None):

        def work(report: Progress) -> torch.Tensor:
            model = workbench().bench(request, report).loaded.model
            return attention_pattern(model, windows, layer, report)

        # A page waits for it, and it takes a few seconds at most.
        job = workbench().queue.submit("Reading the sample", work, urgent=True)
        patterns[key] = job
    while len(patterns) > PATTERNS_KEPT:
        patterns.pop(next(iter(patterns)))
    return job
