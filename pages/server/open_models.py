"""Open models and the jobs that open, score and measure them; shared by all sessions.

The models are in the workers' processes (`transact_core.workers`), one for each device. The benches
here hold what was measured on them, and no weights.
"""

import gc
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol
from weakref import WeakSet

import streamlit as st
import torch

from pages.server import libraries
from pages.server.jobs import DONE, STOPPING_SECONDS, Job, JobQueue
from pages.server.request import Request, first_look, what_to_learn, what_to_price
from pages.server.settings import require_readable_source, require_readable_text, settings
from pages.server.visitors import Visitor, size_of
from transact_core.base.errors import Progress
from transact_core.base.files import sha256_of_text
from transact_core.experiments import results
from transact_core.experiments.allocate import Laws
from transact_core.experiments.bench import Bench, Choices
from transact_core.models.devices import resolve_device
from transact_core.planning.duration import Feed, damage_flops
from transact_core.workers import work
from transact_core.workers.process import worker_threads
from transact_core.workers.tasks import Outcome, Received, Task, result_of

BENCHES_KEPT = 12
VISITORS_KEPT = 200
HELD_BYTES = 1 << 30
"""Most bytes of results that are held in memory for all visitors; more of them are on disk."""
CLUSTER = "ray"
"""Name of the lane of a Ray cluster among those of devices."""


class Worker(Protocol):
    """What does the work: a process of its own, or for tests this one."""

    def run(self, task: Task, report: Progress, received: Received) -> Outcome:
        """As `WorkerProcess.run`."""

    def stop(self) -> None:
        """Ends it."""


@dataclass(frozen=True)
class Lane:
    """One device: the jobs that wait for it, and the worker that does them."""

    queue: JobQueue
    worker: Worker


@dataclass
class Opening:
    """The jobs that open a request: first its bench, then the dense model's perplexity."""

    bench: Job
    dense: Job
    preparations: dict[Choices, Job] = field(default_factory=dict)
    """The jobs that measured what plans need beyond the opening."""
    damages: dict[Choices, Job] = field(default_factory=dict)
    """The jobs that measured what a prediction needs."""
    prices: dict[Choices, Laws] = field(default_factory=dict)
    """What the cuts of single layers lose, by the choices that it depends on."""


class Workbench:
    """State that all sessions of a server share: queue, visitors, loaded models, open benches."""

    def __init__(self, new_worker: Callable[[], Worker]) -> None:
        # Kept results are looked up by the number of threads that the workers use.
        torch.set_num_threads(worker_threads())
        self._new_worker = new_worker
        self._lanes: dict[str, Lane] = {}
        self.uploads = JobQueue()
        """For jobs that send files to the hub and compute nothing: they keep no device waiting."""
        # Sessions come in threads of their own, and so do the lanes' jobs.
        self._lock = threading.RLock()
        self._visitors: OrderedDict[str, Visitor] = OrderedDict()
        self._everyone: WeakSet[Visitor] = WeakSet()
        self._openings: OrderedDict[Request, Opening] = OrderedDict()
        self._paces: dict[tuple[str, str, str], float] = {}

    def lane(self, request: Request) -> Lane:
        """The lane of the device that a request computes on; made when it is first asked for."""
        name = request.device
        if name == "auto":
            device = resolve_device()
            name = "cpu" if device.type == "cpu" else f"{device.type}:{device.index or 0}"
        return self._lane(name)

    def cluster(self) -> Lane:
        """The lane of curves on a Ray cluster, whose worker hands their points out."""
        return self._lane(CLUSTER)

    def _lane(self, name: str) -> Lane:
        with self._lock:
            if name not in self._lanes:
                self._lanes[name] = Lane(JobQueue(), self._new_worker())
            return self._lanes[name]

    def stop(self, seconds: float = STOPPING_SECONDS) -> bool:
        """Cancels all jobs and ends the workers; whether all jobs ended within so many seconds."""
        with self._lock:
            lanes = list(self._lanes.values())
        ended = [self.uploads.stop(seconds), *(lane.queue.stop(seconds) for lane in lanes)]
        for lane in lanes:
            lane.worker.stop()
        return all(ended)

    def run(
        self,
        request: Request,
        function: Callable,
        report: Progress,
        *arguments: Any,
        received: Received = lambda _: None,
        lane: Lane | None = None,
    ) -> Any:
        """The result of a function of `transact_core.workers.work`, on a request's bench; for jobs.

        What the worker's benches measure on the way is added to the benches here. `received` is
        called with each thing that the function yields. `lane` is the one of the request's device
        where no other is given; jobs use the worker of the lane that they wait in.

        Raises:
            Cancelled, TransActError, MemoryError, WorkFailed, WorkerDied: as the task ended.
        """
        task = Task(
            f"{function.__module__}:{function.__qualname__}", (request.bench_spec, *arguments)
        )
        outcome = (lane or self.lane(request)).worker.run(task, report, received)
        self._learn(outcome)
        return result_of(outcome)

    def _learn(self, outcome: Outcome) -> None:
        with self._lock:
            for request, opening in list(self._openings.items()):
                spec = request.bench_spec
                if spec in outcome.learned and opening.bench.state == DONE:
                    opening.bench.result.learn(outcome.learned[spec])
                if spec in outcome.closed:
                    del self._openings[request]
        for sentence in outcome.notices:
            if sentence not in results.notices:
                results.notices.append(sentence)

    def visitor(self, identity: str | None) -> Visitor:
        """The visitor of that identity; without one, a new visitor that is not found again."""
        with self._lock:
            if identity is None:
                known = Visitor()
            else:
                known = self._visitors.get(identity) or Visitor(key=sha256_of_text(identity))
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
                bench = self.lane(request).queue.submit(
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
                job = opening.preparations[wanted] = self.lane(request).queue.submit(
                    f"Scoring by {choices.importance}",
                    lambda report: self.run(request, work.prepare, report, wanted),
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
        estimated to take `TRANSACT_UNASKED_SECONDS` at most, and otherwise leaves it.
        """
        wanted = what_to_learn(choices)
        with self._lock:
            opening = self.open(request)
            job = opening.damages.get(wanted)
            if job is None or (anew and job.finished):

                def measure(report: Progress) -> None:
                    seconds = self.damage_seconds(request, opening.bench.result)
                    longest = settings().unasked_seconds
                    only_kept = unasked and (seconds is None or seconds > longest)
                    self.run(request, work.learn, report, wanted, only_kept)

                job = opening.damages[wanted] = self.lane(request).queue.submit(
                    "Measuring what each layer loses", measure, background=True
                )
            return job

    def prices(self, request: Request, choices: Choices) -> Laws | None:
        """What the cuts of single layers lose; None until that is measured."""
        return self.open(request).prices.get(what_to_price(choices))

    def keep_prices(self, request: Request, choices: Choices, prices: Laws) -> None:
        """Notes them for every visitor of this request."""
        with self._lock:
            if request in self._openings:
                self._openings[request].prices[what_to_price(choices)] = prices

    def _dense(self, request: Request, bench: Job) -> Job:
        def measure(report: Progress) -> None:
            if bench.state == DONE:
                pace = self.run(request, work.measure_dense, report)
                self._paces[request.model_key] = pace

        # Not urgent, so that it waits for every opening; its first turn comes before other jobs'.
        return self.lane(request).queue.submit("Measuring the dense model", measure)

    def _opened(self, request: Request, report: Progress) -> Bench:
        require_readable_source(request.model, settings())
        for text in (request.calibration, request.evaluation, *request.others):
            require_readable_text(text, settings())
        return self.run(request, work.open_bench, report)


@st.cache_resource(show_spinner=False)
def workbench() -> Workbench:
    # Streamlit collects garbage after every run of a page or a fragment. To look through the half
    # million objects of imported libraries each time took a third of a second, in which nothing
    # else in this process moved.
    gc.collect()
    gc.freeze()
    return Workbench(libraries.new_worker)
