"""Trainings of cuts as jobs, kept on disk: found again after a reload, and after a restart.

Each visitor's are in a folder of the cache, one for each cut, which holds the cut as a checkpoint
and a folder for each training: what was chosen, where it stands while it is not done
(`export.tune.work_folder`), and the trained checkpoint.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pages.server.jobs import Job
from pages.server.open_models import workbench
from pages.server.points import add_point, asked_by, kept_at_hand, point_of
from pages.server.request import Cut, Request
from pages.server.settings import require_readable_text, require_writable, settings
from pages.server.start_jobs import start
from pages.server.visits import holding, points, visit
from transact_core.base.cache import mark_used
from transact_core.base.errors import Cancelled, Progress, TransActError
from transact_core.base.files import (
    cache_folder,
    read_text,
    remove_whole,
    require_disk_space,
    require_free_output,
    staged_file,
    staged_folder,
)
from transact_core.data.corpus import mixed_sources
from transact_core.experiments.bench import Bench, Measurement
from transact_core.experiments.trained_cut import TrainedCut
from transact_core.export.compression import Training
from transact_core.export.task_table import record_tasks
from transact_core.export.tune import (
    TextFigures,
    TuneSpec,
    read_trained,
    read_trained_cut,
    work_folder,
)
from transact_core.models.devices import free_memory
from transact_core.training.loop import (
    Curve,
    Pace,
    Settings,
    Standing,
    Trained,
    windows_at_once,
)
from transact_core.training.memory import models_bytes, training_bytes
from transact_core.training.objective import LossName
from transact_core.training.state import Work
from transact_core.training.student import Method
from transact_core.training.teacher_cache import TOP, WRITING, Shape, folder_in_cache
from transact_core.workers import work

TURN_SECONDS = 600.0
"""How long a training goes on while others wait; taking it up again costs the loading of models."""
WATCHED_TOKENS = 2048
"""Of each held-out text: each look costs a pass over them."""
WATCHED_TEXTS = 3
"""Held-out texts, about, for an estimate: how many there are is known once models are loaded."""
KEPT = "training.json"


@dataclass(frozen=True)
class TrainingChoice:
    """What the controls of the page *Recover* say."""

    text: str
    """A source; a mix with `+` between its parts."""
    held_out: tuple[str, ...] = ()
    """Sources to be watched; none for another kind of text, which is chosen by itself."""
    tokens: int | None = None
    minutes: float | None = None
    """The budget, in one of these."""
    method: Method = "full"
    loss: LossName = "kl"
    learning_rate: float | None = None
    """None for that of the method."""
    seed: int = 0
    held_out_tokens: int = WATCHED_TOKENS
    written_down: bool = False
    """Whether what the dense model says is written down once, and read from there."""

    def settings(self, tokens: int | None = None) -> Settings:
        """The same for the training loop; `tokens` where the budget is a time."""
        return Settings(
            method=self.method,
            loss=self.loss,
            tokens=self.tokens or tokens or Settings.tokens,
            learning_rate=self.learning_rate,
            seed=self.seed,
        )

    @property
    def watched(self) -> int:
        """Tokens of all held-out texts, about."""
        named = len(mixed_sources(self.text)) + len(self.held_out)
        return self.held_out_tokens * max(named, WATCHED_TEXTS)


@dataclass
class TrainingRun:
    """A training and what it has shown. A job writes it while pages read it."""

    request: Request
    cut: Cut
    choice: TrainingChoice
    folder: Path
    tokens: int | None
    """To be trained on; None until a budget of time is known in tokens."""
    began: float
    """When it was first started, in seconds of Unix time."""
    pace: Pace | None = None
    job: Job | None = None
    ending: bool = False
    """Whether it is to train no further and to write the best."""
    curve: Curve = field(default_factory=Curve)
    seconds_left: float | None = None
    notices: list[str] = field(default_factory=list)

    @property
    def cut_folder(self) -> Path:
        return self.folder.parent / "cut"

    @property
    def trained_folder(self) -> Path:
        return self.folder / "trained"

    @property
    def work(self) -> Work:
        return Work(work_folder(self.trained_folder))

    @property
    def under_way(self) -> bool:
        return self.job is not None and not self.job.finished

    @property
    def done(self) -> bool:
        return self.trained_folder.is_dir()

    @property
    def step(self) -> int:
        return len(self.curve.losses)

    @property
    def tokens_a_step(self) -> int:
        return Settings.windows_per_step * self.request.sequence_length

    @property
    def steps(self) -> int | None:
        """None until they are known."""
        if self.tokens is None:
            return None
        return self.choice.settings(self.tokens).steps(self.request.sequence_length)

    @cached_property
    def outcome(self) -> tuple[Training, Trained, list[TextFigures]]:
        """What came of it; to be asked once it is done.

        Raises:
            TransActError: its folder is damaged.
        """
        return read_trained(self.trained_folder)

    @cached_property
    def trained_cut(self) -> TrainedCut | None:
        """What the cut became, to be asked once it is done; None where nothing got better, so that
        the weights are those of the cut, and where its folder is damaged."""
        try:
            return read_trained_cut(self.trained_folder) if self.outcome[1].improved else None
        except TransActError:
            return None

    def spec(self, finish: bool = False) -> TuneSpec:
        return TuneSpec(
            model=str(self.cut_folder),
            output=self.trained_folder,
            text=self.choice.text,
            held_out=self.choice.held_out,
            held_out_tokens=max(self.choice.held_out_tokens, self.request.sequence_length),
            sequence_length=self.request.sequence_length,
            settings=self.choice.settings(self.tokens),
            resume=self.work.begun,
            finish=finish and self.work.begun,
            teacher_cache=folder_in_cache() if self.choice.written_down else None,
        )

    def take(self, told: Standing | str) -> None:
        """Takes in what the worker tells."""
        if isinstance(told, str):
            if told not in self.notices:
                self.notices.append(told)
            return
        curve = self.curve
        # First of all: what is drawn of a look needs them.
        curve.dense_nll = told.dense_nll
        if told.step == len(curve.losses) + 1:
            curve.losses.append(told.loss)
        if told.evaluated is not None:
            curve.evaluated.append(told.evaluated)
        self.seconds_left = told.seconds_left
        self.pace = told.pace or self.pace

    def recall(self) -> None:
        """Takes over what is on disk: a training that was interrupted goes on from there."""
        kept = Curve()
        with suppress(TransActError):
            if self.done:
                kept = self.outcome[1].curve
            elif self.work.begun:
                kept = Curve.from_json(self.work.standing()["curve"])
        self.curve, self.seconds_left = kept, None

    def keep(self) -> None:
        """Writes down what was chosen and what is known of its pace."""
        kept = {
            "request": asdict(self.request),
            "cut": asdict(self.cut),
            "choice": asdict(self.choice),
            "tokens": self.tokens,
            "began": self.began,
            "pace": self.pace and asdict(self.pace),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        with staged_file(self.folder / KEPT) as staging:
            staging.write_text(json.dumps(kept, indent=1) + "\n")
        mark_used(self.folder.parent)


# --- which there are -------------------------------------------------------------------------


def trainings() -> list[TrainingRun]:
    """This visitor's trainings with the model and texts in view, the latest first."""
    return sorted(_runs().values(), key=lambda run: run.began, reverse=True)


def trained_cuts() -> list[tuple[TrainingRun, TrainedCut]]:
    """Those of them that are done and have weights of their own, with these."""
    done = [run for run in trainings() if run.done and not run.under_way]
    return [(run, run.trained_cut) for run in done if run.trained_cut is not None]


def _runs() -> dict[Path, TrainingRun]:
    """By folder; read from disk at first."""
    found = holding().found
    if "trainings" not in found:
        request = visit().request
        found["trainings"] = {run.folder: run for run in _kept() if run.request == request}
        for run in found["trainings"].values():
            run.recall()
            mark_used(run.folder.parent)
    return found["trainings"]


def _own_folder() -> Path:
    return cache_folder() / "trainings" / visit().visitor.key


def _kept() -> Iterator[TrainingRun]:
    """This visitor's trainings on disk, with any model and texts."""
    return filter(None, map(_read, _own_folder().glob(f"*/*/{KEPT}")))


def _read(path: Path) -> TrainingRun | None:
    """What `keep` wrote; None where it is damaged or of another version of the app."""
    try:
        kept = json.loads(read_text(path))
        request, choice = kept["request"], kept["choice"]
        return TrainingRun(
            Request(**{**request, "others": tuple(request["others"])}),
            Cut.from_json(kept["cut"]),
            TrainingChoice(**{**choice, "held_out": tuple(choice["held_out"])}),
            path.parent,
            kept["tokens"],
            kept["began"],
            kept["pace"] and Pace(**kept["pace"]),
        )
    except (OSError, ValueError, TypeError, KeyError):
        return None


def elsewhere() -> list[str]:
    """The models of this visitor's trainings with another model or other texts than in view."""
    return sorted({run.request.model for run in _kept() if run.request != visit().request})


def recall_cuts(bench: Bench) -> None:
    """The cuts that were trained join this visitor's points, as far as they are kept."""
    for cut in {run.cut for run in trainings()}:
        if asked_by(cut, points()) is None:
            known = kept_at_hand(bench, cut.ratios, cut.choices)
            if known is not None:
                add_point(points(), known)


def pace_of(choice: TrainingChoice) -> Pace | None:
    """What this visitor's last training alike took here; None where there was none."""
    alike = (
        run.pace
        for run in trainings()
        if run.pace and _decides_pace(run.choice) == _decides_pace(choice)
    )
    return next(alike, None)


def _decides_pace(choice: TrainingChoice) -> tuple[str, str, bool]:
    return choice.method, choice.loss, choice.written_down


# --- before one ------------------------------------------------------------------------------


def memory_needed(
    bench: Bench, point: Measurement, choice: TrainingChoice
) -> tuple[int, int | None]:
    """Bytes that training this cut takes, both models included, and bytes that are free.

    None is free memory that only the worker can look at, which then refuses what does not fit.
    """
    dense, device = bench.loaded.architecture, bench.loaded.device
    cut = point.plan.applied_to(dense, with_biases=point.recovery == "bias")
    length = visit().request.sequence_length
    at_once = windows_at_once(length, device) * length
    needed = training_bytes(cut, choice.method, Settings.rank, at_once)
    needed += models_bytes(cut, dense, bench.loaded.dtype)
    return needed, free_memory(device) if device.type == "cpu" else None


def written_bytes(bench: Bench, choice: TrainingChoice) -> tuple[int | None, int]:
    """Bytes that the dense model's predictions take on disk, at most, and those of one token.

    The first is None where the number of tokens is not known.
    """
    length, vocab_size = visit().request.sequence_length, bench.loaded.architecture.vocab_size
    shape = Shape(length, vocab_size, min(TOP, vocab_size))
    windows = choice.tokens and choice.tokens // length + math.ceil(choice.watched / length)
    return windows and shape.bytes_of(windows), shape.bytes_of_window // length


def run_of(bench: Bench, cut: Cut, point: Measurement, choice: TrainingChoice) -> TrainingRun:
    """The training of a cut by these choices: the one there is, or a new one."""
    request = visit().request
    of_cut = _digest([asdict(request), bench.identity, repr(point.identity)])
    named = asdict(choice)
    if not choice.written_down:
        # As trainings were named before there was this choice.
        del named["written_down"]
    folder = _own_folder() / of_cut / _digest(named)
    new = TrainingRun(request, cut, choice, folder, choice.tokens, time.time())
    return _runs().get(folder, new)


def _digest(determined_by: Any) -> str:
    return hashlib.sha256(json.dumps(determined_by, sort_keys=True).encode()).hexdigest()[:32]


# --- jobs ------------------------------------------------------------------------------------


def start_training(run: TrainingRun, finish: bool = False) -> None:
    """Queues a training, or goes on with one; `finish` writes the best so far.

    Others' jobs have their turn at each step, and others' trainings after `TURN_SECONDS`.
    """
    request, known = visit().request, points()
    run.ending = finish
    run.recall()
    run.keep()
    _runs()[run.folder] = run

    def training(report: Progress) -> Iterator[tuple[int, int]]:
        for text in (run.choice.text, *run.choice.held_out):
            require_readable_text(text, settings())
        # Before a cut may be made anew, which may take long: the texts may be refused.
        workbench().run(request, work.require_training, report, run.spec())
        if not run.cut_folder.is_dir():
            point = point_of(run.cut, request, known, report)
            workbench().run(request, work.export, report, point, run.cut_folder)
        if run.tokens is None:
            _decide_tokens(run, report)
        while not run.done:
            _train_for_a_turn(run, report)
            run.keep()
            yield run.step, max(1, run.steps)
        return run.outcome

    run.job = start("Training", training, ("recover", request), background=True)


def _decide_tokens(run: TrainingRun, report: Progress) -> None:
    """Times the first steps where the budget is a time, and says how many tokens it is."""

    def timing(stage: str, done: int, total: int) -> None:
        report(f"Timing the first steps: {stage.lower()}", done, total)

    run.pace = workbench().run(run.request, work.training_pace, timing, run.spec())
    length = run.request.sequence_length
    run.tokens = run.pace.tokens_in(
        60 * run.choice.minutes, run.choice.settings(), length, run.choice.watched
    )
    run.keep()


def _train_for_a_turn(run: TrainingRun, report: Progress) -> None:
    """Trains to the end, or until others have waited long enough; asked to end, to the best."""
    turn_ends, gave_up = time.monotonic() + TURN_SECONDS, False

    def reporting(stage: str, done: int, total: int) -> None:
        nonlocal gave_up
        report(stage, done, total)
        # Between two steps, where the worker keeps its state before it stops, or between two
        # windows that it writes down.
        training = stage == "Training" and done < total
        progressed = run.step > first if training else stage == WRITING and done
        late = time.monotonic() > turn_ends and progressed
        if (late and run.job.queue.wanted_by_others(run.job)) or (
            training and run.ending and not spec.finish
        ):
            gave_up = True
            raise Cancelled

    spec = run.spec(run.ending)
    # A turn has a step, or a window, at least, however long models take to load.
    first = run.step
    try:
        workbench().run(run.request, work.train_cut, reporting, spec, received=run.take)
    except Cancelled:
        if not gave_up:
            raise
    finally:
        # A worker that died may have taken steps after it last kept its state.
        run.recall()


def remove(run: TrainingRun) -> None:
    """Removes a training from disk, and the folder of its cut with the last one."""
    _runs().pop(run.folder, None)
    remove_whole(run.folder)
    if not any(run.folder.parent.glob(f"*/{KEPT}")):
        remove_whole(run.folder.parent)


def start_copy(run: TrainingRun, folder: Path, tasks: dict[str, Any] | None = None) -> None:
    """Queues the copying of a trained checkpoint to a folder of the visitor's choice.

    `tasks` are its scores of tasks, as `tasks.json` holds them, where there are any.
    """

    def copying(report: Progress) -> Path:
        place = require_writable(folder, settings())
        require_free_output(place)
        files = [path for path in run.trained_folder.iterdir() if path.is_file()]
        require_disk_space(place, sum(path.stat().st_size for path in files))
        with staged_folder(place) as staging:
            for done, path in enumerate(files):
                report("Copying", done, len(files))
                shutil.copyfile(path, staging / path.name)
            if tasks is not None:
                record_tasks(staging, tasks)
        return place

    about = "recover copy", visit().request
    start("Writing the trained checkpoint", copying, about, queue=workbench().uploads)
