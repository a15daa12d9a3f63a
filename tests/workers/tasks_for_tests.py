"""Functions that a worker is asked for by `test_process`; they are imported in its process."""

import ctypes
import os
import signal
import time

import torch

from transact_core.base.errors import TransActError


class Panic(BaseException):
    """As the tokenizers' panics are: no `Exception`."""


def count(models, report, number):
    for done in range(number):
        report("Counting", done + 1, number)
        yield done
    threads = torch.get_num_threads()
    return f"counted {number} with {threads} thread" + ("s" if threads > 1 else "")


def ones(models, report, number):
    return torch.ones(number)


def refuse(models, report):
    raise TransActError("Mend this.")


def run_out_of_memory(models, report):
    raise MemoryError


def divide_by_zero(models, report):
    return 1 / 0


def exit(models, report):
    raise SystemExit(3)


def panic(models, report):
    raise Panic("bounds")


def report_for_ever(models, report):
    done = 0
    while True:
        report("Working", done, done + 1)
        done += 1


def kill_itself(models, report):
    os.kill(os.getpid(), signal.SIGKILL)


def crash(models, report):
    ctypes.string_at(0)


def sleep(models, report, seconds):
    time.sleep(seconds)


def niceness(models, report):
    return os.nice(0)
