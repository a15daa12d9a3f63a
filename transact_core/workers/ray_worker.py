"""A worker of a Ray cluster: an actor that holds one open model and carries out tasks with it.

What is asked of it and what it answers is that of any worker (`workers.tasks`), pickled by value.
Nothing here imports Ray: the driver (`workers.on_ray`) makes an actor of the class, and a node of
the cluster finds the class in its own installation of this package.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from transact_core import __version__
from transact_core.base.cache import ENGINE_VERSION
from transact_core.base.errors import Progress
from transact_core.base.memory import give_large_blocks_back
from transact_core.data.windows import Texts
from transact_core.experiments.bench import Bench, Choices
from transact_core.experiments.cut_spec import BenchSpec, bench_with
from transact_core.experiments.tasks import Block, answers_to, contestant_of
from transact_core.forward.continuations import Answer
from transact_core.workers import tasks
from transact_core.workers.open_models import OpenModels

Standing = tuple[str, int, int]
"""Stage, done and total, as they were reported last."""


def surroundings() -> dict[str, str]:
    """What of this process' installation and processor determines results: equal everywhere, or
    points measured in different places are not those of one curve."""
    return {
        "transact_core": __version__,
        "engine": str(ENGINE_VERSION),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "instruction set": torch.backends.cpu.get_cpu_capability(),
    }


class RayWorker:
    """The actor. Ray runs `standing` in a thread of its own while `run` works."""

    def __init__(self, threads: int) -> None:
        give_large_blocks_back()
        self._threads = threads
        self._models = OpenModels()
        self._standing: Standing = "", 0, 1

    def surroundings(self) -> dict[str, str]:
        """As the function of that name, on this node."""
        return surroundings()

    def run(self, packed_task: bytes) -> bytes:
        """Carries out a packed task; its packed outcome."""
        # torch has a number of threads for each thread, and Ray may use another one each time.
        torch.set_num_threads(self._threads)
        self._standing = "", 0, 1
        outcome = tasks.carry_out(
            tasks.unpacked(packed_task), self._models, self._report, lambda _: None
        )
        return tasks.packed(outcome)

    def standing(self) -> Standing:
        """Where the task under way stands."""
        return self._standing

    def _report(self, stage: str, done: int, total: int) -> None:
        self._standing = stage, done, total


# --- tasks of these workers alone ------------------------------------------------------------


def load(models: OpenModels, report: Progress, spec: BenchSpec) -> dict[str, str]:
    """Loads the model; gives its fingerprint."""
    return models.load(spec, report).weight_files


def share(
    models: OpenModels,
    report: Progress,
    spec: BenchSpec,
    given: Bench | Texts,
    choices: Choices,
) -> Bench:
    """A bench, without its model, with all that the points of a curve have in common.

    It is opened from these texts, or is one that was opened elsewhere and is completed.
    """
    if isinstance(given, Bench):
        models.adopt(spec, given)
    else:
        windows, save_dtype = spec.windows, spec.save_dtype
        loaded = models.load(spec, report)
        models.adopt(spec, bench_with(loaded, windows, given, save_dtype, spec.seed, report))
    bench = models.bench(spec, report)
    if choices.single_pass:
        bench.prepare(choices, report)
    else:
        bench.require_recovery_of_class(choices.recovery)
        bench.scores(choices.importance, report)
    bench.measure_dense(report)
    return bench.without_model()


def take_over(
    models: OpenModels, report: Progress, spec: BenchSpec, bench: Bench
) -> dict[str, object]:
    """Adopts a bench that another worker opened, with this worker's model; gives its identity."""
    models.adopt(spec, bench)
    return models.bench(spec, report).identity


@dataclass(frozen=True)
class Introduced:
    """What is known of a contestant without its weights."""

    identity: dict[str, object]
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase


def introduce(
    models: OpenModels, report: Progress, specs: Sequence[BenchSpec]
) -> tuple[Introduced, ...]:
    """Loads the models of a run of tasks, and says what they are."""
    contestants = [contestant_of(models.load(spec, report)) for spec in specs]
    return tuple(Introduced(each.identity, each.config, each.tokenizer) for each in contestants)


def answer_block(
    models: OpenModels, report: Progress, spec: BenchSpec, block: Block
) -> list[list[Answer]]:
    """The answers of a model to a block of a task's questions."""
    return answers_to(models.load(spec, report).model, block, report)
