"""Jobs that need the dense and a pruned model at once: generation and latency."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import LlamaForCausalLM

from pages.server.jobs import Job, job_threads
from pages.server.open_models import workbench
from pages.server.points import point_of
from pages.server.request import Cut, Request
from pages.server.start_jobs import start
from pages.server.visits import holding, points, visit
from transact_core.base.errors import Progress
from transact_core.experiments.bench import Measurement
from transact_core.forward.generation import (
    Sampling,
    Token,
    end_tokens,
    generate,
    in_turns,
    require_prompt_fits,
)
from transact_core.forward.latency import LatencyPoint, measure_latency, require_lengths_fit
from transact_core.forward.perplexity import token_losses
from transact_core.pruning.plan import PruningPlan

DENSE, PRUNED = "dense", "pruned"


@dataclass(frozen=True)
class TokenLosses:
    """The tokens of one text, and both models' losses in nats on each token after the first."""

    ids: list[int]
    losses: dict[str, torch.Tensor]
    """By model, shape (tokens − 1,)."""
    start: int = 1
    """Index of the first token that is shown."""


@dataclass
class Comparison:
    """One prompt continued by both models. The worker writes it while the page reads it."""

    cut: Cut
    prompt: list[int]
    job: Job | None = None
    tokens: dict[str, list[Token]] = field(default_factory=lambda: {DENSE: [], PRUNED: []})
    continuation: TokenLosses | None = None
    """Of the prompt and the dense model's continuation."""
    text: TokenLosses | None = None
    """Of the user's own text, without a chat template."""


@dataclass
class LatencyRun:
    """Timings of both models. The worker writes them while the page reads them."""

    cut: Cut
    repeats: int
    decode: int
    threads: int
    job: Job | None = None
    plan: PruningPlan | None = None
    """Known once the pruned model is made."""
    points: list[LatencyPoint] = field(default_factory=list)


def last_comparison() -> Comparison | None:
    """The visitor's last comparison with the model and texts in view."""
    return holding().found.get("compare")


def last_latency() -> LatencyRun | None:
    """The visitor's last timings with the model and texts in view."""
    return holding().found.get("latency")


def both_models(
    request: Request, point: Measurement, report: Progress
) -> dict[str, LlamaForCausalLM]:
    """The dense model and the pruned one of a point; for jobs."""
    pruned = workbench().model(request, point, report)
    return {DENSE: workbench().bench(request, report).loaded.model, PRUNED: pruned}


def start_comparison(
    cut: Cut,
    prompt: list[int],
    text: list[int],
    max_new_tokens: int,
    sampling: Sampling,
) -> None:
    """Queues the continuation of a prompt by both models, and then their losses on the texts.

    `prompt` and `text` are token ids, `text` those of the user's text without a chat template.
    """
    request, known = visit().request, points()
    comparison = Comparison(cut, prompt)

    def work(report: Progress) -> None:
        dense = workbench().bench(request, report).loaded.model
        require_prompt_fits(dense, prompt)
        models = both_models(request, point_of(cut, request, known, report), report)
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

    comparison.job = start("Generating side by side", work, ("compare", request))
    holding().found["compare"] = comparison


def _losses(models: dict[str, LlamaForCausalLM], ids: list[int], start: int) -> TokenLosses:
    tensor = torch.tensor(ids, device=models[DENSE].device)
    losses = {name: token_losses(model, tensor) for name, model in models.items()}
    return TokenLosses(ids, losses, start)


def start_latency(cut: Cut, lengths: Sequence[int], decode: int, repeats: int) -> None:
    """Queues the timing of both models; the points of a length are added once it is timed."""
    request, known = visit().request, points()
    run = LatencyRun(cut, repeats, decode, job_threads())

    def work(report: Progress) -> None:
        bench = workbench().bench(request, report)
        require_lengths_fit(bench.loaded.model, lengths, decode)
        point = point_of(cut, request, known, report)
        models, run.plan = both_models(request, point, report), point.plan
        text = bench.evaluation.ids.flatten()
        for timed in measure_latency(models, text, lengths, decode, repeats, report):
            run.points.append(timed)

    run.job = start("Timing both models", work, ("latency", request))
    holding().found["latency"] = run
