import gc
import threading
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pages.server.jobs import CANCELLED, DONE, FAILED, JobQueue
from pages.server.visitors import Visitor
from transact_core.base.errors import TransActError

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
    monkeypatch.setattr("pages.server.jobs.time.monotonic", lambda: now[0])
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


class Panic(BaseException):
    """As the tokenizers' panics are: no `Exception`."""


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


@pytest.mark.parametrize(
    "error", [Panic("bounds"), SystemExit(1), KeyboardInterrupt(), Unspeakable()]
)
@pytest.mark.parametrize("background", [True, False])
def test_nothing_that_a_job_raises_stops_the_queue(queue, error, background):
    def work(report):
        raise error

    broken = queue.submit("Break", work, background=background)
    assert finished(queue.submit("Go on", lambda report: 1)).state == DONE
    assert finished(broken).state == FAILED
    assert type(error).__name__ in broken.error
    assert queue.ahead_of(broken) == []


def test_a_panic_between_two_pieces_does_not_stop_the_queue(queue):
    def curve(report):
        yield 1, 3
        raise Panic("bounds")

    broken = queue.submit("Curve", curve)
    assert finished(broken).state == FAILED
    assert (broken.pieces_done, broken.error) == (
        1,
        "Something unforeseen went wrong (Panic: bounds).",
    )
    assert finished(queue.submit("Go on", lambda report: 1)).state == DONE


def test_a_panic_in_the_midst_of_the_background_leaves_it_alone(queue):
    begun, go_on = threading.Event(), threading.Event()

    def background(report):
        begun.set()
        go_on.wait(5)
        report("Measuring", 0, 1)
        return "whole"

    def panicking(report):
        raise Panic("bounds")

    slow = queue.submit("Background", background, background=True)
    begun.wait(5)
    broken = queue.submit("Break", panicking)
    go_on.set()
    assert (finished(slow).result, broken.state) == ("whole", FAILED)


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


class Owner:
    """Somebody whose turns are counted."""


def in_pieces(order: list[str], name: str, pieces: int):
    """Work that notes each of its pieces."""

    def work(report):
        for number in range(1, pieces + 1):
            order.append(name)
            if number < pieces:
                yield number, pieces
        return name

    return work


@pytest.fixture
def held(queue):
    """A queue that waits until it is let through, so that an order can be looked at; the gate."""
    return hold(queue)


def hold(queue: JobQueue) -> threading.Event:
    started, gate = threading.Event(), threading.Event()
    queue.submit("Gate", lambda report: (started.set(), gate.wait(WAIT)))
    started.wait(WAIT)
    return gate


def test_turns_go_round_among_owners_and_among_the_jobs_of_one(queue, held):
    one, other, order = Owner(), Owner(), []
    jobs = [
        queue.submit("Curve", in_pieces(order, "curve", 3), one),
        queue.submit("Cut", in_pieces(order, "cut", 1), one),
        queue.submit("Other", in_pieces(order, "other", 3), other),
        queue.submit("Opening", in_pieces(order, "opening", 1), urgent=True),
    ]
    held.set()
    for job in jobs:
        finished(job)
    assert order == ["opening", "curve", "other", "cut", "other", "curve", "other", "curve"]


def test_what_is_urgent_goes_before_the_next_piece(queue):
    order, started, gate = [], threading.Event(), threading.Event()

    def curve(report):
        order.append("piece")
        started.set()
        gate.wait(WAIT)
        yield 1, 2
        order.append("piece")

    job = queue.submit("Curve", curve, Owner())
    started.wait(WAIT)
    queue.submit("Opening", lambda report: order.append("opening"), urgent=True)
    gate.set()
    finished(job)
    assert order == ["piece", "opening", "piece"]


urgent_or_in_pieces = st.one_of(st.just((1, True)), st.tuples(st.integers(1, 3), st.just(False)))


@given(st.lists(st.tuples(st.integers(0, 2), urgent_or_in_pieces), min_size=1, max_size=6))
def test_what_is_said_to_be_ahead_is_what_goes_ahead(asked):
    queue, order = JobQueue(), []
    gate = hold(queue)
    owners = [Owner() for _ in range(3)]
    jobs = [
        queue.submit(str(n), in_pieces(order, str(n), pieces), owners[owner], urgent)
        for n, (owner, (pieces, urgent)) in enumerate(asked)
    ]
    ahead = [[each.title for each in queue.ahead_of(job)] for job in jobs]
    gate.set()
    for job in jobs:
        assert job.wait(WAIT)
    for job, told in zip(jobs, ahead, strict=True):
        before = order[: order.index(job.title)]
        assert told == ["Gate", *dict.fromkeys(before)]


def test_a_job_between_two_pieces_is_cancelled_at_once_and_holds_nothing(queue):
    class Model:
        """Something large."""

    made, gate, second = [], threading.Event(), threading.Event()

    def curve(report):
        model = Model()
        made.append(weakref.ref(model))
        yield 1, 2
        del model
        pytest.fail("went on after the cancel")

    job = queue.submit("Curve", curve, Owner())
    blocking = queue.submit("Block", lambda report: (second.set(), gate.wait(WAIT)), Owner())
    second.wait(WAIT)
    assert (job.state, job.pieces_done) == ("queued", 1)
    job.cancel()
    assert job.state == CANCELLED
    gc.collect()
    assert made[0]() is None
    gate.set()
    finished(blocking)


def test_a_running_piece_that_does_not_report_is_the_last(queue):
    started, gate = threading.Event(), threading.Event()

    def curve(report):
        started.set()
        gate.wait(WAIT)
        yield 1, 2
        pytest.fail("went on after the cancel")

    job = queue.submit("Curve", curve)
    started.wait(WAIT)
    job.cancel()
    gate.set()
    assert finished(job).state == CANCELLED


def test_finished_jobs_hold_nothing_of_their_work(queue):
    class Model:
        """Something large."""

    model = Model()
    alive = weakref.ref(model)
    job = queue.submit("Work", lambda report, model=model: None)
    del model
    finished(job)
    finished(queue.submit("Next", lambda report: None))
    gc.collect()
    assert alive() is None


def test_time_left_is_judged_by_the_pieces_done(queue, monkeypatch):
    now, left = [100.0], []
    monkeypatch.setattr("pages.server.jobs.time.monotonic", lambda: now[0])

    def curve(report):
        yield 0, 4
        for number in range(1, 5):
            left.append(job.seconds_left)
            now[0] += 10
            left.append(job.seconds_left)
            yield number, 4

    gate = hold(queue)
    job = queue.submit("Curve", curve)
    gate.set()
    finished(job)
    assert left == [None, None, 30, 20, 20, 10, 10, 0]


def test_the_background_comes_last_and_gives_way_at_each_report(queue):
    order, begun, go_on = [], threading.Event(), threading.Event()

    def background(report):
        for number in range(3):
            begun.set()
            go_on.wait(5)
            report("Measuring", number, 3)
            order.append(f"background {number}")

    slow = queue.submit("Background", background, background=True)
    begun.wait(5)
    asked = queue.submit("Asked for", lambda report: order.append("asked for"))
    assert queue.ahead_of(asked) == []
    go_on.set()
    finished(slow)
    assert order == ["asked for", "background 0", "background 1", "background 2"]

    order.clear()
    gate = hold(queue)
    slow = queue.submit("Background", lambda report: order.append("background"), background=True)
    queue.submit("Asked for", lambda report: order.append("asked for"))
    gate.set()
    finished(slow)
    assert order == ["asked for", "background"]


def test_what_fails_in_the_midst_of_the_background_leaves_it_alone(queue):
    begun, go_on = threading.Event(), threading.Event()

    def background(report):
        begun.set()
        go_on.wait(5)
        report("Measuring", 0, 1)
        return "whole"

    def failing(report):
        raise TransActError("No.")

    slow = queue.submit("Background", background, background=True)
    begun.wait(5)
    other = queue.submit("Failing", failing)
    go_on.set()
    assert (finished(slow).result, other.error) == ("whole", "No.")


def test_stopping_ends_what_runs_and_what_waits(queue):
    begun = threading.Event()

    def endless(report):
        begun.set()
        while True:
            report("Going on", 0, 1)

    running = queue.submit("Endless", endless)
    waiting = queue.submit("Waiting", lambda report: None)
    begun.wait(5)
    assert queue.stop(5)
    assert (running.state, waiting.state) == (CANCELLED, CANCELLED)


def test_what_others_took_meanwhile_is_not_counted_as_time_left(queue, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("pages.server.jobs.time.monotonic", lambda: now[0])
    others, left = [], []

    def other(report):
        now[0] += 1000

    def background(report):
        for done in range(4):
            if done == 2:
                others.append(queue.submit("Asked for", other))
            report("Work", done, 4)
            left.append(job.seconds_left)
            now[0] += 6

    gate = threading.Event()
    job = queue.submit("Background", lambda r: (gate.wait(WAIT), background(r)), background=True)
    gate.set()
    finished(job)
    finished(others[0])
    assert left == [None, 18, 12, 6]


def test_a_running_job_learns_that_another_owner_waits(queue):
    gate, reached, found = threading.Event(), threading.Event(), []

    def work(report):
        reached.set()
        gate.wait(WAIT)
        found.append(queue.wanted_by_others(job))

    me, you = Visitor(), Visitor()
    job = queue.submit("Mine", work, owner=me)
    assert reached.wait(WAIT)
    queue.submit("Mine too", lambda report: None, owner=me)
    assert not queue.wanted_by_others(job)
    queue.submit("Another's", lambda report: None, owner=you)
    gate.set()
    finished(job)
    assert found == [True]
