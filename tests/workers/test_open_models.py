import pytest
import torch

from tests.conftest import bench_of, loaded_from, make_model
from transact_core.base.errors import TransActError, silent
from transact_core.experiments.bench import Choices
from transact_core.experiments.cut_spec import BenchSpec
from transact_core.forward.perplexity import token_losses
from transact_core.planning.duration import Feed, evaluation_flops
from transact_core.workers import open_models, work
from transact_core.workers.open_models import OpenModels
from transact_core.workers.tasks import Task, carry_out

ONE, OTHER = BenchSpec(model="a"), BenchSpec(model="b")


@pytest.fixture
def models(tokenizer, windows, monkeypatch, tmp_path):
    """With room for one model; which were loaded is in `loads`."""
    monkeypatch.setenv("TRANSACT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(open_models, "MODELS_KEPT", 1)
    made = OpenModels()
    made.loads = []
    made.tiny = {
        name: make_model(num_hidden_layers=layers) for name, layers in (("a", 2), ("b", 3))
    }

    def load(model, device, dtype, report, offload):
        made.loads.append(model)
        return loaded_from(made.tiny[model], tokenizer)

    def bench_with(loaded, *_):
        bench = bench_of(loaded.model, tokenizer, windows)
        bench.loaded = loaded
        return bench

    monkeypatch.setattr(open_models, "load_model", load)
    monkeypatch.setattr(open_models, "read_texts", lambda spec: None)
    monkeypatch.setattr(open_models, "bench_with", bench_with)
    return made


def run(models, function, *arguments):
    """The outcome of a task, carried out as a worker does."""
    task = Task(f"{function.__module__}:{function.__name__}", arguments)
    return carry_out(task, models, silent, lambda _: None)


def test_a_model_let_go_of_comes_back_for_a_task_and_its_bench_stays(models):
    assert run(models, work.measure_dense, ONE).result > 0
    bench = models._benches[ONE]
    run(models, work.open_bench, OTHER)
    assert bench.loaded.released
    assert len(models._models) == 1
    run(models, work.open_bench, ONE)
    assert bench.plan(0.5, 0.3, Choices()).intermediate_size == 28
    point = run(models, work.cut, ONE, (0.3, 0.3), Choices()).result
    assert point.perplexity > 1
    assert models.loads == ["a", "b", "a"]
    assert models._benches[ONE] is bench
    assert models._benches[OTHER].loaded.released


def test_a_task_under_way_keeps_its_model_while_others_run_in_its_midst(models):
    seen = []

    def report(stage, done, total):
        if not seen:
            seen.append(run(models, work.open_bench, OTHER).state)
            seen.append(models._benches[ONE].loaded.released)

    task = Task("transact_core.workers.work:prepare", (ONE, Choices(importance="reconstruction")))
    assert carry_out(task, models, report, lambda _: None).state == "done"
    assert seen == ["done", False]
    assert models.loads == ["a", "b"]
    # Then it is let go of like any other.
    run(models, work.open_bench, BenchSpec(model="b", dtype="float32"))
    assert len(models._models) == 1


def test_weights_that_changed_meanwhile_are_not_taken_for_the_old_ones(models):
    run(models, work.open_bench, ONE)
    run(models, work.open_bench, OTHER)
    models.tiny["a"] = make_model(num_hidden_layers=2, initializer_range=0.1)
    outcome = run(models, work.cut, ONE, (0.3, 0.3), Choices())
    assert outcome.state == "refused"
    assert "have changed" in outcome.words
    assert outcome.closed == {ONE}
    # The next opening has the new ones.
    assert run(models, work.open_bench, ONE).state == "done"


def test_benches_that_nobody_asked_for_longest_are_closed(models, monkeypatch):
    monkeypatch.setattr(open_models, "BENCHES_KEPT", 2)
    specs = [BenchSpec(model="a", seed=seed) for seed in range(3)]
    for spec in (*specs[:2], specs[0], specs[2]):
        run(models, work.open_bench, spec)
    assert list(models._benches) == [specs[0], specs[2]]


def test_the_model_of_the_last_cut_serves_its_export(models, monkeypatch):
    made = []
    carry_out_cut = open_models.carry_out
    monkeypatch.setattr(open_models, "carry_out", lambda *a: (made.append(1), carry_out_cut(*a))[1])
    point = run(models, work.cut, ONE, (0.3, 0.3), Choices()).result
    weights = models.pruned(ONE, point, silent).state_dict()
    assert made == []
    # A cut that was kept is made again where its model is wanted, and not measured again.
    models.let_go()
    monkeypatch.setattr(work, "compress", None)
    assert run(models, work.cut, ONE, (0.3, 0.3), Choices()).result.perplexity == point.perplexity
    again = models.pruned(ONE, point, silent).state_dict()
    assert made == [1]
    assert all(torch.equal(weights[name], each) for name, each in again.items())


def test_what_a_task_measured_is_told_once(models):
    first = run(models, work.open_bench, ONE)
    assert set(first.learned) == {ONE}
    assert "activation" in first.learned[ONE].scores
    assert run(models, work.open_bench, ONE).learned == {}
    second = run(models, work.prepare, ONE, Choices(importance="magnitude"))
    assert list(second.learned[ONE].scores) == ["magnitude"]
    assert second.learned[ONE].dense == {}


def test_a_model_whose_losses_are_kept_is_timed_by_a_short_pass(models):
    bench = models.bench(ONE, silent)
    bench.dense()
    reports = []
    timer = work.StageTimer(lambda *report: reports.append(report))
    bench.dense(timer)
    assert reports == []
    assert timer.seconds is None
    assert 0 < work.measured_pace(bench, timer.seconds) < 1e15
    shape, windows = bench.loaded.architecture, bench.evaluation
    flops = evaluation_flops(shape, Feed(windows.tokens, windows.sequence_length))
    assert work.measured_pace(bench, 2.0) == flops / 2


def test_attention_comes_with_the_text_of_its_tokens(models):
    labels, attention = run(models, work.attend, ONE, "A while loop repeats.", 8, 1).result
    bench = models.bench(ONE, silent)
    ids = bench.loaded.tokenizer("A while loop repeats.")["input_ids"][:8]
    assert labels == [bench.loaded.tokenizer.decode([each]) for each in ids]
    assert attention.shape[1:] == (len(ids), len(ids))
    assert attention.sum(-1).allclose(torch.ones(attention.shape[:2]))


def test_a_prompt_is_refused_before_anything_is_made(models):
    outcome = run(models, work.read_prompt, ONE, " ", False)
    assert outcome.words == "The prompt is empty; write something to go on from."
    with pytest.raises(TransActError, match="shorten it"):
        work.read_prompt(models, silent, ONE, "word " * 300, False)
    prompt = run(models, work.read_prompt, ONE, "A loop", False).result
    assert token_losses(models.bench(ONE, silent).loaded.model, torch.tensor(prompt.ids)).numel()
