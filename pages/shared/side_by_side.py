"""Jobs that need the dense and a pruned model at once: generation and latency."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import LlamaForCausalLM

from pages.shared.jobs import Job, job_threads
from pages.shared.workbench import Cut, Request, find_point, points, visit, workbench
from transact_core.bench import Bench
from transact_core.errors import Progress
from transact_core.evaluation import token_losses
from transact_core.generation import (
    Sampling,
    Token,
    end_tokens,
    generate,
    in_turns,
    require_prompt_fits,
)
from transact_core.latency import LatencyPoint, measure_latency, require_lengths_fit
from transact_core.plan import PruningPlan

DENSE, PRUNED = "dense", "pruned"


@dataclass(frozen=True)
class TokenLosses:
    """One text's tokens and what both models lose on each after the first, in nats."""

    ids: list[int]
    losses: dict[str, torch.Tensor]
    """By model, shape (tokens − 1,)."""
    start: int = 1
    """The first token that is shown."""


@dataclass
class Comparison:
    """One prompt continued by both models; the worker writes, the page reads."""

    request: Request
    cut: Cut
    prompt: list[int]
    job: Job | None = None
    tokens: dict[str, list[Token]] = field(default_factory=lambda: {DENSE: [], PRUNED: []})
    continuation: TokenLosses | None = None
    """On the prompt and what the dense model made of it."""
    text: TokenLosses | None = None
    """On the user's own text, without a chat template."""


@dataclass
class LatencyRun:
    """Both models timed; the worker writes, the page reads."""

    request: Request
    cut: Cut
    plan: PruningPlan
    repeats: int
    decode: int
    threads: int
    job: Job | None = None
    points: list[LatencyPoint] = field(default_factory=list)


def last_comparison() -> Comparison | None:
    """The visitor's last one with the model and texts in view."""
    mine = visit()
    last = mine.comparison
    return last if last is not None and last.request == mine.request else None


def last_latency() -> LatencyRun | None:
    """The visitor's last one with the model and texts in view."""
    mine = visit()
    last = mine.latency
    return last if last is not None and last.request == mine.request else None


def both_models(bench: Bench, cut: Cut) -> Callable[[Progress], dict[str, LlamaForCausalLM]]:
    """Work that gives the dense and the pruned model, cut and measured where none is at hand."""
    request, mine_points = visit().request, points()
    plan = bench.plan(cut.mha_ratio, cut.mlp_ratio, cut.choices)
    point = find_point(plan, cut.recovery)

    def make(report: Progress) -> dict[str, LlamaForCausalLM]:
        pruned, measurement = workbench().cut(request, bench, plan, cut.recovery, report, point)
        if point is None:
            mine_points.append(measurement)
        return {DENSE: bench.loaded.model, PRUNED: pruned}

    return make


def start_comparison(
    bench: Bench,
    cut: Cut,
    prompt: list[int],
    text: list[int],
    max_new_tokens: int,
    sampling: Sampling,
) -> None:
    """Queues the continuation of a prompt by both models, then the losses on the texts."""
    mine = visit()
    make = both_models(bench, cut)
    comparison = Comparison(mine.request, cut, prompt)

    def work(report: Progress) -> None:
        dense = bench.loaded.model
        require_prompt_fits(dense, prompt)
        models = make(report)
        streams = {
            name: generate(model, prompt, max_new_tokens, sampling, end_tokens(dense))
            for name, model in models.items()
        }
        report("Generating", 0, max_new_tokens)
        for name, token in in_turns(streams):
            comparison.tokens[name].append(token)
            report("Generating", max(map(len, comparison.tokens.values())), max_new_tokens)
        report("Scoring the texts", 0, 1)
        made = prompt + [token.id for token in comparison.tokens[DENSE]]
        comparison.continuation = _losses(models, made, len(prompt))
        if len(text) > 1:
            comparison.text = _losses(models, text, 1)

    mine.job = comparison.job = workbench().queue.submit("Generating side by side", work)
    mine.comparison = comparison


def _losses(models: dict[str, LlamaForCausalLM], ids: list[int], start: int) -> TokenLosses:
    tensor = torch.tensor(ids, device=models[DENSE].device)
    losses = {name: token_losses(model, tensor) for name, model in models.items()}
    return TokenLosses(ids, losses, start)


def start_latency(
    bench: Bench, cut: Cut, lengths: Sequence[int], decode: int, repeats: int
) -> None:
    """Queues the timing of both models; each length's points join the run as they are measured."""
    mine = visit()
    make = both_models(bench, cut)
    plan = bench.plan(cut.mha_ratio, cut.mlp_ratio, cut.choices)
    run = LatencyRun(mine.request, cut, plan, repeats, decode, job_threads())

    def work(report: Progress) -> None:
        require_lengths_fit(bench.loaded.model, lengths, decode)
        models = make(report)
        text = bench.evaluation.ids.flatten()
        for point in measure_latency(models, text, lengths, decode, repeats, report):
            run.points.append(point)

    mine.job = run.job = workbench().queue.submit("Timing both models", work)
    mine.latency = run
