"""Downstream tasks of one model, or of two on the same questions: block by block, paired, kept.

Both models answer the same questions, drawn with a seed, so the difference of their scores has a
smaller standard error than either score. Every block of questions that was scored is kept on disk
under all that determines it, so that a run that was stopped, or killed, goes on where it ended, and
more questions cost only those that are new.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from transact_core.base.cache import digest
from transact_core.base.errors import Progress, silent
from transact_core.experiments.bench import Bench, carry_out
from transact_core.experiments.harness import (
    Encoder,
    HarnessTask,
    Item,
    Values,
    harness_version,
)
from transact_core.experiments.results import cut_identity, find_answers, keep_answers
from transact_core.forward.continuations import Answer, Request, score_continuations
from transact_core.models.devices import dtype_name
from transact_core.models.load import LoadedModel
from transact_core.pruning.plan import PruningPlan

BLOCK = 25
"""Questions that are scored, kept and shown at a time: under a minute of a small model on a CPU."""
ERRORS_ABOVE_CHANCE = 2.0
"""Standard errors by which an accuracy must exceed chance for the model to know anything."""
STAGE = "Scoring answers"


# --- who answers -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Contestant:
    """A model that answers questions. Its weights are asked for only where a block is not kept."""

    identity: dict[str, object] = field(repr=False)
    """All that determines its log-likelihoods beside the tokens fed; JSON."""
    config: PreTrainedConfig = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    open: Callable[[Progress], PreTrainedModel] = field(repr=False)


def contestant_of(loaded: LoadedModel) -> Contestant:
    """A loaded model."""
    identity = {
        "weights": sorted(loaded.weight_files.values()),
        "config": loaded.model.config.to_json_string(),
        "device": loaded.hardware,
        "dtype": dtype_name(loaded.dtype),
    }
    return Contestant(identity, loaded.model.config, loaded.tokenizer, lambda _: loaded.model)


def contestant_of_cut(
    bench: Bench, plan: PruningPlan, recovery: str, model: PreTrainedModel | None = None
) -> Contestant:
    """A cut of a bench's model: `model`, or else made when it is first needed."""
    made = [] if model is None else [model]

    def open_cut(progress: Progress) -> PreTrainedModel:
        if not made:
            made.append(carry_out(bench, plan, recovery, progress)[0])
        return made[0]

    loaded = bench.loaded
    identity = cut_identity(bench, plan, recovery)
    return Contestant(identity, loaded.model.config, loaded.tokenizer, open_cut)


# --- what came of it -------------------------------------------------------------------------


@dataclass(frozen=True)
class Answered:
    """What one model answered to one question."""

    answers: tuple[Answer, ...]
    values: Values
    """What the task's metrics make of it."""


@dataclass(frozen=True)
class Figures:
    """Metrics over the questions answered so far, each with its standard error."""

    n: int
    values: dict[str, float]
    errors: dict[str, float]
    """NaN with a single question."""


@dataclass(frozen=True)
class Standing:
    """One task as far as it was run."""

    task: str
    asked: int
    """Questions answered so far, by each model."""
    total: int
    shots: int
    version: str
    """Of the task, as the harness has it."""
    model: Figures
    against: Figures | None = None
    difference: Figures | None = None
    """Model minus against, question by question."""
    chance: float | None = None
    """Accuracy of guessing; None where the answer is written freely."""
    questions: tuple[tuple[Answered, ...], ...] = field(default=(), repr=False)
    """For each model what it answered, question by question."""

    def at_chance(self, figures: Figures) -> bool:
        """Whether an accuracy does not differ from guessing by more than its error allows."""
        if self.chance is None or "acc" not in figures.values:
            return False
        error = figures.errors["acc"]
        margin = 0.0 if math.isnan(error) else ERRORS_ABOVE_CHANCE * error
        return figures.values["acc"] - self.chance <= margin


def aggregate(aggregation: str, values: Sequence[Any]) -> tuple[float, np.ndarray]:
    """A metric over questions, and by how much each question moves it.

    The standard error is the standard deviation of these influences, with n − 1, divided by √n: for
    a mean that of the harness, for a perplexity its first-order approximation, where the harness
    would draw samples again and again. `aggregation` is one of `harness.AGGREGATIONS`; the values
    of `weighted_perplexity` and `bits_per_byte` are pairs of a log-likelihood and a weight.
    """
    table = np.array(values, dtype=np.float64)
    if aggregation == "mean":
        return float(table.mean()), table - table.mean()
    if aggregation == "perplexity":
        mean = table.mean()
        perplexity = _exp(-mean)
        return perplexity, -perplexity * (table - mean)
    likelihoods, weights = table.T
    rate = likelihoods.sum() / weights.sum()
    moved = (likelihoods - rate * weights) / weights.mean()
    if aggregation == "bits_per_byte":
        return float(-rate / math.log(2)), -moved / math.log(2)
    perplexity = _exp(-rate)
    return perplexity, -perplexity * moved


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _error(influences: np.ndarray) -> float:
    if len(influences) < 2:
        return math.nan
    with np.errstate(invalid="ignore"):
        return float(influences.std(ddof=1) / math.sqrt(len(influences)))


def standing(
    task: HarnessTask,
    model: Sequence[Answered],
    against: Sequence[Answered] | None = None,
) -> Standing:
    """What the answers to the first questions of a task come to; both models' answers are paired.

    Metrics that a question does not have are left out.
    """
    asked = len(model)
    sides = [model] if against is None else [model, against]
    aggregated = [
        {
            metric: aggregate(aggregation, [question.values[metric] for question in side])
            for metric, aggregation in task.aggregations.items()
            if all(metric in question.values for question in side)
        }
        for side in sides
    ]
    figures = [
        Figures(
            asked,
            {metric: value for metric, (value, _) in side.items()},
            {metric: _error(influences) for metric, (_, influences) in side.items()},
        )
        for side in aggregated
    ]
    difference = None
    if against is not None:
        one, other = aggregated
        difference = Figures(
            asked,
            {metric: one[metric][0] - other[metric][0] for metric in one},
            {metric: _error(one[metric][1] - other[metric][1]) for metric in one},
        )
    choices = [item.choices for item in task.items[:asked]]
    chance = float(np.mean([1 / count for count in choices])) if all(choices) else None
    return Standing(
        task=task.name,
        asked=asked,
        total=len(task.items),
        shots=task.shots,
        version=task.version,
        model=figures[0],
        against=figures[1] if against is not None else None,
        difference=difference,
        chance=chance,
        questions=tuple(map(tuple, sides)),
    )


# --- the run ---------------------------------------------------------------------------------


def run_tasks(
    tasks: Sequence[HarnessTask],
    model: Contestant,
    against: Contestant | None = None,
    progress: Progress = silent,
) -> Iterator[Standing]:
    """Puts the questions to the model, or to both, and gives a task's standing after each block.

    The tasks take turns, a block of `BLOCK` questions each, so that all of them have figures early
    and whoever stops has about as many questions of each. A block that is kept from an earlier run
    is not scored again. `progress` counts questions, those of both models, and is called before
    each forward pass; what it raises ends the run, and the blocks before it stay kept.

    Raises:
        TransActError: as `score_continuations` does, or what opening a model raises.
    """
    sides = [_Side(model)] if against is None else [_Side(model), _Side(against)]
    total, done = len(sides) * sum(len(task.items) for task in tasks), 0
    answered: list[list[list[Answered]]] = [[[] for _ in sides] for _ in tasks]
    longest = max((len(task.items) for task in tasks), default=0)
    for start in range(0, longest, BLOCK):
        for task, so_far in zip(tasks, answered, strict=True):
            items = task.items[start : start + BLOCK]
            if not items:
                continue
            for side, questions in zip(sides, so_far, strict=True):
                questions += side.answer(task, items, _counting(progress, done, len(items), total))
                done += len(items)
            yield standing(task, *so_far)
    progress(STAGE, total, total)


@dataclass(frozen=True)
class Block:
    """Questions that a model has still to answer, as what is sent to whoever has the model."""

    key: str
    """What the answers are kept under."""
    side: int
    """The place of the contestant that they are put to."""
    groups: list[list[Request]] = field(repr=False)
    max_length: int


def missing_blocks(tasks: Sequence[HarnessTask], *contestants: Contestant) -> Iterator[Block]:
    """The blocks of a run whose answers are not kept, in the order of `run_tasks`."""
    sides = list(map(_Side, contestants))
    longest = max((len(task.items) for task in tasks), default=0)
    for start in range(0, longest, BLOCK):
        for task in tasks:
            for place, side in enumerate(sides):
                if items := task.items[start : start + BLOCK]:
                    block = side.block(task, items, place)
                    if find_answers(block.key) is None:
                        yield block


def count_blocks(tasks: Sequence[HarnessTask], contestants: int) -> int:
    """How many blocks a run of so many contestants has, kept ones among them."""
    return contestants * sum(-(-len(task.items) // BLOCK) for task in tasks)


def answers_to(
    model: PreTrainedModel, block: Block, progress: Progress = silent
) -> list[list[Answer]]:
    """A model's answers to a block.

    Raises:
        TransActError: as `score_continuations` does.
    """
    return score_continuations(model, block.groups, block.max_length, progress, STAGE)


def _counting(progress: Progress, before: int, questions: int, total: int) -> Progress:
    """Progress over a block's requests as progress over all questions."""

    def count(stage: str, done: int, requests: int) -> None:
        if stage == STAGE:
            progress(stage, before + done * questions // max(requests, 1), total)
        else:
            progress(stage, done, requests)

    return count


class _Side:
    """A contestant in a run."""

    def __init__(self, contestant: Contestant) -> None:
        self.contestant = contestant
        self.encoder = Encoder(contestant.config, contestant.tokenizer)

    def answer(
        self, task: HarnessTask, items: Sequence[Item], progress: Progress
    ) -> list[Answered]:
        """The answers to a block of questions, kept or else scored now and kept."""
        progress(STAGE, 0, 1)
        block = self.block(task, items)
        answers = find_answers(block.key)
        if answers is None:
            answers = answers_to(self.contestant.open(progress), block, progress)
            keep_answers(block.key, answers)
        return [
            Answered(tuple(given), task.values(item, given))
            for item, given in zip(items, answers, strict=True)
        ]

    def block(self, task: HarnessTask, items: Sequence[Item], place: int = 0) -> Block:
        """A block of questions as this contestant, which has that place, is asked them."""
        groups = [self.encoder.requests(item) for item in items]
        return Block(self._key(task, items, groups), place, groups, self.encoder.max_length)

    def _key(
        self, task: HarnessTask, items: Sequence[Item], groups: Sequence[Sequence[Request]]
    ) -> str:
        """Of a block's log-likelihoods.

        The token ids depend on the tokenizer, the prompts and all that these were made of. The rest
        is named too, so that nothing is found under another version of it.
        """
        ids = [[[request.context, request.continuation] for request in group] for group in groups]
        return digest(
            {
                "answers": self.contestant.identity,
                "tokens": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
                "max_length": self.encoder.max_length,
                "harness": harness_version(),
                "task": task.identity,
                "items": [item.number for item in items],
            }
        )


# --- tasks.json ------------------------------------------------------------------------------


def tasks_report(
    standings: Mapping[str, Standing], seed: int, limit: int | None
) -> dict[str, object]:
    """What `tasks.json` holds: each task's figures, and what they depend on beside the models."""
    return {
        "tasks": {name: _entry(result) for name, result in standings.items()},
        "seed": seed,
        "limit": limit,
        "versions": {
            "lm_eval": harness_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _entry(result: Standing) -> dict[str, object]:
    entry: dict[str, object] = {"model": _flat(result.model)}
    if result.against is not None and result.difference is not None:
        entry["against"] = _flat(result.against)
        entry["difference"] = _flat(result.difference)
    return {
        **entry,
        "few_shot": result.shots,
        "questions": result.total,
        "chance": result.chance,
        "version": result.version,
    }


def _flat(figures: Figures) -> dict[str, float | int | None]:
    """Values and errors side by side; what is not a number is null."""
    flat: dict[str, float | int | None] = {}
    for metric, value in figures.values.items():
        error = figures.errors[metric]
        flat[metric] = value if math.isfinite(value) else None
        flat[f"{metric}_stderr"] = error if math.isfinite(error) else None
    return {**flat, "n": figures.n}


def tasks_table(standings: Iterable[Standing]) -> str:
    """The figures as lines of text, a line for each metric of each task.

    Differences carry twice their standard error; an accuracy that is at chance is marked.
    """
    lines = [
        f"{'task':22}{'metric':16}{'n':>6}{'chance':>9}{'model':>18}{'against':>18}"
        f"{'difference':>20}"
    ]
    guessing = False
    for result in standings:
        for metric in result.model.values:
            chance = result.chance if metric == "acc" else None
            line = f"{result.task:22}{metric:16}{result.asked:>6}"
            line += f"{'' if chance is None else format(chance, '.3f'):>9}"
            for figures in (result.model, result.against):
                mark = ""
                if figures is not None and chance is not None and result.at_chance(figures):
                    mark, guessing = " *", True
                line += f"{_with_error(figures, metric, 1) + mark:>18}"
            lines.append(line + f"{_with_error(result.difference, metric, 2):>20}")
    if guessing:
        lines.append("* at chance: not above guessing by two standard errors")
    return "\n".join(lines)


def _with_error(figures: Figures | None, metric: str, times: int) -> str:
    if figures is None:
        return ""
    return f"{figures.values[metric]:.3f} ± {times * figures.errors[metric]:.3f}"
