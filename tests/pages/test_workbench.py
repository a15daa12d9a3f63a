import gc
import threading
from types import SimpleNamespace

import pytest
import torch
from streamlit.web.server.starlette.starlette_app_utils import generate_xsrf_token_string

from pages.shared import workbench as shared
from pages.shared.jobs import CANCELLED, DONE, FAILED
from pages.shared.workbench import Cut, Request, Visit, Workbench, visitor_id
from tests.conftest import bench_of, loaded_from, make_model
from tests.pages.conftest import ended
from transact_core.bench import Choices


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


def test_what_is_imported_is_not_looked_through_after_every_run_of_a_page():
    shared.workbench.clear()
    shared.workbench()
    assert len(gc.get_objects()) < 0.1 * gc.get_freeze_count()


# --- visitors --------------------------------------------------------------------------------


def with_cookies(monkeypatch, **cookies):
    context = SimpleNamespace(cookies=cookies)
    monkeypatch.setattr(shared, "st", SimpleNamespace(context=context))


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
    monkeypatch.setattr(shared, "VISITORS_KEPT", 3)
    busy = workbench.visitor("busy")
    busy.jobs.append(workbench.queue.submit("Wait", lambda report: workbench.gate.wait(10), busy))
    idle = workbench.visitor("idle")
    for number in range(5):
        workbench.visitor(f"visitor-{number}")
    assert workbench.visitor("busy") is busy
    assert workbench.visitor("idle") is not idle
    assert len(workbench._visitors) <= 4
    workbench.gate.set()


# --- memory ----------------------------------------------------------------------------------


@pytest.fixture
def small_memory(own_workbench, monkeypatch, tokenizer, windows, tmp_path):
    """A workbench with room for one model; which were loaded."""
    monkeypatch.setenv("TRANSACT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shared, "MODELS_KEPT", 1)
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

    monkeypatch.setattr(shared, "load_model", load)
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
    carry_out = shared.carry_out
    monkeypatch.setattr(shared, "carry_out", lambda *a: (made.append(1), carry_out(*a))[1])
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
    monkeypatch.setattr(shared, "compress", None)
    measured = ended(
        small_memory.queue.submit("Cut", lambda r: small_memory.measure(one, Cut(), r))
    )
    again = ended(
        small_memory.queue.submit("Model", lambda r: small_memory.model(one, measured.result, r))
    )
    assert made == [1]
    assert all(torch.equal(weights[name], each) for name, each in again.result.state_dict().items())
