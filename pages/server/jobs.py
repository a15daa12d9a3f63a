"""Jobs: one queue for each device, so that jobs wait for it instead of fighting over it.

Here is decided whose turn it is; the work itself is done in a worker's process
(`transact_core.workers`). A job outlives the page that started it; any page can show it and cancel
it. Long work is divided into pieces: it is a generator that gives up its turn at every `yield`, so
that other jobs run between two of its pieces. Scheduling is round-robin over owners, and over the
jobs of one owner, so that nobody waits for all of another visitor's curve. Jobs that a page cannot
be drawn without are urgent and go first. Background jobs, which nobody asked for, come last, and at
each of their reports all waiting jobs run first.
"""

import atexit
import logging
import threading
import time
from collections.abc import Callable, Generator, Hashable, Iterable, Mapping
from inspect import isgenerator
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch

from transact_core.base.errors import Cancelled, Progress, TransActError
from transact_core.workers.process import worker_threads
from transact_core.workers.tasks import NO_MEMORY_WORDS, WorkerDied, WorkFailed, in_words

QUEUED, RUNNING, DONE, FAILED, CANCELLED = "queued", "running", "done", "failed", "cancelled"
UNFORESEEN = "Something unforeseen went wrong ({})."
STOPPING_SECONDS = 5
"""Seconds that running work has to reach a report, where it can stop, when the process ends."""

Work = Callable[[Progress], Any]
"""A function of a progress callback, or a generator that yields (pieces done, pieces) after each.

What it returns is the job's result. A generator should hold nothing large over a `yield`.
"""


class Job:
    """One job: its work, its progress and its result or error.

    `owner` is the visitor whom its turns are counted for, and `about` the key by which a page finds
    it again.
    """

    def __init__(
        self,
        title: str,
        work: Work,
        owner: object = None,
        urgent: bool = False,
        about: Hashable = None,
        give_way: Callable[[], None] | None = None,
    ) -> None:
        self.title = title
        self.owner = self if owner is None else owner
        self.urgent = urgent
        self.about = about
        self.give_way = give_way
        """Called at each report of a background job; None for other jobs."""
        self.state = QUEUED
        self.stage, self.done, self.total = "", 0, 1
        self.pieces_done, self.pieces = 0, 1
        self.result: Any = None
        self.error: str | None = None
        self.refused = False
        """Failed with a sentence for the user: another try would fail in the same way."""
        self.queue: JobQueue | None = None
        """The queue that it waits in."""
        self.last_turn = 0
        """The queue's count of turns at this job's last one; 0 before its first."""
        self._turns: Generator[tuple[int, int], None, Any] | None = _in_turns(work, self.report)
        self._changing = threading.Lock()
        self._cancelled = threading.Event()
        self._ended = threading.Event()
        self._turn_began = self._stage_started = self._last_report = time.monotonic()
        self._stage_began_with = 0
        self._seconds_in_pieces = 0.0

    @property
    def finished(self) -> bool:
        return self.state in (DONE, FAILED, CANCELLED)

    @property
    def fraction(self) -> float:
        """Share of the current stage that is done, from 0 to 1."""
        return min(1.0, self.done / self.total) if self.total else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds of computing left, or None while there is nothing to estimate from.

        Of the current stage; of all pieces once one of them is done.
        """
        if self.pieces_done:
            left = self._seconds_in_pieces / self.pieces_done * (self.pieces - self.pieces_done)
            under_way = time.monotonic() - self._turn_began if self.state == RUNNING else 0.0
            return max(0.0, left - under_way)
        done, reported = self.done - self._stage_began_with, self._last_report
        if self.state != RUNNING or done <= 0 or reported - self._stage_started < 1:
            return None
        # The estimate at the last report, less the time since then: it never grows between two
        # reports.
        left = (reported - self._stage_started) * (self.total - self.done) / done
        return max(0.0, left - (time.monotonic() - reported))

    @property
    def stopping(self) -> bool:
        """Whether it is cancelled and has not yet reached a report, where it stops."""
        return self._cancelled.is_set() and not self.finished

    def cancel(self) -> None:
        """Cancels it: at its next report while it runs, at once while it waits for a turn."""
        with self._changing:
            self._cancelled.set()
            if self.state == QUEUED:
                self._end(CANCELLED)

    def wait(self, seconds: float) -> bool:
        """Waits for the job to end, at most so many seconds; returns whether it has."""
        return self._ended.wait(seconds)

    def report(self, stage: str, done: int, total: int) -> None:
        """The progress callback of the work."""
        if self._cancelled.is_set():
            raise Cancelled
        self._last_report = time.monotonic()
        if stage != self.stage:
            self._stage_started, self._stage_began_with = self._last_report, done
        self.stage, self.done, self.total = stage, done, total
        if self.give_way is not None:
            began = time.monotonic()
            self.give_way()
            # The turns that others had meanwhile do not count as this job's own computing.
            pause = time.monotonic() - began
            self._stage_started += pause
            self._last_report += pause

    def take_turn(self) -> None:
        """Runs to the end of a piece or of the work; called by the queue's worker alone."""
        with self._changing:
            if self.state != QUEUED:
                return
            self.state = RUNNING
        self._turn_began = time.monotonic()
        try:
            before = self.pieces_done
            self.pieces_done, self.pieces = next(self._turns)
            if self.pieces_done > before:
                self._seconds_in_pieces += time.monotonic() - self._turn_began
            with self._changing:
                if self._cancelled.is_set():
                    raise Cancelled
                self.state = QUEUED
        except StopIteration as end:
            self.result = end.value
            self._end(DONE)
        except Cancelled:
            self._end(CANCELLED)
        except TransActError as error:
            self.error, self.refused = str(error), True
            self._end(FAILED)
        except (MemoryError, torch.OutOfMemoryError):
            self.error = NO_MEMORY_WORDS
            self._end(FAILED)
        except WorkerDied as error:
            self.error = str(error)
            self._end(FAILED)
        except WorkFailed as error:
            self.error = UNFORESEEN.format(error)
            self._end(FAILED)
        except BaseException as error:
            # Libraries written in Rust panic with what is no Exception, and some call sys.exit. No
            # job may end the worker, which all later jobs need.
            logging.getLogger(__name__).exception("The job %r failed", self.title)
            self.error = UNFORESEEN.format(in_words(error))
            self._end(FAILED)

    def _end(self, state: str) -> None:
        # The work refers to models, and nothing of it is needed any more.
        self._turns = None
        self.state = state
        self._ended.set()


def _in_turns(work: Work, report: Progress) -> Generator[tuple[int, int], None, Any]:
    made = work(report)
    return (yield from made) if isgenerator(made) else made


class JobQueue:
    """Runs jobs one turn at a time, in a thread of its own, which mostly waits for a worker."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._unfinished: list[Job] = []
        self._running: Job | None = None
        self._turns = 0
        self._last_turns: WeakKeyDictionary[object, int] = WeakKeyDictionary()
        threading.Thread(target=self._serve, name="jobs", daemon=True).start()
        _queues.add(self)

    def submit(
        self,
        title: str,
        work: Work,
        owner: object = None,
        urgent: bool = False,
        about: Hashable = None,
        background: bool = False,
    ) -> Job:
        """Queues work; see the module and `Job` for the arguments."""
        give_way = self._give_way if background else None
        job = Job(title, work, owner, urgent, about, give_way)
        job.queue = self
        with self._changed:
            self._unfinished.append(job)
            self._changed.notify()
        return job

    def stop(self, seconds: float) -> bool:
        """Cancels all jobs; returns whether all have ended within so many seconds."""
        with self._changed:
            jobs = list(self._unfinished)
        for job in jobs:
            job.cancel()
        deadline = time.monotonic() + seconds
        return all(job.wait(max(0.0, deadline - time.monotonic())) for job in jobs)

    def wanted_by_others(self, job: Job) -> bool:
        """Whether a job of another owner waits, for which a running one could end its turn."""
        with self._changed:
            return any(
                other.state == QUEUED and other.owner is not job.owner for other in self._unfinished
            )

    def others_wait(self) -> bool:
        """As `wanted_by_others`, of the job that runs; for that job's own work."""
        return self._running is not None and self.wanted_by_others(self._running)

    def ahead_of(self, job: Job) -> list[Job]:
        """The jobs that have a turn before this one has its next, the running job first."""
        with self._changed:
            running = self._running
            stays = running not in (None, job) and running.give_way is None
            ahead = [running] if stays else []
            waiting = [other for other in self._unfinished if other not in ahead]
            last_turns, turn = dict(self._last_turns), self._turns
        while (following := _next(waiting, last_turns)) not in (None, job):
            ahead.append(following)
            waiting.remove(following)
            last_turns[following.owner] = turn = turn + 1
        return ahead if following is job else []

    def _serve(self) -> None:
        # Kept results are looked up by the number of threads, which torch has for each thread.
        torch.set_num_threads(worker_threads())
        while True:
            self._give_turn()

    def _give_turn(self) -> None:
        with self._changed:
            while (job := _next(self._unfinished, self._last_turns)) is None:
                self._changed.wait()
        self._run(job)

    def _give_way(self) -> None:
        """Runs all waiting jobs inside a background job, in the same thread."""
        while True:
            with self._changed:
                others = [other for other in self._unfinished if other.give_way is None]
                job = _next(others, self._last_turns)
            if job is None:
                return
            self._run(job)

    def _run(self, job: Job) -> None:
        with self._changed:
            self._turns += 1
            self._last_turns[job.owner] = job.last_turn = self._turns
            interrupted, self._running = self._running, job
        try:
            job.take_turn()
        finally:
            with self._changed:
                self._running = interrupted
                self._unfinished = [other for other in self._unfinished if not other.finished]


_queues: WeakSet[JobQueue] = WeakSet()


@atexit.register
def _stop_queues() -> None:
    # A thread that still computes while the interpreter shuts down can crash the process.
    for queue in list(_queues):
        queue.stop(STOPPING_SECONDS)


def _next(jobs: Iterable[Job], last_turns: Mapping[object, int]) -> Job | None:
    """The job whose turn is next: urgent ones first, background ones last.

    Among equals it is the owner who has waited longest, and of that owner's jobs the one that has.
    """
    waiting = (job for job in jobs if job.state == QUEUED)
    return min(
        waiting,
        key=lambda job: (
            job.give_way is not None,
            not job.urgent,
            last_turns.get(job.owner, 0),
            job.last_turn,
        ),
        default=None,
    )
