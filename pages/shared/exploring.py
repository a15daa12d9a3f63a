"""What a visitor finds out about a model before cutting it, and the jobs that find it out."""

from dataclasses import dataclass, field

import streamlit as st
import torch

from pages.shared.jobs import Job
from pages.shared.workbench import Request, visit, workbench
from transact_core.bench import Bench
from transact_core.corpora import Windows
from transact_core.errors import Progress
from transact_core.heads import WithoutHead, attention_pattern, without_head
from transact_core.premise import Disturbed, disturb_all_layers, disturb_layer_by_layer
from transact_core.store import sha256_of_tokens

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
    """This session's own, on the bench in view."""
    every: dict[Request, Findings] = st.session_state.setdefault("findings", {})
    return every.setdefault(visit().request, Findings())


def start_strengths(bench: Bench, disturbance: str, strengths: list[float], windows: int) -> None:
    """Queues the disturbance of all layers at once; its points join this session's one by one."""
    found = findings().disturbed

    def work(report: Progress) -> None:
        for point in disturb_all_layers(bench, disturbance, strengths, windows, report):
            found[windows, disturbance, point.strength, None, point.site] = point

    visit().job = workbench().queue.submit("Disturbing all layers", work)


def start_layers(
    bench: Bench, disturbance: str, strength: float, layers: list[int], windows: int
) -> None:
    """Queues the disturbance of one layer after the other."""
    found = findings().disturbed

    def work(report: Progress) -> None:
        for point in disturb_layer_by_layer(bench, disturbance, strength, layers, windows, report):
            found[windows, disturbance, strength, point.layer, point.site] = point

    visit().job = workbench().queue.submit("Disturbing layer by layer", work)


def start_without_heads(bench: Bench, heads: list[tuple[int, int]]) -> None:
    """Queues the measuring of the model without each of these (layer, head), one at a time."""
    found = findings().without

    def work(report: Progress) -> None:
        for number, (layer, head) in enumerate(heads, start=1):

            def told(stage: str, done: int, total: int, name: str = f"{number} of {len(heads)}"):
                report(f"Without head {name}", done, total)

            found[layer, head] = without_head(bench, layer, head, told)

    visit().job = workbench().queue.submit("Measuring without heads", work)


def pattern_job(bench: Bench, layer: int, windows: Windows) -> Job:
    """The job that reads a sample up to one layer; its result is `heads.attention_pattern`'s.

    A job that was cancelled or failed is given anew.
    """
    patterns, key = findings().patterns, (layer, sha256_of_tokens(windows.ids))
    job = patterns.get(key)
    if job is None or (job.finished and job.result is None):

        def work(report: Progress) -> torch.Tensor:
            return attention_pattern(bench.loaded.model, windows, layer, report)

        job = patterns[key] = workbench().queue.submit("Reading the sample", work)
    while len(patterns) > PATTERNS_KEPT:
        patterns.pop(next(iter(patterns)))
    return job
