"""A cut as a value: carried out here, in another process, or on a bench that is open already."""

import multiprocessing
import pickle
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from transact_core.base.errors import TransActError
from transact_core.data.windows import WindowSpec
from transact_core.experiments.bench import Choices, compress
from transact_core.experiments.cut_spec import (
    BenchSpec,
    CutSpec,
    carry_out_on,
    carry_out_spec,
    decide_spec,
    open_bench,
)


@pytest.fixture
def spec(checkpoint, text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("TRANSACT_CACHE", str(tmp_path / "cache"))
    windows = WindowSpec(str(text_file), str(text_file), 512, 128, 32)
    bench = BenchSpec(str(checkpoint), "cpu", "float32", windows, "bfloat16", seed=3)
    return CutSpec(bench, (0.34, 0.3), Choices("auto"), torch.get_num_threads())


def carried_out_elsewhere(pickled, answers):
    answers.put(pickle.dumps(carry_out_spec(pickle.loads(pickled))))


def test_another_process_measures_the_same(spec, tmp_path, monkeypatch):
    here = carry_out_spec(spec)
    # With a cache of its own, so that it measures.
    monkeypatch.setenv("TRANSACT_CACHE", str(tmp_path / "another"))
    # The new process would run the main module first, which streamlit sets to a page it has run.
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=carried_out_elsewhere, args=(pickle.dumps(spec), answers))
    process.start()
    there = pickle.loads(answers.get(timeout=120))
    process.join()
    assert (tmp_path / "another" / "results.sqlite").exists()
    assert there.evaluation.nll.equal(here.evaluation.nll)
    assert there.perplexity == here.perplexity
    # All but the time that it took.
    same = replace(there, seconds=here.seconds, evaluation=here.evaluation)
    assert same == here
    assert there.seconds != here.seconds


def test_a_specification_is_carried_out_as_a_bench_does_it(spec):
    measured = carry_out_spec(spec)
    bench = open_bench(spec.bench)
    assert (bench.save_dtype, bench.seed) == ("bfloat16", 3)
    again, made = carry_out_on(bench, spec), compress(bench, measured.plan, "least-squares")[1]
    assert again == replace(measured, evaluation=again.evaluation)
    assert made.perplexity == again.perplexity == measured.perplexity
    assert measured.decision.granularity_losses


def test_what_was_decided_is_not_decided_again(spec, monkeypatch):
    bench = open_bench(spec.bench)
    decision = decide_spec(bench, spec)
    monkeypatch.setattr("transact_core.experiments.cut_spec.decided", None)
    decided = CutSpec(spec.bench, decision, replace(spec.choices, recovery="none"))
    measured = carry_out_on(bench, decided)
    assert measured.decision == decision
    assert measured.recovery == "none"
    assert all(fit.is_bare for fit in measured.fits)


def test_the_threads_are_those_of_the_specification(spec, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    carry_out_spec(replace(spec, threads=7))
    carry_out_spec(replace(spec, threads=None))
    assert asked == [7]


def test_a_wrong_text_is_found_before_the_model_is_loaded(spec, monkeypatch):
    monkeypatch.setattr("transact_core.experiments.cut_spec.load_model", None)
    wrong = replace(spec.bench, windows=WindowSpec("no/such.txt"))
    with pytest.raises(TransActError, match="There is no text"):
        open_bench(wrong)


def test_a_bench_says_what_is_to_be_known_of_model_and_texts(spec):
    assert open_bench(spec.bench).notices == ()
    longer = replace(spec.bench.windows, sequence_length=300, evaluation_tokens=600)
    (notice,) = open_bench(replace(spec.bench, windows=longer)).notices[:1]
    assert "longer than the 256 that the model was trained" in notice
