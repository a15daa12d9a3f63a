"""What is asked of a worker, and what it answers; carried out in any process by `carry_out`."""

import importlib
import logging
import pickle
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import isgenerator
from typing import Any, Literal

import torch

from transact_core.base.errors import Cancelled, Progress, TransActError
from transact_core.base.generators import WithResult
from transact_core.experiments import results
from transact_core.experiments.bench import Findings
from transact_core.experiments.cut_spec import BenchSpec
from transact_core.workers.open_models import OpenModels

DONE, CANCELLED, REFUSED, NO_MEMORY, FAILED = (
    "done",
    "cancelled",
    "refused",
    "no memory",
    "failed",
)
NO_MEMORY_WORDS = "There is not enough memory; choose a smaller model or fewer tokens."


@dataclass(frozen=True)
class Task:
    """A function named by its module, and its arguments; all of it can be pickled.

    The function is called with the worker's `OpenModels`, a progress callback and the arguments. It
    may be a generator: what it yields is passed on at once, and what it returns is the result.
    """

    function: str
    """As `transact_core.workers.work:measure`."""
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How a task ended, and what the worker learned of its benches meanwhile."""

    state: Literal["done", "cancelled", "refused", "no memory", "failed"]
    result: Any = None
    words: str = ""
    """Why it was refused, in a sentence, or what it failed with, as `ValueError: …`."""
    learned: dict[BenchSpec, Findings] = field(default_factory=dict)
    """What was measured by benches that were open, also by a task that did not come to its end."""
    closed: frozenset[BenchSpec] = frozenset()
    """Benches that are open no longer, as their model is another one now."""
    notices: tuple[str, ...] = ()
    """Files of results that could not be used."""


class WorkFailed(Exception):
    """A task failed in a way that nobody foresaw; its text is as `ValueError: …`."""


class WorkerDied(Exception):
    """The process that did the work has ended; its text is a sentence that says why."""


Received = Callable[[Any], None]
"""Called with each thing that a task yields."""


def carry_out(task: Task, models: OpenModels, report: Progress, received: Received) -> Outcome:
    """Runs a task in this process; whatever it raises is part of the outcome."""
    known, notices = models.known(), len(results.notices)

    def outcome(state: str, result: Any = None, words: str = "") -> Outcome:
        return Outcome(
            state,
            result,
            words,
            models.learned_beyond(known),
            models.take_closed(),
            tuple(results.notices[notices:]),
        )

    with models.in_use():
        try:
            return outcome(DONE, _run(task, models, report, received))
        except Cancelled:
            return outcome(CANCELLED)
        except TransActError as error:
            return outcome(REFUSED, words=str(error))
        except (MemoryError, torch.OutOfMemoryError):
            return outcome(NO_MEMORY, words=NO_MEMORY_WORDS)
        except BaseException as error:
            # Libraries written in Rust panic with what is no Exception, and some call sys.exit. No
            # task may end the worker, which all later ones need.
            logging.getLogger(__name__).error(
                "The task %s failed\n%s", task.function, traceback.format_exc()
            )
            return outcome(FAILED, words=in_words(error))


def _run(task: Task, models: OpenModels, report: Progress, received: Received) -> Any:
    module, _, name = task.function.partition(":")
    made = getattr(importlib.import_module(module), name)(models, report, *task.arguments)
    if not isgenerator(made):
        return made
    items = WithResult(made)
    for item in items:
        received(item)
    return items.result


def result_of(outcome: Outcome) -> Any:
    """The result of a task that is done.

    Raises:
        Cancelled, TransActError, MemoryError, WorkFailed: as it ended otherwise.
    """
    if outcome.state == DONE:
        return outcome.result
    if outcome.state == CANCELLED:
        raise Cancelled
    if outcome.state == REFUSED:
        raise TransActError(outcome.words)
    if outcome.state == NO_MEMORY:
        raise MemoryError(outcome.words)
    raise WorkFailed(outcome.words)


def in_words(error: BaseException) -> str:
    """An error's class and what it says, also where it fails to say anything."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def packed(message: Any) -> bytes:
    """A message by value. torch's own way for connections would put tensors into shared memory."""
    return pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)


unpacked = pickle.loads


class Inline:
    """A worker without a process of its own: tasks run in the thread that asks for them.

    Whatever passes is packed and unpacked all the same, so that it behaves as a process does.
    """

    def __init__(self) -> None:
        self.models = OpenModels()

    def run(self, task: Task, report: Progress, received: Received) -> Outcome:
        """As `process.WorkerProcess.run`."""
        task = unpacked(packed(task))
        outcome = carry_out(
            task, self.models, report, lambda item: received(unpacked(packed(item)))
        )
        return unpacked(packed(outcome))

    def stop(self) -> None:
        """Nothing runs on its own."""
