"""Cuts and trainings by turns."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import KINDS, bench_of, make_model, same_weights, snapshot
from transact_core.base.errors import TransActError
from transact_core.base.generators import WithResult
from transact_core.cli import main
from transact_core.experiments.bench import Choices
from transact_core.experiments.iterative import Shot, prune_and_train, shares
from transact_core.export.compression import read_compression
from transact_core.pruning.surgery import prune
from transact_core.training import loop
from transact_core.training.loop import HeldOut, Settings


def test_the_plan_is_that_of_what_is_left_of_the_dense_model(tokenizer, windows, tmp_path):
    """At learning rate 0 and without repair, cutting by the plan at once gives the same model."""
    model = make_model(**KINDS["gqa"])
    before = snapshot(model)
    bench = bench_of(model, tokenizer, windows)
    choices = Choices(steps=3, recovery="none")
    settings = Settings(tokens=6 * 64, windows_per_step=2, learning_rate=0.0)
    steps = WithResult(
        prune_and_train(
            bench, 0.5, 0.5, choices, windows[0], [HeldOut("a", windows[1])], settings, tmp_path
        )
    )
    shots = [told for told in steps if isinstance(told, Shot)]
    trained, plan = steps.result
    assert [shot.step.intermediate_size for shot in shots] == [34, 27, 20]
    assert same_weights(bench.loaded.model, before)
    at_once = prune(bench.loaded.model, plan)
    ids = windows[1].ids[:1]
    assert torch.equal(at_once(ids).logits, trained(ids).logits)


def test_the_command_records_every_step(checkpoint, text_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loop, "EVALUATIONS", 1)
    output = tmp_path / "out"
    arguments = ["prune", "--model", str(checkpoint), "--output", str(output)]
    arguments += ["--mha-ratio", "0.5", "--mlp-ratio", "0.5", "--steps", "2"]
    arguments += ["--calibration", str(text_file), "--calibration-tokens", "512"]
    arguments += ["--evaluation", str(text_file), "--evaluation-tokens", "128"]
    arguments += ["--tune-tokens", "1024", "--tune-text", str(text_file)]
    assert main([*arguments, "--sequence-length", "32"]) == 0
    compression = read_compression(output / "compression.json")
    assert [step.intermediate_size for step in compression.earlier_steps] == [30, 20]
    assert [step.trained_tokens for step in compression.earlier_steps] == [512, 512]
    first, second = compression.trainings
    assert (first.shot, second.shot) == (1, 2)
    assert first.learning_rate == pytest.approx(second.learning_rate / 2)
    assert AutoModelForCausalLM.from_pretrained(output).config.intermediate_size == 20
    report = json.loads((output / "report.json").read_text())
    assert report["pruned"]["perplexity"] == pytest.approx(second_perplexity(compression), rel=1e-3)
    assert not (tmp_path / "out.training").exists()
    assert "after training on 512 tokens" in capsys.readouterr().err


def second_perplexity(compression):
    return compression.earlier_steps[-1].perplexity


def test_windows_are_split_and_none_is_in_two(windows):
    parts = shares(windows[0], 3)
    assert torch.equal(torch.cat([part.ids for part in parts]), windows[0].ids)
    with pytest.raises(TransActError, match="fewer than the"):
        shares(windows[0], 10_000)


@pytest.mark.parametrize(
    "changes",
    [
        {"granularity": "head-dims"},
        {"granularity": "auto"},
        {"sequential": True, "importance": "reconstruction"},
    ],
)
def test_choices_that_cannot_be_trained_between_are_refused(gqa_bench, windows, tmp_path, changes):
    steps = prune_and_train(
        gqa_bench, 0.5, 0.5, Choices(**changes), windows[0], [], Settings(), tmp_path
    )
    with pytest.raises(TransActError, match="Training between steps"):
        next(steps)
