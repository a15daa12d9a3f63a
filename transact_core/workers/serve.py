"""A worker's process: it carries out one task after the other until its server lets it go.

    python -m transact_core.workers.serve --threads N

The first line of standard input is a key, in hexadecimal digits. The worker then prints the address
at which it listens, and serves whoever connects to it first and knows the key. It ends with that
connection, and when standard input is closed: a server that is killed leaves no worker behind.

Messages, pickled by value:

    from the server   ("run", Task), and in answer to a report "go on" or "cancel"
    from the worker   ("report", stage, done, total), ("received", thing), ("ended", Outcome)

The worker waits for the answer to each report. Instead of answering at once the server may have
other tasks run, which is how work that nobody waits for makes way.
"""

import argparse
import os
import sys
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

from transact_core.base.errors import Cancelled

SECONDS_BETWEEN_REPORTS = 0.05
"""Reports of one stage that follow each other sooner are left out: each waits for its answer."""
NICENESS = 5
"""By how much a worker's priority is lowered, as of `nice`: pages are drawn before it goes on."""


class Worker:
    """The end of a connection that carries out tasks."""

    def __init__(self, connection: Connection) -> None:
        # Imported late: they bring torch with them, and the address is told before that.
        from transact_core.workers import tasks
        from transact_core.workers.open_models import OpenModels

        self._connection, self._tasks, self._models = connection, tasks, OpenModels()
        self._stage, self._reported = "", 0.0

    def serve(self) -> None:
        """Carries out tasks until the connection ends."""
        while True:
            self._run(self._next())

    def _run(self, message: tuple[str, Any]) -> None:
        _, task = message
        outcome = self._tasks.carry_out(
            task, self._models, self._report, lambda thing: self._send("received", thing)
        )
        self._send("ended", outcome)

    def _report(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        soon = now - self._reported < SECONDS_BETWEEN_REPORTS
        if soon and stage == self._stage and done < total:
            return
        self._stage = stage
        self._send("report", stage, done, total)
        while not isinstance(answer := self._next(), str):
            self._run(answer)
        self._reported = time.monotonic()
        if answer == "cancel":
            raise Cancelled

    def _next(self) -> Any:
        try:
            return self._tasks.unpacked(self._connection.recv_bytes())
        except (EOFError, OSError):
            # The server has gone, and nobody is left to work for. A plain exception would be taken
            # for the task's own.
            os._exit(0)

    def _send(self, *message: Any) -> None:
        packed = self._tasks.packed(message)
        try:
            self._connection.send_bytes(packed)
        except OSError:
            os._exit(0)


def give_way() -> None:
    """Lowers this process' priority, where the system has such a thing."""
    with suppress(OSError, AttributeError):
        os.nice(NICENESS)
    # Linux divides the processor among sessions before it looks at niceness, and a worker has a
    # session of its own. The file is not there where that is switched off.
    with suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(NICENESS))


def end_with_standard_input() -> None:
    """Ends this process, whatever it does, when standard input is closed."""
    sys.stdin.buffer.read()
    os._exit(0)


def main() -> None:
    """Serves one server; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, required=True, help="threads that a task uses")
    chosen = parser.parse_args()
    give_way()
    key = bytes.fromhex(sys.stdin.buffer.readline().decode())
    threading.Thread(target=end_with_standard_input, daemon=True).start()
    with Listener(authkey=key) as listener:
        print(listener.address, flush=True)
        # What libraries print is no part of what is told to the server.
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        connection = listener.accept()
    prepare(chosen.threads)
    Worker(connection).serve()


def prepare(threads: int) -> None:
    """Imports what tasks need, before there is one."""
    import torch

    from transact_core.base.memory import give_large_blocks_back
    from transact_core.workers import work  # noqa: F401

    give_large_blocks_back()
    torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
