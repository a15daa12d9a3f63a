"""`tune` from folder to folder, on a tiny model: never worse, resumed, refused in one sentence."""

import importlib.util
import json
import math
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import KINDS, make_model, same_weights, snapshot
from transact_core.base.errors import Cancelled, TransActError
from transact_core.base.generators import WithResult
from transact_core.cli import main
from transact_core.data.corpus import read_corpus
from transact_core.experiments.cut_spec import BenchSpec
from transact_core.export.compression import read_compression
from transact_core.export.tune import TuneSpec, read_trained, tune, work_folder
from transact_core.models.checkpoint_folder import read_checkpoint
from transact_core.models.load import load_model
from transact_core.training import loop, memory, state
from transact_core.training.loop import HeldOut, Pace, Settings, train
from transact_core.training.state import Work
from transact_core.training.student import make_student
from transact_core.training.teacher import LiveTeacher
from transact_core.workers.tasks import Inline, Task

ROOT = Path(__file__).parents[2]
LORA = pytest.param(
    "lora", marks=pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")
)


def ended(training) -> tuple[list, object]:
    """What a generator yields, and what it returns."""
    steps = WithResult(training)
    return list(steps), steps.result


@pytest.fixture(scope="module")
def cut(tokenizer, tmp_path_factory) -> Path:
    """An output folder of `prune`, its dense model and its text beside it."""
    folder = tmp_path_factory.mktemp("tune")
    make_model(**KINDS["gqa-tied"]).save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    (folder / "text.txt").write_text(read_corpus("builtin").text[:60_000])
    text = str(folder / "text.txt")
    arguments = ["prune", "--model", str(folder / "dense"), "--output", str(folder / "cut")]
    arguments += ["--mha-ratio", "0.33", "--mlp-ratio", "0.5", "--sequence-length", "32"]
    arguments += ["--calibration", text, "--calibration-tokens", "512"]
    arguments += ["--evaluation", text, "--evaluation-tokens", "256"]
    assert main(arguments) == 0
    return folder / "cut"


@pytest.fixture
def spec(cut, tmp_path, short_texts) -> TuneSpec:
    return TuneSpec(
        model=str(cut),
        output=tmp_path / "trained",
        text=str(cut.parent / "text.txt"),
        held_out_tokens=128,
        sequence_length=32,
        settings=Settings(tokens=12 * 64, windows_per_step=2, learning_rate=1e-3, evaluate_every=4),
    )


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


@pytest.mark.parametrize("method", ["full", LORA])
def test_a_trained_cut_is_nearer_to_the_dense_model_and_loads_in_stock_transformers(
    spec, cut, method
):
    spec = replace(spec, settings=replace(spec.settings, method=method, learning_rate=3e-3))
    yielded, tuned = ended(tune(spec))
    looks = [standing.evaluated for standing in yielded if getattr(standing, "evaluated", None)]
    assert tuned.improved
    assert min(look.kl for look in looks) < looks[0].kl
    before, after = weights_of(cut), weights_of(spec.output)
    assert before.keys() == after.keys()
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(
        before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"]
    )
    report = json.loads((spec.output / "report.json").read_text())
    assert report["before_training"] == json.loads((cut / "report.json").read_text())["pruned"]
    assert report["pruned"]["perplexity"] != report["before_training"]["perplexity"]
    (training,) = read_compression(spec.output / "compression.json").trainings
    assert len(training.losses) == 12
    assert training.method == method
    assert "## Trained after the cut" in (spec.output / "README.md").read_text()
    assert not work_folder(spec.output).exists()


def test_a_cut_of_allocated_widths_is_trained_too(spec, cut, tmp_path):
    own, text = tmp_path / "own", str(cut.parent / "text.txt")
    arguments = ["prune", "--model", str(cut.parent / "dense"), "--output", str(own)]
    arguments += ["--mha-ratio", "0.5", "--mlp-ratio", "0.7", "--sequence-length", "32"]
    arguments += ["--calibration", text, "--calibration-tokens", "512", "--widths", "allocated"]
    arguments += ["--evaluation", text, "--evaluation-tokens", "256"]
    assert main(arguments) == 0
    settings = replace(spec.settings, learning_rate=3e-3)
    _, tuned = ended(tune(replace(spec, model=str(own), settings=settings)))
    assert tuned.improved
    before, after = (load_model(str(folder)) for folder in (own, spec.output))
    assert not before.architecture.uniform
    assert after.architecture == before.architecture
    assert tuned.report["pruned"]["layers"] == tuned.report["before_training"]["layers"]
    assert "does not load it by itself" in (spec.output / "README.md").read_text()


def test_training_takes_what_follows_the_tokens_of_all_else(spec):
    ended(tune(spec))
    (training,) = read_compression(spec.output / "compression.json").trainings
    held_out = next(text for text in training.held_out if text.source == spec.text)
    # Evaluation has 256 tokens, calibration the next 512, then comes what is watched.
    assert (held_out.skipped, held_out.tokens) == (768, 128)
    assert training.text.skipped == 896


def test_rate_zero_gives_the_same_weights_and_says_so(spec, cut):
    spec = replace(spec, settings=replace(spec.settings, learning_rate=0.0))
    _, tuned = ended(tune(spec))
    assert not tuned.improved
    assert "the input comes back" in tuned.sentence
    before, after = weights_of(cut), weights_of(spec.output)
    assert all(torch.equal(before[name], after[name]) for name in before)
    report = json.loads((spec.output / "report.json").read_text())
    assert report["pruned"] == report["before_training"]


def test_a_rate_of_zero_changes_no_weight_bit_in_training(tokenizer, windows, tmp_path):
    student = make_student(make_model(**KINDS["gqa"]), "full")
    before = snapshot(student.model)
    teacher = LiveTeacher(make_model(**KINDS["gqa"]))
    settings = Settings(tokens=256, windows_per_step=2, learning_rate=0.0)
    _, trained = ended(
        train(
            student, teacher, windows[0], [HeldOut("a", windows[1])], settings, Work(tmp_path), {}
        )
    )
    assert len(trained.curve.losses) == 4
    assert same_weights(student.model, before)


def test_the_dense_model_and_what_it_shares_stay_as_they_are(tokenizer, windows, tmp_path):
    """The student is the dense model itself: every tensor is shared before it is made."""
    dense = make_model(**KINDS["gqa-tied"])
    before = snapshot(dense)
    student = make_student(dense, "full")
    settings = Settings(tokens=512, windows_per_step=2, learning_rate=1e-2, loss="ce")
    held_out = [HeldOut("a", windows[1])]
    ended(train(student, LiveTeacher(dense), windows[0], held_out, settings, Work(tmp_path), {}))
    assert same_weights(dense, before)
    assert not any(weight.requires_grad for weight in dense.parameters())


@pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")
def test_merged_lora_has_the_logits_of_the_adapters(tokenizer, windows, tmp_path):
    dense = make_model(**KINDS["gqa-tied"])
    before = snapshot(dense)
    student = make_student(dense, "lora", rank=4)
    with torch.no_grad():
        for name, weight in student.trained().items():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    ids = windows[0].ids[:1]
    apart = student.model(ids).logits.detach()
    merged = student.merged()
    torch.testing.assert_close(merged(ids).logits, apart, atol=1e-4, rtol=1e-4)
    assert (dense(ids).logits - apart).abs().max() > 0.01
    assert merged.state_dict().keys() == dense.state_dict().keys()
    assert same_weights(dense, before)


KILLED = """
import os, pickle, signal, sys
from transact_core.export.tune import tune
spec = pickle.loads(bytes.fromhex(sys.argv[1]))
for told in tune(spec):
    if getattr(told, "step", 0) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_training_goes_on_with_the_same_curve(spec, tmp_path):
    packed = pickle.dumps(spec).hex()
    run = subprocess.run([sys.executable, "-c", KILLED, packed], cwd=ROOT, capture_output=True)
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()[-2000:]
    assert not spec.output.exists()
    kept = Work(work_folder(spec.output)).standing()
    assert 4 <= kept["step"] <= 7
    with pytest.raises(TransActError, match="--resume"):
        next(tune(spec))
    yielded, _ = ended(tune(replace(spec, resume=True)))
    steps = [standing.step for standing in yielded if hasattr(standing, "step")]
    assert steps == list(range(kept["step"] + 1, 13))
    undisturbed = replace(spec, output=tmp_path / "undisturbed")
    ended(tune(undisturbed))
    (one,), (other,) = (
        read_compression(folder / "compression.json").trainings
        for folder in (spec.output, undisturbed.output)
    )
    assert one.losses == other.losses
    assert one.evaluated == other.evaluated
    first, second = weights_of(spec.output), weights_of(undisturbed.output)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_cancelled_it_keeps_its_state_and_can_be_finished_with_the_best(spec):
    seen = []

    def report(stage, done, total):
        if stage == "Training":
            seen.append(done)
            if done == 6:
                raise Cancelled

    with pytest.raises(Cancelled):
        ended(tune(spec, report))
    assert Work(work_folder(spec.output)).standing()["step"] == 6
    _, _tuned = ended(tune(replace(spec, resume=True, finish=True)))
    (training,) = read_compression(spec.output / "compression.json").trainings
    assert len(training.losses) == 6
    # The steps since the last look are looked at too.
    assert [look.step for look in training.evaluated] == [0, 4, 6]
    best = min(training.evaluated, key=lambda look: sum(text.kl for text in look.texts.values()))
    assert training.best_step == best.step
    assert "ended before" in training.why_ended


def test_where_the_last_steps_broke_it_the_best_before_them_is_written(spec, monkeypatch):
    def cancel(stage, done, total):
        if (stage, done) == ("Training", 6):
            raise Cancelled

    with pytest.raises(Cancelled):
        ended(tune(spec, cancel))

    def broken(*_):
        raise loop.NotANumber("no number")

    monkeypatch.setattr(loop._Watch, "look", broken)
    ended(tune(replace(spec, resume=True, finish=True)))
    (training,) = read_compression(spec.output / "compression.json").trainings
    assert [look.step for look in training.evaluated] == [0, 4]


def test_it_stops_where_the_held_out_texts_get_worse(spec, monkeypatch):
    monkeypatch.setattr(loop, "PATIENCE", 2)
    settings = replace(spec.settings, learning_rate=30.0, evaluate_every=1, tokens=64 * 20)
    yielded, _tuned = ended(tune(replace(spec, settings=settings)))
    steps = [standing.step for standing in yielded if hasattr(standing, "step")]
    assert max(steps) < 20
    (training,) = read_compression(spec.output / "compression.json").trainings
    assert "did not get better" in training.why_ended
    looks = [look.texts for look in training.evaluated]
    best = min(range(len(looks)), key=lambda look: sum(text.kl for text in looks[look].values()))
    assert training.best_step == training.evaluated[best].step


def test_a_loss_that_is_no_number_is_told_and_the_best_is_kept(spec, monkeypatch):
    monkeypatch.setattr(
        loop,
        "mean_loss",
        lambda model, ids, *_: (
            sum(p.sum() for p in model.parameters() if p.requires_grad) * float("nan")
        ),
    )
    with pytest.raises(TransActError, match=r"not a number after step 0.*--finish"):
        ended(tune(spec))
    monkeypatch.undo()
    _, tuned = ended(tune(replace(spec, resume=True, finish=True)))
    assert not tuned.improved


def test_a_full_disk_is_told_and_nothing_is_lost(spec, monkeypatch):
    real, calls = state.save_file, []

    def full(*arguments, **named):
        calls.append(1)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        return real(*arguments, **named)

    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(TransActError, match=r"the disk is full.*--resume"):
        ended(tune(spec))
    assert not spec.output.exists()
    monkeypatch.undo()
    ended(tune(replace(spec, resume=True)))
    assert (spec.output / "model.safetensors").exists()


def test_other_settings_do_not_go_on_from_a_kept_state(spec):
    training = tune(spec)
    next(standing for standing in training if getattr(standing, "step", 0) == 2)
    training.close()
    other = replace(spec, resume=True, settings=replace(spec.settings, seed=1))
    with pytest.raises(TransActError, match="other settings"):
        ended(tune(other))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"settings": Settings(tokens=10)}, "fewer than one step"),
        ({"settings": Settings(learning_rate=float("nan"), tokens=5000)}, "learning rate"),
        ({"text": "no/such/text"}, "no text at"),
        ({"model": "no/such"}, "--teacher|no compression.json"),
        ({"adapter": Path("a")}, "Only the method lora"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_done(spec, changes, complaint):
    spec = replace(spec, **changes)
    with pytest.raises(TransActError, match=complaint):
        next(tune(spec))
    assert not spec.output.exists()
    assert not work_folder(spec.output).exists()


def test_a_text_that_is_too_short_is_refused(spec, tmp_path):
    (tmp_path / "short.txt").write_text("few words " * 15)
    with pytest.raises(TransActError, match=r"too short to train on|fewer than one window"):
        ended(tune(replace(spec, text=str(tmp_path / "short.txt"))))
    assert not work_folder(spec.output).exists()


def test_a_teacher_of_another_vocabulary_is_refused(spec, tokenizer, tmp_path):
    make_model(vocab_size=321, **KINDS["gqa-tied"]).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(TransActError, match="another vocabulary"):
        ended(tune(replace(spec, teacher=str(tmp_path / "other"))))


def test_too_little_memory_is_told_before(spec, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    with pytest.raises(TransActError, match=r"takes about .* where 0\.0 GB are free"):
        ended(tune(spec))
    assert not work_folder(spec.output).exists()


def test_apply_says_that_it_repeats_the_cut_alone(spec, cut, tmp_path, capsys):
    ended(tune(spec))
    again = tmp_path / "again"
    assert main(["apply", str(spec.output / "compression.json"), "--output", str(again)]) == 0
    told = capsys.readouterr().err
    assert "the cut alone" in told
    assert "python -m transact_core tune --model" in told
    assert same_tensors(again, cut)


def same_tensors(one: Path, other: Path) -> bool:
    first, second = (read_checkpoint(path, torch.float32).state_dict() for path in (one, other))
    return all(torch.equal(first[name], second[name]) for name in first)


def test_missing_peft_is_one_sentence(spec, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    spec = replace(spec, settings=replace(spec.settings, method="lora"))
    with pytest.raises(TransActError, match="needs the package peft"):
        next(tune(spec))


def test_a_teacher_that_was_written_down_serves_the_next_training(spec, tmp_path, monkeypatch):
    spec = replace(spec, teacher_cache=tmp_path / "teacher", teacher_top=32)
    yielded, tuned = ended(tune(spec))
    assert any("32 most likely tokens" in told for told in yielded if isinstance(told, str))
    assert tuned.improved
    (training,) = read_compression(spec.output / "compression.json").trainings
    assert training.teacher_top == 32
    again = tune(replace(spec, output=tmp_path / "again"))
    told = next(told for told in again if isinstance(told, str) and "written down" in told)
    assert "already" in told
    again.close()


def test_a_worker_trains_and_tells_where_it_stands(spec):
    """Specification, standings and result are pickled on the way, as between processes."""
    told = []
    task = Task("transact_core.workers.work:train_cut", (BenchSpec(), spec))
    outcome = Inline().run(task, lambda *_: None, told.append)
    assert outcome.state == "done", outcome.words
    assert outcome.result.improved
    last = told[-1]
    assert (last.step, last.steps, last.tokens) == (12, 12, 768)
    assert last.evaluated.kl < 10
    assert set(last.share_back) == {spec.text, "builtin"}
    assert set(last.dense_nll) == {spec.text, "builtin"}
    # Nothing is left behind the last step, and there is a pace to tell the next one's time by.
    assert last.seconds_left == 0
    assert told[-2].seconds_left > 0
    assert last.pace.trained > 0
    assert last.pace.watched > 0


def test_a_worker_times_the_first_steps_and_keeps_nothing_of_them(spec):
    task = Task("transact_core.workers.work:training_pace", (BenchSpec(), spec))
    outcome = Inline().run(task, lambda *_: None, lambda _: None)
    assert outcome.state == "done", outcome.words
    assert outcome.result.trained > 0
    assert not work_folder(spec.output).exists()


def test_what_was_written_is_read_again(spec):
    _, tuned = ended(tune(spec))
    record, trained, (figures,) = read_trained(spec.output)
    assert trained.sentence == tuned.sentence
    assert len(record.losses) == len(trained.curve.losses) == 12
    assert (figures.source, figures.trained) == (
        spec.text,
        tuned.report["pruned"]["perplexity"],
    )
    lost = math.log(figures.cut) - math.log(figures.dense)
    back = math.log(figures.cut) - math.log(figures.trained)
    assert figures.share_back == pytest.approx(back / lost)
    with pytest.raises(TransActError, match="holds no trained cut"):
        read_trained(Path(spec.model))


def test_time_left_counts_the_steps_and_the_looks():
    pace = Pace(trained=100.0, watched=1000.0)
    settings = Settings(tokens=3200, windows_per_step=2, evaluate_every=8)
    # 50 steps of 64 tokens, and looks after 8, 16, 24, 32, 40, 48 and 50.
    assert pace.seconds_left(settings, 32, 500) == pytest.approx(32 + 7 * 0.5)
    assert pace.seconds_left(settings, 32, 500, step=40) == pytest.approx(6.4 + 2 * 0.5)
    assert pace.seconds_left(settings, 32, 500, step=50) == 0


@pytest.mark.parametrize("seconds", [1, 5, 30, 100, 1000])
def test_the_tokens_of_a_time_take_about_that_time(seconds):
    pace, settings = Pace(trained=100.0, watched=1000.0), Settings(windows_per_step=2)
    tokens = pace.tokens_in(seconds, settings, 32, 500)
    planned = replace(settings, tokens=tokens)
    assert tokens % 64 == 0
    # The first look is before the first step.
    takes = pace.seconds_left(planned, 32, 500) + 0.5
    assert takes == pytest.approx(seconds, rel=0.15, abs=1.5)


def test_the_command_prints_the_table_and_the_looks(spec, capsys):
    arguments = ["tune", "--model", spec.model, "--text", spec.text, "--output", str(spec.output)]
    arguments += ["--tokens", "256", "--windows-per-step", "2", "--sequence-length", "32"]
    arguments += ["--held-out-tokens", "64", "--learning-rate", "1e-3"]
    assert main(arguments) == 0
    told = capsys.readouterr()
    assert "Written to" in told.out
    assert "KL" in told.err
