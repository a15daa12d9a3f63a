import gc
import pickle
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from streamlit.web.server.starlette.starlette_app_utils import generate_xsrf_token_string

from pages.server import open_models, points, visitors, visits
from pages.server.jobs import CANCELLED, DONE
from pages.server.open_models import Workbench
from pages.server.points import add_point
from pages.server.request import Cut, Request
from pages.server.settings import settings
from pages.server.visitors import Visit, size_of
from pages.server.visits import visitor_id
from tests.pages.conftest import ended, exchange
from transact_core.base.errors import TransActError
from transact_core.experiments.bench import Choices, compress
from transact_core.models.load import ReleasedTokenizer
from transact_core.pruning.plan import Decision, PruningPlan
from transact_core.workers import tasks, work
from transact_core.workers.tasks import Outcome


class Stub:
    """A worker that opens nothing: it waits until it is let through, and notes what it was asked."""

    def __init__(self) -> None:
        self.gate, self.asked = threading.Event(), []

    def run(self, task, report, received):
        self.asked.append(task.function.partition(":")[2])
        self.gate.wait(10)
        return Outcome(tasks.DONE, 1e9)

    def stop(self) -> None:
        pass


@pytest.fixture
def worker():
    return Stub()


@pytest.fixture
def workbench(worker):
    """One whose worker is a stub."""
    threads = torch.get_num_threads()
    yield Workbench(lambda: worker)
    torch.set_num_threads(threads)


def wait_for(job):
    for _ in range(1000):
        if job.finished:
            return
        threading.Event().wait(0.01)
    pytest.fail("the job did not end")


def test_a_cancelled_dense_measurement_can_be_made_anew(workbench, worker):
    opening = workbench.open(Request())
    opening.dense.cancel()
    worker.gate.set()
    wait_for(opening.bench)
    assert (opening.dense.state, worker.asked) == (CANCELLED, ["open_bench"])
    workbench.measure_dense(Request())
    wait_for(opening.dense)
    assert (opening.dense.state, worker.asked) == (DONE, ["open_bench", "measure_dense"])
    assert workbench.pace(Request()) == 1e9
    assert workbench.open(Request()) is opening


def test_each_device_has_a_lane_of_its_own(monkeypatch):
    made = []
    monkeypatch.setattr(open_models, "resolve_device", lambda: torch.device("cuda"))
    workbench = Workbench(lambda: made.append(Stub()) or made[-1])
    lanes = [workbench.lane(Request(device=name)) for name in ("auto", "cuda:0", "cuda:1", "cpu")]
    assert lanes[0] is lanes[1]
    assert len(made) == 3
    second, third = (workbench.open(Request(device=name)) for name in ("cuda:1", "cpu"))
    # Neither waits for the other.
    assert second.bench.queue.ahead_of(second.bench) == []
    assert third.bench.queue.ahead_of(third.bench) == []
    for each in made:
        each.gate.set()
    for opening in (second, third):
        wait_for(opening.dense)


def test_what_is_imported_is_not_looked_through_after_every_run_of_a_page():
    open_models.workbench.clear()
    open_models.workbench()
    assert len(gc.get_objects()) < 0.1 * gc.get_freeze_count()


# --- visitors --------------------------------------------------------------------------------


def with_cookies(monkeypatch, **cookies):
    context = SimpleNamespace(cookies=cookies)
    monkeypatch.setattr(visits, "st", SimpleNamespace(context=context))


def test_a_browser_is_known_by_its_token_however_that_is_masked(monkeypatch):
    names = []
    for token in (bytes(range(16)), bytes(range(16)), bytes(range(1, 17))):
        with_cookies(monkeypatch, _streamlit_xsrf=generate_xsrf_token_string(token))
        names.append(visitor_id())
        assert token.hex() not in names[-1]
    assert names[0] == names[1] != names[2]


@pytest.mark.parametrize(
    "value", [None, "", "2|", "2|||", "2|abcd|zz|1", "2|abcd|abcd|1", "1|2|3|4|5", "é|é|é|é"]
)
def test_without_a_cookie_that_tells_nobody_is_known(monkeypatch, value):
    with_cookies(monkeypatch, **({} if value is None else {"_streamlit_xsrf": value}))
    assert visitor_id() is None


def test_tabs_of_a_visitor_share_points_and_jobs_and_begin_where_the_last_was(workbench):
    first = Visit(workbench.visitor("one"))
    first.request, first.cut = Request(evaluation_tokens=64), Cut(mha_ratio=0.5)
    second = Visit(workbench.visitor("one"))
    assert second.visitor is first.visitor
    assert (second.request, second.cut) == (first.request, first.cut)
    second.cut = Cut(mha_ratio=0.1)
    assert first.cut == Cut(mha_ratio=0.5)
    stranger = Visit(workbench.visitor("another"))
    assert stranger.visitor is not first.visitor
    assert stranger.cut == Cut()
    assert workbench.visitor(None) is not workbench.visitor(None)


def test_only_the_last_visitors_and_those_with_work_are_kept(workbench, monkeypatch):
    monkeypatch.setattr(open_models, "VISITORS_KEPT", 3)
    gate = threading.Event()
    busy = workbench.visitor("busy")
    busy.jobs.append(
        workbench.lane(Request()).queue.submit("Wait", lambda report: gate.wait(10), busy)
    )
    idle = workbench.visitor("idle")
    for number in range(5):
        workbench.visitor(f"visitor-{number}")
    assert workbench.visitor("busy") is busy
    assert workbench.visitor("idle") is not idle
    assert len(workbench._visitors) <= 4
    gate.set()


def different(point, points: int):
    """As many points, of different cuts."""
    plans = [point.plan.model_copy(update={"importance": str(n)}) for n in range(points)]
    return [replace(point, decision=Decision(plan)) for plan in plans]


@pytest.fixture
def point(gqa_bench):
    return compress(gqa_bench, gqa_bench.plan(0.5, 0.3, Choices()), "none")[1]


def test_what_was_looked_at_longest_ago_goes_first(own_workbench, monkeypatch, point):
    monkeypatch.setattr(open_models, "HELD_BYTES", 10 * size_of(point))
    looked = iter(range(100))
    monkeypatch.setattr(visitors.time, "monotonic", lambda: next(looked))
    small, large = Request(), Request(evaluation_tokens=64)
    busy, early, late = (own_workbench.visitor(name) for name in ("busy", "early", None))
    gate = threading.Event()
    busy.jobs.append(
        own_workbench.only_lane.queue.submit("Wait", lambda report: gate.wait(10), busy)
    )
    for visitor, request in ((busy, small), (early, small), (early, large), (late, small)):
        for each in different(point, 3):
            add_point(visitor.of(request).points, each)
    # Twelve points and room for ten: what the busy one has was first, and stays.
    assert len(busy.holdings[small].points) == 3
    assert small not in early.holdings
    assert len(early.holdings[large].points) == len(late.holdings[small].points) == 3
    early.of(large)
    for each in different(point, 11):
        add_point(late.of(large).points, each)
    assert early.holdings == {}
    assert list(late.holdings) == [large]
    # However large it is, what is looked at stays.
    assert len(late.of(large).points) == 11
    gate.set()


def test_a_visitor_has_the_last_points_of_many(own_workbench, monkeypatch, point):
    monkeypatch.setattr(points, "POINTS_KEPT", 4)
    known = []
    for each in different(point, 6):
        add_point(known, each)
    assert [each.plan.importance for each in known] == ["2", "3", "4", "5"]


def test_points_let_go_of_come_back_from_the_disk(opened, open_page, monkeypatch):
    mine = Visit(opened.visitor("mine"))
    page = open_page("compress", mine)
    measure = next(each for each in page.button if each.label.startswith("Prune and measure"))
    measure.click().run()
    (job,) = mine.visitor.jobs
    assert ended(job).error is None
    monkeypatch.setattr(open_models, "HELD_BYTES", 0)
    opened.visitor("other").of(Request())
    opened.make_room()
    assert mine.visitor.holdings == {}
    page = open_page("compress", mine)
    measure = next(each for each in page.button if each.label.startswith("Prune and measure"))
    measure.click().run()
    assert mine.visitor.jobs == [job]
    assert mine.visitor.of(Request()).points[0].perplexity == job.result.perplexity


def test_sizes_are_about_right(point):
    def deep(thing, seen) -> int:
        if id(thing) in seen:
            return 0
        seen.add(id(thing))
        parts = []
        if isinstance(thing, dict):
            parts = thing.values()
        elif isinstance(thing, list | tuple):
            parts = thing
        elif hasattr(thing, "__dict__") and not isinstance(thing, torch.Tensor | type):
            parts = vars(thing).values()
        large = getattr(thing, "nbytes", 0)
        return sys.getsizeof(thing) + large + sum(deep(each, seen) for each in parts)

    kept = tuple(range(1000, 9000))
    layers = tuple(each.model_copy(update={"kept_channels": kept}) for each in point.plan.layers)
    layers = PruningPlan.model_validate_json(
        point.plan.model_copy(update={"layers": layers}).model_dump_json()
    ).layers
    large = replace(point, decision=Decision(point.plan.model_copy(update={"layers": layers})))
    assert size_of([large, large]) == 2 * size_of(large)
    assert deep(large, set()) / 2 < size_of(large) < deep(large, set()) * 2


def test_openings_that_nobody_looked_at_for_longest_are_closed(workbench, worker, monkeypatch):
    monkeypatch.setattr(open_models, "BENCHES_KEPT", 2)
    requests = [Request(evaluation_tokens=64 + number) for number in range(5)]
    openings = [workbench.open(each) for each in requests]
    # Those under way are waited for, and stay.
    assert [workbench.open(each) for each in requests] == openings
    worker.gate.set()
    for each in openings:
        ended(each.dense)
    assert workbench.open(requests[0]) is openings[0]
    assert list(workbench._openings) == [requests[4], requests[0]]
    assert workbench.open(requests[1]) is not openings[1]


# --- what the worker measures ----------------------------------------------------------------


@pytest.fixture
def tiny(own_workbench, checkpoint, text_file, monkeypatch, tmp_path):
    """A workbench and a request for the tiny checkpoint, which is opened."""
    monkeypatch.setenv("TRANSACT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(open_models, "require_readable_source", lambda *_: None)
    monkeypatch.setattr(open_models, "require_readable_text", lambda *_: None)
    text = str(text_file)
    request = Request(str(checkpoint), "cpu", "float32", text, text, 512, 512, 64)
    assert ended(own_workbench.open(request).dense).error is None
    return own_workbench, request


def test_an_opened_bench_says_where_windows_are_longer_than_the_models_context(
    own_workbench, checkpoint, text_file, monkeypatch, tmp_path
):
    monkeypatch.setenv("TRANSACT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(open_models, "require_readable_source", lambda *_: None)
    monkeypatch.setattr(open_models, "require_readable_text", lambda *_: None)
    text = str(text_file)
    request = Request(str(checkpoint), "cpu", "float32", text, text, 600, 600, 300)
    bench = ended(own_workbench.open(request).bench).result
    assert "longer than the 256 that the model was trained" in bench.evaluation.notices[0]


def test_the_server_holds_what_was_measured_and_neither_weights_nor_tokenizer(tiny):
    workbench, request = tiny
    bench = workbench.open(request).bench.result
    assert bench.loaded.released
    assert isinstance(bench.loaded.tokenizer, ReleasedTokenizer)
    theirs = workbench.only_lane.worker.models._benches[request.bench_spec]
    assert not theirs.loaded.released
    assert bench.identity == theirs.identity
    assert bench.dense().perplexity == theirs.dense().perplexity
    assert bench.dense_footprint == theirs.dense_footprint
    choices = Choices(importance="magnitude")
    assert not bench.prepared(choices)
    assert ended(workbench.prepare(request, choices)).error is None
    assert bench.plan(0.5, 0.3, choices) == theirs.plan(0.5, 0.3, choices)
    assert len(pickle.dumps(bench)) < 1_000_000


def test_what_a_failed_task_measured_is_kept(tiny, monkeypatch):
    workbench, request = tiny
    bench = workbench.open(request).bench.result

    def failing(models, report, spec):
        models.bench(spec, report).scores("magnitude")
        raise TransActError("Mend this.")

    monkeypatch.setattr(work, "failing", failing, raising=False)
    failing.__module__, failing.__qualname__ = work.__name__, "failing"
    job = ended(
        workbench.only_lane.queue.submit("Fail", lambda r: workbench.run(request, failing, r))
    )
    assert job.error == "Mend this."
    assert bench.prepared(Choices(importance="magnitude"))


def test_weights_that_changed_meanwhile_are_not_taken_for_the_old_ones(tiny):
    workbench, request = tiny
    opening = workbench.open(request)
    workbench.only_lane.worker.models._closed.add(request.bench_spec)
    ended(workbench.prepare(request, Choices(importance="magnitude")))
    assert workbench.open(request) is not opening


def test_a_model_is_timed_once_its_dense_losses_are_known(tiny):
    workbench, request = tiny
    assert workbench.pace(request) > 0
    assert workbench.damage_seconds(request, workbench.open(request).bench.result) > 0
    assert workbench.pace(Request()) is None


def test_unasked_work_is_left_where_the_server_allows_none(tiny, monkeypatch):
    workbench, request = tiny
    none = replace(settings(), unasked_seconds=0)
    exchange(monkeypatch, "settings", lambda: none)
    assert ended(workbench.learn(request, Choices(), unasked=True)).state == DONE
    assert not workbench.open(request).bench.result.damage_known(Choices())


def test_unasked_work_in_the_background_is_left_where_it_would_take_long(tiny):
    workbench, request = tiny
    bench = workbench.open(request).bench.result
    workbench._paces[request.model_key] = 1.0
    assert ended(workbench.learn(request, Choices(), unasked=True)).state == DONE
    assert not bench.damage_known(Choices())
    assert ended(workbench.learn(request, Choices(), anew=True)).state == DONE
    assert bench.damage_known(Choices())
    # What is kept takes no time, however slow the model is.
    for each in (bench, workbench.only_lane.worker.models._benches[request.bench_spec]):
        each._measured = {}
    workbench.open(request).damages.clear()
    assert ended(workbench.learn(request, Choices(), unasked=True)).state == DONE
    assert bench.damage_known(Choices())
