"""The models and benches that a worker holds open, and the pruned model that it made last."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from transact_core.base.errors import Progress, TransActError
from transact_core.data.windows import read_texts
from transact_core.experiments.bench import Bench, Findings, carry_out
from transact_core.experiments.cut_spec import BenchSpec, bench_with
from transact_core.experiments.tasks import Standing
from transact_core.experiments.trained_cut import Subject, TrainedCut
from transact_core.models.load import LoadedModel, load_model

MODELS_KEPT = 2
BENCHES_KEPT = 12
"""More than models: without its model a bench is small."""

ModelKey = tuple[str, str, str]


@dataclass
class TaskRun:
    """A run of tasks that goes on piece by piece; it holds no model. See `work.answer`."""

    standings: Iterator[Standing]
    report: Progress
    """Of the piece under way."""
    total: int
    """Questions of all tasks."""
    asked: dict[str, int] = field(default_factory=dict)
    """Of them those answered so far, by task."""


class OpenModels:
    """What stays open between tasks. Models are let go of when others need their room."""

    def __init__(self) -> None:
        self._models: OrderedDict[ModelKey, LoadedModel] = OrderedDict()
        self._benches: OrderedDict[BenchSpec, Bench] = OrderedDict()
        self._in_use: list[set[ModelKey]] = []
        """For each task under way, the innermost last, the models that it has asked for."""
        self._closed: set[BenchSpec] = set()
        self._last_cut: tuple[BenchSpec, tuple, PreTrainedModel] | None = None
        self.task_runs: OrderedDict[str, TaskRun] = OrderedDict()
        """Runs of tasks between two of their pieces, by the names that the server gave them."""

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While a task runs: no model that it asks for makes room for another one."""
        self._in_use.append(set())
        try:
            yield
        finally:
            self._in_use.pop()

    def bench(self, spec: BenchSpec, report: Progress) -> Bench:
        """The bench of a specification with its model at hand; opened where it is not open.

        Raises:
            TransActError: it cannot be opened, or the weights are not those they were.
        """
        bench = self._benches.get(spec)
        if bench is None:
            # Texts are read first: a wrong name is found before a large model is loaded.
            texts = read_texts(spec.windows)
            loaded = self._model(spec, report)
            bench = bench_with(loaded, spec.windows, texts, spec.save_dtype, spec.seed, report)
            self._benches[spec] = bench
            for old in list(self._benches)[: max(0, len(self._benches) - BENCHES_KEPT)]:
                del self._benches[old]
        elif bench.loaded.released:
            loaded = self._model(spec, report)
            if loaded.weight_files != bench.loaded.weight_files:
                del self._benches[spec]
                self._closed.add(spec)
                raise TransActError(
                    f"The weights of {loaded.source} have changed since they were opened; "
                    "try again with the new ones."
                )
            bench.loaded = loaded
        self._note_use(spec)
        return bench

    def load(self, spec: BenchSpec, report: Progress) -> LoadedModel:
        """The model of a specification; loaded where it is not open.

        Raises:
            TransActError: as `load_model` does.
        """
        loaded = self._model(spec, report)
        for asked_for in self._in_use[-1:]:
            asked_for.add(_model_key(spec))
        return loaded

    def adopt(self, spec: BenchSpec, bench: Bench) -> None:
        """Takes over a bench without its model that was opened and measured elsewhere."""
        self._benches[spec] = bench

    def _note_use(self, spec: BenchSpec) -> None:
        key = _model_key(spec)
        if key in self._models:
            self._models.move_to_end(key)
        self._benches.move_to_end(spec)
        for asked_for in self._in_use[-1:]:
            asked_for.add(key)

    def _model(self, spec: BenchSpec, report: Progress) -> LoadedModel:
        key = _model_key(spec)
        if key not in self._models:
            # Room is made first, so that the old and the new model are not held at once.
            needed = set().union(*self._in_use)
            unused = [old for old in self._models if old not in needed]
            for dropped in unused[: max(0, len(self._models) - MODELS_KEPT + 1)]:
                self._forget(dropped)
            self._models[key] = load_model(*key, report, spec.offload)
        return self._models[key]

    def _forget(self, key: ModelKey) -> None:
        """Drops a model; its benches stay, with what was measured on them."""
        del self._models[key]
        for spec, bench in self._benches.items():
            if _model_key(spec) == key:
                bench.release_model()
        if self._last_cut and _model_key(self._last_cut[0]) == key:
            self._last_cut = None

    # --- the last cut ------------------------------------------------------------------------

    def hold(self, spec: BenchSpec, subject: Subject, model: PreTrainedModel) -> None:
        """Keeps a pruned model until the next one, for an export or a comparison."""
        self._last_cut = (spec, subject.identity, model)

    def let_go(self) -> None:
        """Drops the last pruned model, before the next one is made."""
        self._last_cut = None

    def pruned(self, spec: BenchSpec, subject: Subject, report: Progress) -> PreTrainedModel:
        """A pruned model: the last one where it is the same, or a cut made anew, or a trained one
        read from its folder.

        Raises:
            TransActError: as `carry_out` does, or the folder is gone or damaged.
        """
        asked = (spec, subject.identity)
        if self._last_cut is None or self._last_cut[:2] != asked:
            self.let_go()
            self.hold(spec, subject, self._opened(spec, subject, report))
        return self._last_cut[2]

    def _opened(self, spec: BenchSpec, subject: Subject, report: Progress) -> PreTrainedModel:
        if not isinstance(subject, TrainedCut):
            model, _ = carry_out(self.bench(spec, report), subject.plan, subject.recovery, report)
            return model
        if not subject.folder.is_dir():
            raise TransActError("This trained cut was removed; train it again, or choose another.")
        _, device, dtype = _model_key(spec)
        return load_model(str(subject.folder), device, dtype, report, spec.offload).model

    # --- what the other end should know ------------------------------------------------------

    def known(self) -> dict[BenchSpec, Findings]:
        """What each open bench has measured by now."""
        return {spec: bench.findings() for spec, bench in self._benches.items()}

    def learned_beyond(self, known: dict[BenchSpec, Findings]) -> dict[BenchSpec, Findings]:
        """What the benches have measured beyond what was known of them."""
        found = {
            spec: findings.beyond(known[spec]) if spec in known else findings
            for spec, findings in self.known().items()
        }
        return {spec: findings for spec, findings in found.items() if findings}

    def take_closed(self) -> frozenset[BenchSpec]:
        """The benches that were closed since this was called last, as their weights changed."""
        closed, self._closed = frozenset(self._closed), set()
        return closed


def _model_key(spec: BenchSpec) -> ModelKey:
    return spec.model, spec.device, spec.dtype
