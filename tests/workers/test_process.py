"""Tasks in a process of its own: what passes, what ends it, and what is said when it dies."""

import os
import signal
import threading
from types import SimpleNamespace

import pytest

from tests.workers import tasks_for_tests
from transact_core.base.errors import Cancelled, TransActError, silent
from transact_core.workers import process
from transact_core.workers.process import WorkerProcess
from transact_core.workers.serve import NICENESS
from transact_core.workers.tasks import Task, WorkerDied, WorkFailed, result_of

MODULE = tasks_for_tests.__name__


def task(name, *arguments):
    return Task(f"{MODULE}:{name}", arguments)


@pytest.fixture(scope="module")
def worker():
    made = WorkerProcess(threads=1)
    yield made
    made.stop()


def result(worker, name, *arguments, report=silent, received=lambda _: None):
    return result_of(worker.run(task(name, *arguments), report, received))


def test_results_things_and_reports_come_back(worker):
    things, reports = [], []
    outcome = worker.run(task("count", 3), lambda *report: reports.append(report), things.append)
    assert outcome.result == "counted 3 with 1 thread"
    assert things == [0, 1, 2]
    # Reports that follow each other at once are left out, but for the last one of a stage.
    assert reports[0] == ("Counting", 1, 3)
    assert reports[-1] == ("Counting", 3, 3)


def test_a_worker_gives_way_to_whoever_draws_pages(worker):
    assert result(worker, "niceness") == min(19, os.nice(0) + NICENESS)


def test_tensors_pass_by_value(worker):
    first = result(worker, "ones", 5)
    first.zero_()
    assert result(worker, "ones", 5).sum() == 5
    assert not first.is_shared()


@pytest.mark.parametrize(
    ("name", "expected", "words"),
    [
        ("refuse", TransActError, "Mend this."),
        ("run_out_of_memory", MemoryError, "not enough memory"),
        ("divide_by_zero", WorkFailed, "ZeroDivisionError: division by zero"),
        ("exit", WorkFailed, "SystemExit: 3"),
        ("panic", WorkFailed, "Panic: bounds"),
    ],
)
def test_whatever_a_task_raises_is_told_and_the_worker_goes_on(worker, name, expected, words):
    before = worker.pid
    with pytest.raises(expected, match=words):
        result(worker, name)
    assert result(worker, "ones", 2).sum() == 2
    assert worker.pid == before


def test_a_cancelled_task_ends_at_its_next_report(worker):
    def cancel(stage, done, total):
        raise Cancelled

    with pytest.raises(Cancelled):
        result(worker, "report_for_ever", report=cancel)


def test_an_error_of_the_one_who_asks_ends_the_task_and_is_raised(worker):
    def fail(stage, done, total):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        result(worker, "report_for_ever", report=fail)
    assert result(worker, "ones", 1).sum() == 1


def test_other_tasks_run_in_the_midst_of_one(worker):
    inner = []

    def report(stage, done, total):
        if not inner:
            inner.append(result(worker, "ones", 4).sum().item())

    assert result(worker, "count", 2, report=report) == "counted 2 with 1 thread"
    assert inner == [4]


def test_a_worker_that_crashes_is_replaced(worker):
    before = worker.pid
    with pytest.raises(WorkerDied, match=r"crashed in a native library \(SIGSEGV\)"):
        result(worker, "crash")
    assert result(worker, "ones", 3).sum() == 3
    assert worker.pid != before


def test_a_death_in_the_midst_of_a_task_ends_both(worker):
    inner = []

    def report(stage, done, total):
        with pytest.raises(WorkerDied, match=r"ended from outside \(SIGKILL\)"):
            result(worker, "kill_itself")
        # The next one begins in a new process while the outer task is still asked about.
        inner.append(result(worker, "ones", 2).sum().item())

    with pytest.raises(WorkerDied):
        result(worker, "count", 2, report=report)
    assert inner == [2]
    assert result(worker, "ones", 2).sum() == 2


def test_a_worker_ends_with_its_server(worker):
    result(worker, "ones", 1)
    running = worker._process.process
    timer = threading.Timer(0.2, running.stdin.close)
    timer.start()
    with pytest.raises(WorkerDied):
        result(worker, "sleep", 60)
    timer.join()
    assert running.returncode == 0
    assert result(worker, "ones", 1).sum() == 1


@pytest.mark.parametrize(
    ("status", "killed", "words"),
    [
        (7, 2, "ended (exit status 7); try again"),
        (-signal.SIGABRT, 2, "crashed in a native library (SIGABRT)"),
        (-signal.SIGKILL, 2, "ended from outside (SIGKILL)"),
        (-signal.SIGKILL, 3, "ran out of memory; choose a smaller model"),
    ],
)
def test_why_a_process_ended_is_told_from_its_status(status, killed, words, monkeypatch, tmp_path):
    counts = tmp_path / "vmstat"
    counts.write_text(f"pgfree 7\noom_kill {killed}\n")
    monkeypatch.setattr(process, "KERNEL_COUNTS", counts)
    assert words in process._why(SimpleNamespace(end=lambda: status, killed_for_memory=2))
