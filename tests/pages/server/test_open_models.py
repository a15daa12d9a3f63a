import gc
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from streamlit.web.server.starlette.starlette_app_utils import generate_xsrf_token_string

from pages.server import open_models, points, visitors, visits
from pages.server.jobs import CANCELLED, DONE, FAILED
from pages.server.open_models import Workbench
from pages.server.points import add_point
from pages.server.request import Cut, Request
from pages.server.visitors import Visit, size_of
from pages.server.visits import visitor_id
from tests.conftest import bench_of, loaded_from, make_model
from tests.pages.conftest import ended
from transact_core.base.errors import silent
from transact_core.experiments.bench import Choices, compress
from transact_core.pruning.plan import Decision, PruningPlan


@pytest.fixture
def workbench(monkeypatch):
    """One whose bench is a stub that waits until it is let through."""
    threads = torch.get_num_threads()
    made = Workbench()
    made.gate, made.measured = threading.Event(), []

    class Bench:
        loaded = SimpleNamespace(released=False)

        def dense(self, report):
            made.measured.append(1)

    def open_bench(request, report):
        made.gate.wait(10)
        return Bench()

    monkeypatch.setattr(made, "_bench", open_bench)
    monkeypatch.setattr(open_models, "measured_pace", lambda bench, seconds: 1e9)
    yield made
    torch.set_num_threads(threads)


def wait_for(job):
    for _ in range(1000):
        if job.finished:
            return
        threading.Event().wait(0.01)
    pytest.fail("the job did not end")


def test_a_cancelled_dense_measurement_can_be_made_anew(workbench):
    opening = workbench.open(Request())
    opening.dense.cancel()
    workbench.gate.set()
    wait_for(opening.bench)
    assert (opening.dense.state, workbench.measured) == (CANCELLED, [])
    workbench.measure_dense(Request())
    wait_for(opening.dense)
    assert (opening.dense.state, workbench.measured) == (DONE, [1])
    assert workbench.open(Request()) is opening


def test_an_opened_bench_says_where_windows_are_longer_than_the_models_context(
    checkpoint, text_file, monkeypatch
):
    monkeypatch.setattr(open_models, "require_readable_source", lambda *_: None)
    text = str(text_file)
    request = Request(str(checkpoint), "cpu", "float32", text, text, 600, 600, 300)
    said = Workbench()._bench(request, silent).evaluation.notices
    assert "longer than the 256 that the model was trained" in said[0]


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
    busy = workbench.visitor("busy")
    busy.jobs.append(workbench.queue.submit("Wait", lambda report: workbench.gate.wait(10), busy))
    idle = workbench.visitor("idle")
    for number in range(5):
        workbench.visitor(f"visitor-{number}")
    assert workbench.visitor("busy") is busy
    assert workbench.visitor("idle") is not idle
    assert len(workbench._visitors) <= 4
    workbench.gate.set()


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
    busy.jobs.append(own_workbench.queue.submit("Wait", lambda report: gate.wait(10), busy))
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


def test_openings_that_nobody_looked_at_for_longest_are_closed(own_workbench, monkeypatch):
    monkeypatch.setattr(open_models, "BENCHES_KEPT", 2)
    gate = threading.Event()

    class Stub:
        loaded = SimpleNamespace(released=False)

        def dense(self, report):
            pass

    monkeypatch.setattr(own_workbench, "_bench", lambda *_: (gate.wait(10), Stub())[1])
    requests = [Request(evaluation_tokens=64 + number) for number in range(5)]
    openings = [own_workbench.open(each) for each in requests]
    # Those under way are waited for, and stay.
    assert [own_workbench.open(each) for each in requests] == openings
    gate.set()
    for each in openings:
        ended(each.dense)
    assert own_workbench.open(requests[0]) is openings[0]
    assert list(own_workbench._openings) == [requests[4], requests[0]]
    assert own_workbench.open(requests[1]) is not openings[1]


# --- memory ----------------------------------------------------------------------------------


@pytest.fixture
def small_memory(own_workbench, monkeypatch, tokenizer, windows, tmp_path):
    """A workbench with room for one model; which were loaded."""
    monkeypatch.setenv("TRANSACT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(open_models, "MODELS_KEPT", 1)
    models = {name: make_model(num_hidden_layers=layers) for name, layers in (("a", 2), ("b", 3))}
    own_workbench.loads = []

    def load(model, device, dtype, report):
        own_workbench.loads.append(model)
        return loaded_from(models[model], tokenizer)

    def open_bench(request, report):
        bench = bench_of(models[request.model], tokenizer, windows)
        bench.loaded = own_workbench._model(request, report)
        bench.prepare(Choices())
        return bench

    monkeypatch.setattr(open_models, "load_model", load)
    monkeypatch.setattr(own_workbench, "_bench", open_bench)
    own_workbench.tiny_models = models
    return own_workbench


def test_a_model_let_go_of_comes_back_for_a_job_and_its_bench_stays(small_memory):
    one, other = Request(model="a"), Request(model="b")
    ended(small_memory.open(one).dense)
    bench = small_memory.open(one).bench.result
    ended(small_memory.open(other).dense)
    assert bench.loaded.released
    assert len(small_memory._models) == 1
    assert bench.plan(0.5, 0.3, Choices()).intermediate_size == 28
    assert bench.dense().perplexity > 1
    assert bench.loaded.device.type == "cpu"
    job = small_memory.queue.submit("Cut", lambda report: small_memory.measure(one, Cut(), report))
    assert ended(job).error is None
    assert small_memory.loads == ["a", "b", "a"]
    assert not bench.loaded.released
    assert small_memory.open(other).bench.result.loaded.released
    assert small_memory.open(one).bench.result is bench


def test_a_model_goes_from_benches_that_were_closed_too(small_memory, monkeypatch):
    monkeypatch.setattr(open_models, "BENCHES_KEPT", 1)
    one, other = Request(model="a"), Request(model="b")
    ended(small_memory.open(one).dense)
    # A page that is still drawn holds on to it.
    bench = small_memory.open(one).bench.result
    ended(small_memory.open(other).dense)
    assert list(small_memory._openings) == [other]
    assert bench.loaded.released


def test_what_is_measured_in_the_background_keeps_its_model(small_memory):
    one, other = Request(model="a"), Request(model="b")
    ended(small_memory.open(one).dense)
    begun, others = threading.Event(), []
    job = small_memory.learn(one, Choices(granularity="head-dims"))
    really = job.give_way

    def give_way():
        if not others:
            others.append(small_memory.open(other).dense)
        really()
        begun.set()

    job.give_way = give_way
    assert begun.wait(10)
    assert ended(job).error is None
    assert ended(others[0]).error is None
    assert small_memory.loads == ["a", "b"]
    assert small_memory.open(one).bench.result.damage_known(Choices(granularity="head-dims"))
    # Then it is let go of like any other.
    third = Request(model="b", dtype="float32")
    ended(small_memory.open(third).dense)
    assert len(small_memory._models) == 1


def test_weights_that_changed_meanwhile_are_not_taken_for_the_old_ones(small_memory):
    one = Request(model="a")
    ended(small_memory.open(one).dense)
    ended(small_memory.open(Request(model="b")).dense)
    small_memory.tiny_models["a"] = make_model(num_hidden_layers=2, initializer_range=0.1)
    job = ended(small_memory.queue.submit("Cut", lambda r: small_memory.measure(one, Cut(), r)))
    assert job.state == FAILED
    assert "have changed" in job.error
    # The next opening has the new ones.
    assert ended(small_memory.open(one).bench).state == DONE


def test_the_model_of_the_last_cut_serves_its_export(small_memory, monkeypatch):
    one = Request(model="a")
    ended(small_memory.open(one).dense)
    made = []
    carry_out = open_models.carry_out
    monkeypatch.setattr(open_models, "carry_out", lambda *a: (made.append(1), carry_out(*a))[1])
    measured = ended(
        small_memory.queue.submit("Cut", lambda r: small_memory.measure(one, Cut(), r))
    )
    first = ended(
        small_memory.queue.submit("Model", lambda r: small_memory.model(one, measured.result, r))
    )
    assert made == []
    weights = first.result.state_dict()
    # A cut that was kept is made again where its model is wanted, and not measured again.
    small_memory._last_cut = None
    monkeypatch.setattr(open_models, "compress", None)
    measured = ended(
        small_memory.queue.submit("Cut", lambda r: small_memory.measure(one, Cut(), r))
    )
    again = ended(
        small_memory.queue.submit("Model", lambda r: small_memory.model(one, measured.result, r))
    )
    assert made == [1]
    assert all(torch.equal(weights[name], each) for name, each in again.result.state_dict().items())


def test_a_model_is_timed_once_its_dense_losses_are_known(small_memory):
    request = Request(model="a")
    assert small_memory.pace(request) is None
    ended(small_memory.open(request).dense)
    measured = small_memory.pace(request)
    bench = small_memory.open(request).bench.result
    assert measured > 0
    assert small_memory.damage_seconds(request, bench) > 0
    # Kept losses take no time to speak of: a short pass is timed instead.
    reports = []
    timer = open_models.StageTimer(lambda *report: reports.append(report))
    bench.dense(timer)
    assert reports == []
    assert timer.seconds is None
    assert 0 < open_models.measured_pace(bench, timer.seconds) < 1e15


def test_unasked_work_in_the_background_is_left_where_it_would_take_long(small_memory):
    request = Request(model="a")
    ended(small_memory.open(request).dense)
    bench = small_memory.open(request).bench.result
    small_memory._paces[request.model_key] = 1.0
    assert ended(small_memory.learn(request, Choices(), unasked=True)).state == DONE
    assert not bench.damage_known(Choices())
    assert ended(small_memory.learn(request, Choices(), anew=True)).state == DONE
    assert bench.damage_known(Choices())
    # What is kept takes no time, however slow the model is.
    bench._measured = {}
    small_memory.open(request).damages.clear()
    assert ended(small_memory.learn(request, Choices(), unasked=True)).state == DONE
    assert bench.damage_known(Choices())
