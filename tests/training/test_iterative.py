"""Cuts and trainings by turns."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import KINDS, bench_of, make_model, same_weights, snapshot
from transact_core.base.errors import TransActError
from transact_core.base.generators import WithResult
from transact_core.cli import main
from transact_core.experiments.bench import Choices
from transact_core.experiments.iterative import Shot, prune_and_train, shares
from transact_core.experiments.kept_shots import KeptShots
from transact_core.export import iterative
from transact_core.export.compression import read_compression
from transact_core.export.tune import work_folder
from transact_core.pruning.surgery import prune
from transact_core.training import loop
from transact_core.training.loop import HeldOut, Settings
from transact_core.training.state import Work


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


def arguments_of(checkpoint, text_file, output) -> list[str]:
    """Two steps of four windows each."""
    arguments = ["prune", "--model", str(checkpoint), "--output", str(output)]
    arguments += ["--mha-ratio", "0.5", "--mlp-ratio", "0.5", "--steps", "2"]
    arguments += ["--calibration", str(text_file), "--calibration-tokens", "512"]
    arguments += ["--evaluation", str(text_file), "--evaluation-tokens", "128"]
    arguments += ["--tune-tokens", "1024", "--tune-text", str(text_file)]
    return [*arguments, "--sequence-length", "32"]


@pytest.mark.usefixtures("short_texts")
def test_the_command_records_every_step_and_can_write_later(
    checkpoint, text_file, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(loop, "EVALUATIONS", 1)
    output = tmp_path / "out"
    arguments = arguments_of(checkpoint, text_file, output)

    def fail(*_):
        raise TransActError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(iterative, "write_checkpoint", fail)
        assert main(arguments) == 2
    kept = work_folder(output)
    # The weights of the first step are needed no longer.
    assert [path.parent.name for path in kept.glob("*/*.safetensors")] == ["shot-2"]
    weights = load_file(kept / "shot-2" / "model.safetensors")
    with monkeypatch.context() as patched:
        patched.setattr(loop, "take_step", fail)
        assert main([*arguments, "--resume"]) == 0
    written = load_file(output / "model.safetensors")
    assert all(
        torch.equal(written[name], weights[name].to(written[name].dtype)) for name in written
    )
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


class Killed(BaseException):
    """Nothing catches it, as nothing catches a signal."""


@pytest.mark.usefixtures("short_texts")
def test_killed_it_goes_on_with_the_same_bits(checkpoint, text_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loop, "EVALUATIONS", 2)
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    output, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    arguments = arguments_of(checkpoint, text_file, output)
    trained, take = [], loop.take_step

    def killed(*rest):
        if trained == [0, 1, 2, 3, 0, 1, 2]:
            raise Killed
        trained.append(rest[-1])
        return take(*rest)

    monkeypatch.setattr(loop, "take_step", killed)
    with pytest.raises(Killed):
        main(arguments)
    assert not output.exists()
    kept = work_folder(output)
    assert (kept / "shot-1" / "model.safetensors").exists()
    assert Work(kept / "step-2").standing()["step"] == 3
    assert not (kept / "step-1").exists()
    assert main(arguments) == 2
    assert "go on with --resume" in capsys.readouterr().err
    with pytest.raises(TransActError, match="another model, other texts or other settings"):
        KeptShots(kept, {"bench": "another"})
    without = arguments[: arguments.index("--tune-tokens")]
    assert main([*without, "--resume"]) == 2
    assert "--resume goes on with --tune-tokens" in capsys.readouterr().err

    trained.clear()

    def noted(*rest):
        trained.append(rest[-1])
        return take(*rest)

    monkeypatch.setattr(loop, "take_step", noted)
    assert main([*arguments, "--resume"]) == 0
    assert trained == [3]
    assert not kept.exists()
    assert main(arguments_of(checkpoint, text_file, undisturbed)) == 0
    assert trained == [3, *2 * [0, 1, 2, 3]]
    for name in ("model.safetensors", "config.json", "report.json"):
        assert (output / name).read_bytes() == (undisturbed / name).read_bytes()
    one, two = (read_compression(folder / "compression.json") for folder in (output, undisturbed))
    assert one.plan == two.plan
    assert one.earlier_steps == two.earlier_steps
    for mine, others in zip(one.trainings, two.trainings, strict=True):
        assert mine.model_copy(update={"seconds": others.seconds}) == others


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
