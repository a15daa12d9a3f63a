import threading

import pytest

from pages.shared.jobs import CANCELLED, DONE, FAILED, JobQueue
from transact_core.errors import TransActError

WAIT = 10


@pytest.fixture
def queue():
    return JobQueue()


def finished(job):
    deadline = threading.Event()
    for _ in range(WAIT * 100):
        if job.finished:
            return job
        deadline.wait(0.01)
    pytest.fail("the job did not end")


def test_a_job_reports_and_gives_its_result(queue):
    def work(report):
        report("Counting", 3, 4)
        return 7

    job = finished(queue.submit("Count", work))
    assert (job.state, job.result, job.stage, job.fraction) == (DONE, 7, "Counting", 0.75)


def test_time_left_is_judged_by_what_was_done_and_never_grows(queue, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("pages.shared.jobs.time.monotonic", lambda: now[0])
    left = []

    def work(report):
        for stage, done in (("Load", 2), ("Work", 0), ("Work", 1), ("Work", 2)):
            report(stage, done, 4)
            now[0] += 3
            left.append(job.seconds_left)
            now[0] += 3
            left.append(job.seconds_left)

    gate = threading.Event()
    job = queue.submit("Job", lambda report: (gate.wait(WAIT), work(report)))
    gate.set()
    finished(job)
    # A stage that starts at 2 of 4 has done nothing yet; then 3 pieces, each of 6 seconds.
    assert left == [None, None, None, None, 15, 12, 9, 6]


def test_what_the_user_can_mend_is_said_as_it_is(queue):
    def work(report):
        raise TransActError("Mend this.")

    job = finished(queue.submit("Fail", work))
    assert (job.state, job.error) == (FAILED, "Mend this.")


def test_an_unforeseen_error_does_not_stop_the_queue(queue):
    broken = queue.submit("Break", lambda report: 1 / 0)
    assert finished(queue.submit("Go on", lambda report: 1)).state == DONE
    assert "ZeroDivisionError" in broken.error


def test_jobs_run_one_after_the_other_and_know_their_place(queue):
    gate, order = threading.Event(), []

    def first(report):
        gate.wait(WAIT)
        order.append("first")

    one = queue.submit("First", first)
    two = queue.submit("Second", lambda report: order.append("second"))
    assert queue.ahead_of(two) == [one]
    gate.set()
    finished(two)
    assert order == ["first", "second"]
    assert queue.ahead_of(one) == []


def test_a_running_job_stops_at_its_next_report(queue):
    started, gate = threading.Event(), threading.Event()

    def work(report):
        report("Working", 0, 2)
        started.set()
        gate.wait(WAIT)
        report("Working", 1, 2)
        pytest.fail("went on after the cancel")

    job = queue.submit("Work", work)
    started.wait(WAIT)
    job.cancel()
    assert job.stopping
    gate.set()
    assert finished(job).state == CANCELLED
    assert not job.stopping


def test_a_waiting_job_is_cancelled_at_once_and_never_runs(queue):
    gate, ran = threading.Event(), []
    blocking = queue.submit("Block", lambda report: gate.wait(WAIT))
    waiting = queue.submit("Wait", lambda report: ran.append(1))
    waiting.cancel()
    assert waiting.state == CANCELLED
    gate.set()
    finished(blocking)
    finished(queue.submit("Last", lambda report: None))
    assert ran == []
