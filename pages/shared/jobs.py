"""Background jobs: one worker, so that jobs queue for the device instead of fighting over it.

A job outlives the page that started it; any page can show it, and cancel it.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import torch

from transact_core.errors import Cancelled, Progress, TransActError

QUEUED, RUNNING, DONE, FAILED, CANCELLED = "queued", "running", "done", "failed", "cancelled"


class Job:
    """One piece of work, its progress and what became of it. Written by the worker alone."""

    def __init__(self, title: str, work: Callable[[Progress], Any]) -> None:
        self.title = title
        self.state = QUEUED
        self.stage, self.done, self.total = "", 0, 1
        self.result: Any = None
        self.error: str | None = None
        self.refused = False
        """Failed for a reason that stays, so that another try would fail as well."""
        self._work = work
        self._cancelled = threading.Event()
        self._ended = threading.Event()
        self._stage_started = self._last_report = time.monotonic()
        self._stage_began_with = 0

    @property
    def finished(self) -> bool:
        return self.state in (DONE, FAILED, CANCELLED)

    @property
    def fraction(self) -> float:
        """Of the current stage."""
        return min(1.0, self.done / self.total) if self.total else 0.0

    @property
    def seconds_left(self) -> float | None:
        """In the current stage, or None while there is nothing to judge by."""
        done, reported = self.done - self._stage_began_with, self._last_report
        if self.state != RUNNING or done <= 0 or reported - self._stage_started < 1:
            return None
        # What was promised at the last report, less the time since: the clock never runs backwards
        # while a long piece of the work is under way.
        left = (reported - self._stage_started) * (self.total - self.done) / done
        return max(0.0, left - (time.monotonic() - reported))

    @property
    def stopping(self) -> bool:
        """Cancelled, and not yet at a report where it can stop."""
        return self._cancelled.is_set() and not self.finished

    def cancel(self) -> None:
        """Stops the work at its next report of progress."""
        self._cancelled.set()
        if self.state == QUEUED:
            self.state = CANCELLED
            self._ended.set()

    def wait(self, seconds: float) -> bool:
        """Gives the work this long to end; True when it has."""
        return self._ended.wait(seconds)

    def report(self, stage: str, done: int, total: int) -> None:
        """The progress callback that the work is given."""
        if self._cancelled.is_set():
            raise Cancelled
        self._last_report = time.monotonic()
        if stage != self.stage:
            self._stage_started, self._stage_began_with = self._last_report, done
        self.stage, self.done, self.total = stage, done, total

    def run(self) -> None:
        if self.state == CANCELLED:
            return
        self.state = RUNNING
        try:
            self.result = self._work(self.report)
            self.state = DONE
        except Cancelled:
            self.state = CANCELLED
        except TransActError as error:
            self.error, self.refused, self.state = str(error), True, FAILED
        except (MemoryError, torch.OutOfMemoryError):
            self.error = "The memory is used up; choose a smaller model or fewer tokens."
            self.state = FAILED
        except Exception as error:
            logging.getLogger(__name__).exception("The job %r failed", self.title)
            self.error = f"Something unforeseen went wrong ({type(error).__name__}: {error})."
            self.state = FAILED
        finally:
            self._work = None
            self._ended.set()


class JobQueue:
    """Runs jobs one after the other in a thread of its own."""

    def __init__(self) -> None:
        self._waiting: SimpleQueue[Job] = SimpleQueue()
        self._unfinished: list[Job] = []
        threading.Thread(target=self._serve, name="jobs", daemon=True).start()

    def submit(self, title: str, work: Callable[[Progress], Any]) -> Job:
        job = Job(title, work)
        self._unfinished = [known for known in self._unfinished if not known.finished] + [job]
        self._waiting.put(job)
        return job

    def ahead_of(self, job: Job) -> int:
        """How many unfinished jobs come before this one."""
        unfinished = [known for known in self._unfinished if not known.finished]
        return unfinished.index(job) if job in unfinished else 0

    def _serve(self) -> None:
        # One core is left to the pages, which must answer while a job computes.
        torch.set_num_threads(job_threads())
        while True:
            self._waiting.get().run()


def job_threads() -> int:
    """Threads that a job computes with."""
    return max(1, len(os.sched_getaffinity(0)) - 1) if hasattr(os, "sched_getaffinity") else 1
