"""Open models and the jobs that open, score and measure them; shared by all sessions."""

import gc
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from weakref import WeakSet

import streamlit as st
import torch
from transformers import LlamaForCausalLM

from pages.server.jobs import DONE, Job, JobQueue, job_threads
from pages.server.request import Cut, Request, first_look, identity, what_to_learn
from pages.server.settings import require_readable_source, settings
from pages.server.visitors import Visitor, size_of
from transact_core.base.errors import Progress, TransActError, silent
from transact_core.data.windows import read_texts
from transact_core.experiments.bench import Bench, Choices, Measurement, carry_out, compress
from transact_core.experiments.cut_spec import bench_with
from transact_core.experiments.results import decided, measured
from transact_core.forward.perplexity import token_losses
from transact_core.models.load import LoadedModel, load_model
from transact_core.planning.duration import Feed, damage_flops, evaluation_flops
from transact_core.pruning.plan import PruningPlan

MODELS_KEPT = 2
BENCHES_KEPT = 12
"""More than models: without its model a bench is small, and the pages need no more of it."""
VISITORS_KEPT = 200
HELD_BYTES = 1 << 30
"""Most bytes of results that are held in memory for all visitors; more of them are on disk."""
UNASKED_SECONDS = 60
"""The longest estimate of work in the background that begins without being asked for."""
PACE_TOKENS = 64
"""Length of the pass that is timed where the dense model's losses are kept from an earlier run."""


class TooLong(Exception):
    """Raised by a progress callback to stop work that was to be done only if it takes no time."""


class StageTimer:
    """Passes progress on, and times the work from its first report to its last."""

    def __init__(self, report: Progress) -> None:
        self._report, self._began = report, None
        self.seconds: float | None = None
        """None where nothing was reported: nothing was measured then."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.perf_counter()
        if self._began is None:
            self._began = now
        elif done == total:
            self.seconds = now - self._began
        self._report(stage, done, total)


@dataclass
class Opening:
    """The jobs that open a request: first its bench, then the dense model's perplexity."""

    bench: Job
    dense: Job
    preparations: dict[Choices, Job] = field(default_factory=dict)
    """The jobs that measured what plans need beyond the opening."""
    damages: dict[Choices, Job] = field(default_factory=dict)
    """The jobs that measured what a prediction needs."""


class Workbench:
    """State that all sessions of a server share: queue, visitors, loaded models, open benches."""

    def __init__(self) -> None:
        # The number of threads that results depend on is the jobs' own.
        torch.set_num_threads(job_threads())
        self.queue = JobQueue()
        # Sessions come in threads of their own; models and the last cut are the worker's alone.
        self._lock = threading.RLock()
        self._visitors: OrderedDict[str, Visitor] = OrderedDict()
        self._everyone: WeakSet[Visitor] = WeakSet()
        self._openings: OrderedDict[Request, Opening] = OrderedDict()
        self._models: OrderedDict[tuple[str, str, str], LoadedModel] = OrderedDict()
        self._benches: WeakSet[Bench] = WeakSet()
        self._paces: dict[tuple[str, str, str], float] = {}
        self._in_use: LoadedModel | None = None
        self._last_cut: tuple[Request, tuple, LlamaForCausalLM] | None = None

    def visitor(self, identity: str | None) -> Visitor:
        """The visitor of that identity; without one, a new visitor that is not found again."""
        with self._lock:
            known = self._visitors.get(identity) or Visitor()
            self._everyone.add(known)
            if identity is None:
                return known
            self._visitors[identity] = known
            self._visitors.move_to_end(identity)
            idle = [key for key, other in self._visitors.items() if not other.unfinished_jobs]
            for key in idle[: max(0, len(self._visitors) - VISITORS_KEPT)]:
                if key != identity:
                    del self._visitors[key]
            return known

    def make_room(self) -> None:
        """Drops results of visitors beyond `HELD_BYTES`, those looked at longest ago first.

        Visitors with unfinished jobs keep theirs. A point that is dropped is still on disk, and is
        read from there when it is asked for again.
        """
        with self._lock:
            everything = [
                (holding.looked_at, size_of(holding), visitor, request)
                for visitor in self._everyone
                for request, holding in list(visitor.holdings.items())
            ]
            held = sum(size for _, size, _, _ in everything)
            idle = [entry for entry in everything if not entry[2].unfinished_jobs]
            # The last one looked at stays however large it is.
            for _, size, visitor, request in sorted(idle, key=lambda entry: entry[0])[:-1]:
                if held <= HELD_BYTES:
                    return
                visitor.holdings.pop(request, None)
                held -= size

    def open(self, request: Request) -> Opening:
        """The jobs that open this request; sessions that ask for the same share them."""
        with self._lock:
            opening = self._openings.get(request)
            if opening is None:
                bench = self.queue.submit(
                    "Opening the model", lambda report: self._opened(request, report), urgent=True
                )
                opening = self._openings[request] = Opening(bench, self._dense(request, bench))
            self._openings.move_to_end(request)
            ended = [key for key, old in self._openings.items() if old.bench.finished]
            for key in ended[: max(0, len(self._openings) - BENCHES_KEPT)]:
                if key != request:
                    del self._openings[key]
            return opening

    def reopen(self, request: Request) -> Opening:
        """Opens anew what failed or was cancelled, at the visitor's wish."""
        with self._lock:
            if self._openings[request].bench.finished:
                del self._openings[request]
            return self.open(request)

    def measure_dense(self, request: Request) -> None:
        """Measures the dense model anew where that failed or was cancelled."""
        with self._lock:
            opening = self.open(request)
            if opening.dense.finished:
                opening.dense = self._dense(request, opening.bench)

    def prepare(self, request: Request, choices: Choices, anew: bool = False) -> Job:
        """The job that measures what plans with these choices need; shared as openings are.

        The request must be open. `anew` is for what failed or was cancelled.
        """
        # No plan looks at the recovery, and what auto and steps try is tried when it is measured.
        wanted = replace(first_look(choices), recovery=Choices.recovery)
        with self._lock:
            opening = self.open(request)
            job = opening.preparations.get(wanted)
            if job is None or (anew and job.finished):
                job = opening.preparations[wanted] = self.queue.submit(
                    f"Scoring by {choices.importance}",
                    lambda report: self.bench(request, report).prepare(wanted, report),
                    urgent=True,
                )
            return job

    def pace(self, request: Request) -> float | None:
        """FLOPs a second that the request's model was seen to do here; None before it is timed."""
        return self._paces.get(request.model_key)

    def damage_seconds(self, request: Request, bench: Bench) -> float | None:
        """Estimate of how long `Bench.damage` measures whole heads and the MLP; None as `pace`."""
        pace, windows = self.pace(request), bench.calibration
        if pace is None:
            return None
        feed = Feed(windows.tokens, windows.sequence_length)
        return damage_flops(bench.loaded.architecture, feed) / pace

    def learn(
        self, request: Request, choices: Choices, anew: bool = False, unasked: bool = False
    ) -> Job:
        """The job that measures what predictions with these choices need; shared as openings are.

        The request must be open. `anew` is for what failed, was cancelled or was left. A job that
        is `unasked` looks the measurement up; where it is not kept, it measures if that is
        estimated to take `UNASKED_SECONDS` at most, and otherwise leaves it.
        """
        wanted = what_to_learn(choices)
        with self._lock:
            opening = self.open(request)
            job = opening.damages.get(wanted)
            if job is None or (anew and job.finished):

                def measure(report: Progress) -> None:
                    bench = self.bench(request, silent)
                    seconds = self.damage_seconds(request, bench)
                    long = seconds is None or seconds > UNASKED_SECONDS

                    def allowed(stage: str, done: int, total: int) -> None:
                        # Only what measures reports.
                        if unasked and long:
                            raise TooLong
                        report(stage, done, total)

                    # Others have turns in the midst of this, and may open models of their own.
                    self._in_use = bench.loaded
                    try:
                        bench.damage(wanted, allowed)
                    except TooLong:
                        pass
                    finally:
                        self._in_use = None

                job = opening.damages[wanted] = self.queue.submit(
                    "Measuring what each layer loses", measure, background=True
                )
            return job

    def bench(self, request: Request, report: Progress) -> Bench:
        """The bench of a request with its model at hand; for jobs, and held by none over a turn.

        Raises:
            TransActError: it cannot be opened any more, or the weights are not those they were.
        """
        opening = self._openings.get(request)
        if opening is None or opening.bench.state != DONE:
            return self._opened(request, report)
        bench = opening.bench.result
        if bench.loaded.released:
            loaded = self._model(request, report)
            if loaded.weight_files != bench.loaded.weight_files:
                with self._lock:
                    self._openings.pop(request, None)
                raise TransActError(
                    f"The weights of {loaded.source} have changed since they were opened; "
                    "try again with the new ones."
                )
            bench.loaded = loaded
        elif request.model_key in self._models:
            self._models.move_to_end(request.model_key)
        return bench

    def _dense(self, request: Request, bench: Job) -> Job:
        def measure(report: Progress) -> None:
            if bench.state == DONE:
                opened, timer = self.bench(request, report), StageTimer(report)
                opened.dense(timer)
                self._paces[request.model_key] = measured_pace(opened, timer.seconds)

        # Not urgent, so that it waits for every opening; its first turn comes before other jobs'.
        return self.queue.submit("Measuring the dense model", measure)

    def _opened(self, request: Request, report: Progress) -> Bench:
        bench = self._bench(request, report)
        self._benches.add(bench)
        return bench

    def _bench(self, request: Request, report: Progress) -> Bench:
        for source in (request.model, request.calibration, request.evaluation):
            require_readable_source(source, settings())
        texts = read_texts(request.windows)
        loaded = self._model(request, report)
        bench = bench_with(loaded, request.windows, texts, progress=report)
        bench.statistics(report)
        bench.scores(Choices().importance)
        return bench

    def _model(self, request: Request, report: Progress) -> LoadedModel:
        key = request.model_key
        if key not in self._models:
            # Room is made first, so that the old and the new model are not held at once.
            unused = [old for old, held in self._models.items() if held is not self._in_use]
            for dropped in unused[: max(0, len(self._models) - MODELS_KEPT + 1)]:
                self._forget(dropped)
            require_readable_source(request.model, settings())
            self._models[key] = load_model(*key, report)
        self._models.move_to_end(key)
        return self._models[key]

    def _forget(self, key: tuple[str, str, str]) -> None:
        """Drops a model; its benches stay, with what was measured on them."""
        loaded = self._models.pop(key)
        for bench in list(self._benches):
            if bench.loaded is loaded:
                bench.release_model()
        if self._last_cut and self._last_cut[0].model_key == key:
            self._last_cut = None

    def measure(self, request: Request, cut: Cut, report: Progress) -> Measurement:
        """The point of a cut; a model made for it is kept until the next cut, for an export."""
        bench = self.bench(request, report)

        def compress_and_hold(
            bench: Bench, plan: PruningPlan, recovery: str, progress: Progress
        ) -> tuple[LlamaForCausalLM, Measurement]:
            self._last_cut = None
            model, point = compress(bench, plan, recovery, progress)
            self._last_cut = (request, identity(plan, recovery), model)
            return model, point

        decision = decided(bench, *cut.ratios, cut.choices, report)
        return measured(bench, decision, cut.recovery, report, compress_and_hold)

    def model(self, request: Request, point: Measurement, report: Progress) -> LlamaForCausalLM:
        """The pruned model of a point: that of the last cut where it is the same, or made anew."""
        asked = (request, identity(point.plan, point.recovery))
        if self._last_cut is None or self._last_cut[:2] != asked:
            self._last_cut = None
            bench = self.bench(request, report)
            model, _ = carry_out(bench, point.plan, point.recovery, report)
            self._last_cut = (*asked, model)
        return self._last_cut[2]


def measured_pace(bench: Bench, seconds: float | None) -> float:
    """FLOPs a second on this model, where its evaluation took so long; else a short pass is timed.

    The model must be at hand.
    """
    shape, windows = bench.loaded.architecture, bench.evaluation
    feed = Feed(windows.tokens, windows.sequence_length)
    if seconds is None:
        ids = windows.ids[0, :PACE_TOKENS].to(bench.loaded.device)
        feed = Feed(len(ids), len(ids))
        # The first pass after loading reads the weights from disk.
        token_losses(bench.loaded.model, ids[:2])
        began = time.perf_counter()
        token_losses(bench.loaded.model, ids)
        seconds = time.perf_counter() - began
    return evaluation_flops(shape, feed) / max(seconds, 1e-6)


@st.cache_resource(show_spinner=False)
def workbench() -> Workbench:
    # Streamlit collects garbage after every run of a page or a fragment. To look through the half
    # million objects of imported libraries each time took a third of a second, in which nothing
    # else in this process moved.
    gc.collect()
    gc.freeze()
    return Workbench()
