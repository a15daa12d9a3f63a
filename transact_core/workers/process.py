"""Starts a worker's process, sends it tasks, and says why it ended if it does.

Nothing here brings torch with it before a task is run, so that a worker can be started while its
server still imports.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from contextlib import suppress
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import TYPE_CHECKING

from transact_core.base.errors import Cancelled, Progress

if TYPE_CHECKING:
    from transact_core.workers.tasks import Outcome, Received, Task

SECONDS_TO_END = 5
"""What a process that was asked to end may take; then it is killed."""
KERNEL_COUNTS = Path("/proc/vmstat")
"""Where Linux counts the processes that it killed for want of memory."""
CRASHES = ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL", "SIGFPE", "SIGTRAP")
"""Signals that a process gets from its own faults."""


class _Ended(Exception):
    """The process at the other end is no longer there."""


class _Process:
    """One process and the connection to it."""

    def __init__(self, threads: int) -> None:
        self.killed_for_memory = _killed_for_memory()
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "transact_core.workers.serve", "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # An interrupt from the terminal is for the server, which lets its workers go.
            start_new_session=True,
            env=_environment(),
        )
        self._key = secrets.token_bytes(32)
        with suppress(OSError):
            self.process.stdin.write(self._key.hex().encode() + b"\n")
            self.process.stdin.flush()
        self._connection: Connection | None = None

    def send(self, message: bytes) -> None:
        """Sends a message; the first one waits until the process listens.

        Raises:
            _Ended: the process has ended.
        """
        try:
            if self._connection is None:
                address = self.process.stdout.readline().decode().strip()
                if not address:
                    raise EOFError
                self._connection = Client(address, authkey=self._key)
            self._connection.send_bytes(message)
        except (EOFError, OSError) as error:
            raise _Ended from error

    def receive(self) -> bytes:
        """Waits for a message.

        Raises:
            _Ended: the process has ended.
        """
        try:
            return self._connection.recv_bytes()
        except (EOFError, OSError) as error:
            raise _Ended from error

    def end(self) -> int:
        """Ends the process if it has not ended by itself, and gives its exit status."""
        if self._connection is not None:
            self._connection.close()
        with suppress(OSError):
            self.process.stdin.close()
        try:
            status = self.process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self.process.stdout.close()
        return status


class WorkerProcess:
    """A worker in a process of its own. A process that has ended is replaced by the next task.

    Tasks are run by one thread at a time; a progress callback may run others in the midst of one.
    """

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or worker_threads()
        self._process: _Process | None = None

    def start(self) -> None:
        """Starts the process if there is none; its imports go on by themselves."""
        if self._process is None:
            self._process = _Process(self.threads)

    @property
    def pid(self) -> int | None:
        """The process' number, or None where none is running."""
        return None if self._process is None else self._process.process.pid

    def run(self, task: Task, report: Progress, received: Received) -> Outcome:
        """Has a task carried out, and gives how it ended.

        `report` is called with the task's progress; a `Cancelled` that it raises ends the task at
        that point, and is no error here. `received` is called with each thing that it yields.

        Raises:
            WorkerDied: the process ended; the sentence says why.
        """
        # Imported late, as torch comes with it.
        from transact_core.workers import tasks

        self.start()
        mine, raised = self._process, None
        try:
            mine.send(tasks.packed(("run", task)))
            while True:
                kind, *message = tasks.unpacked(mine.receive())
                if kind == "ended":
                    break
                answer = "go on"
                try:
                    (received if kind == "received" else report)(*message)
                except Cancelled:
                    answer = "cancel"
                except BaseException as error:
                    # The worker must come to the end of its task before it can be asked again.
                    raised, answer = error, "cancel"
                if kind == "report":
                    mine.send(tasks.packed("cancel" if raised else answer))
        except _Ended as error:
            if self._process is mine:
                self._process = None
            raise tasks.WorkerDied(_why(mine)) from error
        if raised is not None:
            raise raised
        return message[0]

    def stop(self) -> None:
        """Ends the process; a task under way ends with it."""
        process, self._process = self._process, None
        if process is not None:
            process.process.kill()
            process.end()


def worker_threads() -> int:
    """Number of threads that a worker computes with: one core is left for whoever asks it."""
    return max(1, len(os.sched_getaffinity(0)) - 1) if hasattr(os, "sched_getaffinity") else 1


def _environment() -> dict[str, str]:
    """That of this process, in which the worker finds the package that this process runs."""
    root = str(Path(__file__).parents[2])
    before = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, before)))}


def _why(process: _Process) -> str:
    """A sentence on why a process has ended."""
    status = process.end()
    if status >= 0:
        return f"The process that did the work ended (exit status {status}); try again."
    name = signal.Signals(-status).name
    if name in CRASHES:
        return (
            f"The process that did the work crashed in a native library ({name}). If it was "
            "reading a file, the file may be damaged; nothing else was affected."
        )
    if _killed_for_memory() > process.killed_for_memory:
        return (
            "The process that did the work was ended by the operating system, which ran out of "
            "memory; choose a smaller model or fewer tokens."
        )
    return f"The process that did the work was ended from outside ({name}); try again."


def _killed_for_memory() -> int:
    """How many processes Linux has killed for want of memory; 0 where that is not told."""
    with suppress(OSError, ValueError):
        for line in KERNEL_COUNTS.read_text().splitlines():
            name, count = line.split()
            if name == "oom_kill":
                return int(count)
    return 0
