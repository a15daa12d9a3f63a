import argparse
import json
import math
import os
import shutil
import sys
import weakref

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import make_model
from transact_core import cli
from transact_core.cli import main
from transact_core.data.corpus import read_corpus
from transact_core.experiments import bench as bench_module
from transact_core.experiments import cut_spec as cut_spec_module
from transact_core.experiments import sweep as sweep_module
from transact_core.experiments.bench import Choices
from transact_core.experiments.cut_spec import BenchSpec
from transact_core.export.compression import read_compression, reproduce_command
from transact_core.importance.scores import IMPORTANCES

TOKENS = ["--calibration-tokens", "512", "--sequence-length", "32"]
TEXTS = [*TOKENS, "--evaluation-tokens", "128"]


@pytest.fixture
def prune(checkpoint, text_file, tmp_path):
    """Runs `prune`; gives the exit status and the output folder."""

    def run(output="out", mha="0.5", mlp="0.3", *options):
        texts = ["--calibration", str(text_file), "--evaluation", str(text_file), *TEXTS]
        ratios = ["--mha-ratio", mha, "--mlp-ratio", mlp]
        folder = tmp_path / output
        chosen = ["--model", str(checkpoint), *ratios, "--output", str(folder), *texts]
        return main(["prune", *chosen, *options]), folder

    return run


def refused(capsys, complaint):
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = [line for line in printed.err.splitlines() if line.startswith("Error:")]
    assert len(lines) == 1
    assert complaint in lines[0]
    assert "Traceback" not in printed.err
    assert "usage:" not in printed.err


def test_apply_makes_the_same_bytes(prune, tmp_path, capsys):
    status, made = prune()
    assert status == 0
    capsys.readouterr()
    again = tmp_path / "again"
    assert main(["apply", str(made / "compression.json"), "--output", str(again), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((again / "report.json").read_text())
    for name in ("model.safetensors", "config.json", "report.json", "compression.json"):
        assert (made / name).read_bytes() == (again / name).read_bytes()


def test_an_output_can_be_cut_again(prune, text_file, tmp_path):
    _, made = prune()
    again = ["--mha-ratio", "0", "--mlp-ratio", "0.5", "--output", str(tmp_path / "again")]
    texts = ["--calibration", str(text_file), "--evaluation", str(text_file), *TEXTS]
    assert main(["prune", "--model", str(made), *again, *texts]) == 0
    first = json.loads((made / "report.json").read_text())
    second = json.loads((tmp_path / "again" / "report.json").read_text())
    assert first["pruned"].pop("model_class") == "LlamaForCausalLM"
    assert second["dense"] == first["pruned"]
    assert second["pruned"]["mlp_width"] == first["pruned"]["mlp_width"] // 2


def test_options_change_the_cut(prune):
    _, made = prune(
        "out",
        "0.4",
        "0.3",
        "--granularity",
        "kv-groups",
        "--multiple-of",
        "8",
        "--recovery",
        "none",
        "--save-dtype",
        "bfloat16",
    )
    plan = json.loads((made / "compression.json").read_text())["plan"]
    assert (plan["num_key_value_heads"], plan["intermediate_size"]) == (2, 32)
    assert json.loads((made / "config.json").read_text())["dtype"] == "bfloat16"


def test_modules_that_keep_their_bare_cut_are_reported(prune, capsys):
    """Of one window nothing can be held out, so nothing is repaired."""
    status, made = prune("out", "0.5", "0.3", "--calibration-tokens", "32")
    assert status == 0
    sentence = "6 of 6 cut modules keep their bare cut"
    assert sentence in capsys.readouterr().err
    assert sentence in (made / "README.md").read_text()


def test_auto_says_which_granularity_and_why(prune, capsys):
    status, made = prune("out", "0.34", "0", "--granularity", "auto")
    assert status == 0
    stored = json.loads((made / "compression.json").read_text())
    losses = stored["granularity_losses"]
    assert set(losses) == {"query-heads", "kv-groups", "head-dims"}
    assert stored["plan"]["granularity"] == min(losses, key=losses.get)
    assert f"auto takes {stored['plan']['granularity']}" in capsys.readouterr().err


@pytest.mark.parametrize("granularity", ["query-heads", "kv-groups", "head-dims"])
def test_a_cut_in_steps_is_recorded_and_made_again_from_its_plan(prune, tmp_path, granularity):
    status, made = prune("out", "0.67", "0.5", "--granularity", granularity, "--steps", "3")
    assert status == 0
    stored = json.loads((made / "compression.json").read_text())
    assert stored["steps"] == 3
    channels = [step["intermediate_size"] for step in stored["earlier_steps"]]
    assert channels == [34, 27]
    assert stored["plan"]["intermediate_size"] == 20
    assert all(step["perplexity"] > 1 for step in stored["earlier_steps"])
    again = tmp_path / "again"
    assert main(["apply", str(made / "compression.json"), "--output", str(again)]) == 0
    for name in ("model.safetensors", "compression.json"):
        assert (made / name).read_bytes() == (again / name).read_bytes()


def test_a_sequential_cut_is_recorded_and_made_again_from_its_plan(prune, tmp_path):
    status, made = prune("out", "0.5", "0.5", "--importance", "reconstruction", "--sequential")
    assert status == 0
    compression = read_compression(made / "compression.json")
    assert compression.sequential
    assert "--sequential" in reproduce_command(compression)
    again = tmp_path / "again"
    assert main(["apply", str(made / "compression.json"), "--output", str(again)]) == 0
    for name in ("model.safetensors", "compression.json"):
        assert (made / name).read_bytes() == (again / name).read_bytes()


def test_evaluate_measures_what_the_report_says(prune, text_file, capsys):
    _, made = prune()
    capsys.readouterr()
    texts = ["--evaluation", str(text_file), "--evaluation-tokens", "128"]
    length = ["--sequence-length", "32", "--json"]
    assert main(["evaluate", "--model", str(made), *texts, *length]) == 0
    measured = json.loads(capsys.readouterr().out)
    report = json.loads((made / "report.json").read_text())
    assert report["pruned"].pop("model_class") == "LlamaForCausalLM"
    assert measured["model"] == report["pruned"]
    assert measured["evaluation"] == report["evaluation"]


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_analyze_knows_every_importance_and_its_seed(importance, checkpoint, text_file, tmp_path):
    frames = []
    for name, seed in (("one", "1"), ("same", "1"), ("other", "2")):
        output = tmp_path / f"{name}.parquet"
        chosen = ["--importance", importance, "--seed", seed, "--output", str(output)]
        texts = ["--calibration", str(text_file), *TOKENS]
        assert main(["analyze", "--model", str(checkpoint), *chosen, *texts]) == 0
        frames.append(pd.read_parquet(output))
    one, same, other = frames
    assert set(one.importance) == {importance}
    assert one.score.notna().all()
    assert one.equals(same)
    assert one.equals(other) == (importance != "random")


def test_the_seed_of_prune_reaches_random(prune):
    kept = []
    for output, seed in (("one", "1"), ("same", "1"), ("other", "2")):
        options = ["--importance", "random", "--recovery", "none", "--seed", seed]
        status, folder = prune(output, "0.5", "0.3", *options)
        assert status == 0
        kept.append(json.loads((folder / "compression.json").read_text())["plan"]["layers"])
    assert kept[0] == kept[1] != kept[2]


def test_analyze_writes_a_row_for_every_unit(checkpoint, text_file, tmp_path):
    output = tmp_path / "scores.parquet"
    texts = ["--calibration", str(text_file), *TOKENS]
    assert main(["analyze", "--model", str(checkpoint), "--output", str(output), *texts]) == 0
    frame = pd.read_parquet(output)
    assert list(frame.columns) == ["layer", "module", "unit", "index", "importance", "score"]
    assert len(frame.query("module == 'mlp' and unit == 'channel'")) == 3 * 40
    assert len(frame.query("module == 'mha' and unit == 'head'")) == 3 * 6


def test_sweep_writes_a_row_for_every_pair(checkpoint, text_file, tmp_path):
    output = tmp_path / "points.csv"
    texts = ["--calibration", str(text_file), "--evaluation", str(text_file), *TEXTS]
    grid = ["--mha-ratio", "0,0.5", "--mlp-ratio", "0,0.25,0.5", "--recovery", "none"]
    assert main(["sweep", "--model", str(checkpoint), *grid, "--output", str(output), *texts]) == 0
    frame = pd.read_csv(output)
    asked = [(mha, mlp) for mha in (0, 0.5) for mlp in (0, 0.25, 0.5)]
    assert list(zip(frame.mha_ratio, frame.mlp_ratio, strict=True)) == asked
    assert frame.delta_nll[0] == 0
    assert os.listdir(tmp_path).count("points.csv") == 1


@pytest.fixture
def sweep(checkpoint, text_file, tmp_path, monkeypatch):
    """Runs `sweep` into points.csv; gives the exit status and the file."""
    monkeypatch.setenv("TRANSACT_CACHE", str(tmp_path / "cache"))

    def run(mha="0,0.5", mlp="0,0.25,0.5", *options):
        texts = ["--calibration", str(text_file), "--evaluation", str(text_file), *TEXTS]
        grid = ["--mha-ratio", mha, "--mlp-ratio", mlp, "--recovery", "none"]
        output = tmp_path / "points.csv"
        chosen = ["--model", str(checkpoint), *grid, "--output", str(output), *texts]
        return main(["sweep", *chosen, *options]), output

    return run


def test_a_sweep_that_was_stopped_goes_on_in_its_file(sweep, monkeypatch):
    point_at, measured = sweep_module.point_at, []

    def stopping(bench, pair, *rest):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(pair)
        return point_at(bench, pair, *rest)

    monkeypatch.setattr(sweep_module, "point_at", stopping)
    status, output = sweep()
    assert status == 130
    begun = output.read_text().splitlines()
    assert len(begun) == 3
    seen = []

    def going_on(bench, pair, *rest):
        # What was there stays there while the rest is measured.
        seen.append(set(begun) <= set(output.read_text().splitlines()))
        measured.append(pair)
        return point_at(bench, pair, *rest)

    monkeypatch.setattr(sweep_module, "point_at", going_on)
    assert sweep()[0] == 0
    assert seen == [True] * 4
    assert len(set(measured)) == len(measured) == 6
    lines = output.read_text().splitlines()
    assert len(lines) == 7
    assert set(begun) <= set(lines)

    # Once more changes nothing; more ratios are more points.
    assert sweep()[0] == 0
    assert output.read_text().splitlines() == lines
    assert sweep("0,0.5", "0,0.25,0.5,0.75")[0] == 0
    assert len(measured) == 8
    assert set(lines) <= set(output.read_text().splitlines())


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        (("0.5", "0.25,0.5", "--recovery", "bias"), "were not measured here with this model"),
        (("0.5", "0.25,0.5", "--calibration-tokens", "256"), "were not measured here with"),
        (("0.5", "0.25,0.5", "--evaluation-tokens", "96"), "were not measured here with"),
        (("0.5", "0.25"), "holds a point at MHA 0.5 and MLP 0.5, which this sweep is not asked"),
    ],
)
def test_a_file_of_another_sweep_is_refused_and_kept(sweep, capsys, asked, complaint):
    status, output = sweep("0.5", "0.25,0.5")
    assert status == 0
    before = output.read_bytes()
    capsys.readouterr()
    assert sweep(*asked)[0] == 2
    refused(capsys, complaint)
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"precious",
        b"mha_ratio,mlp_ratio,x\nhalf,0.5,1\n",
        b"mha_ratio,mlp_ratio,x\n0.5\n",
        b"\xff\xfe",
        None,
    ],
)
def test_a_file_that_is_no_sweep_s_is_refused_before_the_computing(
    sweep, tmp_path, monkeypatch, capsys, content
):
    output = tmp_path / "points.csv"
    output.mkdir() if content is None else output.write_bytes(content)
    monkeypatch.setattr("transact_core.experiments.cut_spec.load_model", None)
    assert sweep()[0] == 2
    refused(capsys, "is not a sweep's; name a new file")
    assert content is None or output.read_bytes() == content


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"mha": "1"}, "outside [0, 1)"),
        ({"mlp": "-0.5"}, "outside [0, 1)"),
        ({"mlp": "half"}, "is not a number"),
        ({"mha": "nan"}, "outside [0, 1)"),
    ],
)
def test_ratios_that_are_none_are_refused(prune, capsys, changes, complaint):
    status, folder = prune(**changes)
    assert status == 2
    refused(capsys, complaint)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--granularity", "atoms"], "invalid choice: 'atoms'"),
        (["--calibration-tokens", "many"], "'many' is not a whole number"),
        (["--seed", "-1"], "outside 0 to"),
        (["--seed", str(2**63)], "outside 0 to"),
        (["--sequence-length", "1"], "at least 2"),
        (["--calibration-tokens", "0"], "not a positive number"),
        (["--steps", "0"], "not a positive number"),
        (["--nonsense"], "nrecognized arguments: --nonsense"),
        (["--evaluation", "no/such.txt"], "There is no text at"),
        (["--sequence-length", "100000"], "fewer than one window"),
        (["--model", "no/such/model/here"], "There is no model at"),
    ],
)
def test_wrong_options_are_refused_in_one_line(prune, capsys, options, complaint):
    status, folder = prune("out", "0.5", "0.3", *options)
    assert status == 2
    refused(capsys, complaint)
    assert not folder.exists()


@pytest.mark.parametrize("device", ["cuda:7", "mps"])
def test_apply_falls_back_to_the_cpu_where_the_device_is_not_here(prune, tmp_path, capsys, device):
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("this device is here")
    _, made = prune()
    path = made / "compression.json"
    stored = json.loads(path.read_text())
    stored["environment"]["device"] = device
    path.write_text(json.dumps(stored))
    capsys.readouterr()
    assert main(["apply", str(path), "--output", str(tmp_path / "again")]) == 0
    assert f"made on the device {device}, which is not here" in capsys.readouterr().err


LONG = "x" * 300


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["evaluate", "--model", "~nosuchuser/model"], "There is no model at"),
        (["evaluate", "--model", LONG], "There is no model at"),
        (["evaluate", "--model", "builtin", "--evaluation", LONG], "There is no text at"),
        (["analyze", "--model", "builtin", "--output", LONG], "its name is too long"),
        (
            ["sweep", "--model", "m", "--mha-ratio", "0", "--mlp-ratio", "0", "--output", LONG],
            "its name is too long",
        ),
        (["apply", LONG, "--output", "out"], "cannot be read"),
    ],
)
def test_paths_that_cannot_be_are_refused_in_one_line(capsys, arguments, complaint):
    assert main(arguments) == 2
    refused(capsys, complaint)


@pytest.mark.parametrize("command", ["evaluate", "analyze"])
def test_folders_that_cannot_be_entered_are_refused_in_one_line(capsys, monkeypatch, command):
    """The system is asked for a file in such a folder; root may enter every folder."""
    stat = os.stat

    def denied(path, *given, **named):
        if "closed" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *given, **named)

    monkeypatch.setattr(os, "stat", denied)
    source = ["--model", "closed/model"] if command == "evaluate" else ["--model", "builtin"]
    output = ["--output", "closed/x.parquet"] if command == "analyze" else []
    monkeypatch.setattr("transact_core.models.load.is_hub_id", lambda source: False)
    assert main([command, *source, *output]) == 2
    refused(capsys, "There is no model at" if command == "evaluate" else "permission was denied")


def test_a_model_that_computes_no_numbers_is_refused(prune, checkpoint, text_file, capsys):
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = math.nan
    save_file(tensors, path, {"format": "pt"})
    status, folder = prune()
    assert status == 2
    refused(capsys, "of layer 1 is NaN or infinite")
    assert not folder.exists()
    texts = ["--evaluation", str(text_file), "--evaluation-tokens", "64"]
    assert main(["evaluate", "--model", str(checkpoint), *texts, "--sequence-length", "32"]) == 2
    refused(capsys, "loss is not a number")


def test_windows_of_one_token_cannot_be_scored(checkpoint, text_file, capsys):
    texts = ["--evaluation", str(text_file), "--sequence-length", "1"]
    assert main(["evaluate", "--model", str(checkpoint), *texts]) == 2
    refused(capsys, "at least 2")


def test_a_full_disk_is_found_before_the_computing(prune, monkeypatch, capsys):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr("transact_core.pruning.on_disk.recover", None)
    status, folder = prune()
    assert status == 2
    refused(capsys, "the disk has 0 MB free")
    assert not folder.exists()


def test_an_output_that_holds_something_is_refused_and_kept(prune, capsys, tmp_path):
    mine = tmp_path / "out" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("precious")
    assert prune()[0] == 2
    refused(capsys, "is not empty")
    assert mine.read_text() == "precious"
    assert os.listdir(mine.parent) == ["mine.txt"]


def edited(made, tmp_path, change):
    stored = json.loads((made / "compression.json").read_text())
    change(stored)
    path = tmp_path / "edited.json"
    path.write_text(json.dumps(stored))
    return str(path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda stored: stored.update(colour="blue"), "colour"),
        (
            lambda stored: stored["plan"]["layers"][1].update(kept_channels=list(range(13, 41))),
            "out of range",
        ),
        (lambda stored: stored["plan"]["layers"].pop(), "layers"),
        (lambda stored: stored["plan"].update(mlp_ratio=0.6), "contradict"),
        (
            lambda stored: stored["model"].update(weight_files={"model.safetensors": "f" * 64}),
            "SHA-256 differ",
        ),
        (lambda stored: stored["calibration"].update(sha256="f" * 64), "calibration text"),
        (lambda stored: stored["evaluation"].update(tokens=10**6), "fewer than one window"),
    ],
)
def test_a_compression_that_does_not_fit_is_refused(prune, capsys, tmp_path, change, complaint):
    _, made = prune()
    capsys.readouterr()
    output = tmp_path / "again"
    assert main(["apply", edited(made, tmp_path, change), "--output", str(output)]) == 2
    refused(capsys, complaint)
    assert not output.exists()


def test_apply_takes_the_model_and_the_texts_from_elsewhere(prune, checkpoint, text_file, tmp_path):
    _, made = prune()
    elsewhere = checkpoint.rename(tmp_path / "moved")
    text = text_file.rename(tmp_path / "moved.txt")
    places = ["--model", str(elsewhere), "--calibration", str(text), "--evaluation", str(text)]
    again = tmp_path / "again"
    compression = str(made / "compression.json")
    assert main(["apply", compression, "--output", str(again), *places]) == 0
    assert (again / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()


def test_apply_measures_the_other_texts_too(prune, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text(read_corpus("builtin-code").text[:20_000])
    _, made = prune("made", "0.5", "0.3", "--evaluation", str(other))
    report = json.loads((made / "report.json").read_text())
    (measured,) = report["other_texts"]
    assert measured["source"] == str(other)
    moved = other.rename(tmp_path / "moved.txt")
    command = ["apply", str(made / "compression.json"), "--output"]
    capsys.readouterr()
    assert main([*command, str(tmp_path / "again")]) == 2
    refused(capsys, "There is no text at")
    recorded = report["evaluation"]["source"]
    places = ["--evaluation", recorded, "--evaluation", str(moved)]
    assert main([*command, str(tmp_path / "again"), *places]) == 0
    again = json.loads((tmp_path / "again" / "report.json").read_text())
    assert again["other_texts"] == [{**measured, "source": str(moved)}]
    assert {**again, "other_texts": []} == {**report, "other_texts": []}
    capsys.readouterr()
    assert main([*command, str(tmp_path / "more"), *places, "--evaluation", recorded]) == 2
    refused(capsys, "is given 3 times")


def test_apply_refuses_another_model(prune, tmp_path, tokenizer, capsys):
    _, made = prune()
    other = tmp_path / "other"
    make_model(num_key_value_heads=3, initializer_range=0.1).save_pretrained(other)
    tokenizer.save_pretrained(other)
    capsys.readouterr()
    output = tmp_path / "again"
    command = ["apply", str(made / "compression.json"), "--output", str(output)]
    assert main([*command, "--model", str(other)]) == 2
    refused(capsys, "SHA-256 differ")
    assert not output.exists()


def test_an_interruption_leaves_nothing(prune, tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("transact_core.export.folder.model_card", interrupt)
    status, folder = prune()
    assert status == 130
    assert not folder.exists()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".out")]


# --- help -------------------------------------------------------------------------------------


def commands():
    (choices,) = (action for action in cli._parser()._actions if isinstance(action.choices, dict))
    return choices.choices


def test_every_option_of_every_command_says_what_it_does_and_its_default():
    seen = 0
    for name, parser in commands().items():
        shown = " ".join(parser.format_help().split())
        assert parser.description
        for action in parser._actions:
            assert action.help, (name, action.dest)
            if action.required or action.default == argparse.SUPPRESS:
                continue
            default = "off" if action.default is False else action.default
            said = " ".join(parser._get_formatter()._expand_help(action).split())
            assert said.replace("- ", "-") in shown.replace("- ", "-")
            assert f"(default: {'' if default is None else default}" in said, (name, action.dest)
            seen += 1
    assert seen > 40


def test_the_help_of_the_commands_lists_them_all():
    shown = cli._parser().format_help()
    assert all(f"\n    {name} " in shown for name in commands())


@pytest.mark.parametrize(
    ("started", "name"),
    [
        ("/usr/bin/transact", "transact"),
        ("transact.exe", "transact"),
        ("/lib/transact_core/__main__.py", "python -m transact_core"),
    ],
)
def test_the_usage_names_the_command_as_it_was_started(monkeypatch, capsys, started, name):
    monkeypatch.setattr(sys, "argv", [started])
    with pytest.raises(SystemExit):
        main(["prune", "--help"])
    assert f"usage: {name} prune " in capsys.readouterr().out


def test_options_reach_the_choices(monkeypatch):
    command = ["sweep", "--model", "m", "--mha-ratio", "0", "--mlp-ratio", "0", "--output", "o"]
    chosen = cli._parser().parse_args([*command, "--head-dim-multiple-of", "8"])
    assert cli._choices(chosen).head_dim_multiple_of == 8
    assert cli._choices(cli._parser().parse_args(command)) == Choices()
    assert cli._bench_spec(cli._parser().parse_args(command)) == BenchSpec("m")


# --- texts and windows ------------------------------------------------------------------------


def test_windows_beyond_the_models_context_are_warned_of(
    prune, sweep, checkpoint, text_file, tmp_path, capsys
):
    said = "Warning: Windows of 300 tokens are longer than the 256"
    length = ["--sequence-length", "300", "--evaluation-tokens", "600"]
    assert prune("out", "0.5", "0.3", *length, "--calibration-tokens", "600")[0] == 0
    assert capsys.readouterr().err.count(said) == 1
    again = ["--output", str(tmp_path / "again")]
    assert main(["apply", str(tmp_path / "out" / "compression.json"), *again]) == 0
    assert capsys.readouterr().err.count(said) == 1
    assert sweep("0", "0", *length, "--calibration-tokens", "600")[0] == 0
    assert capsys.readouterr().err.count(said) == 1
    model = ["--model", str(checkpoint)]
    assert main(["evaluate", *model, "--evaluation", str(text_file), *length]) == 0
    assert capsys.readouterr().err.count(said) == 1
    scores = ["--output", str(tmp_path / "scores.parquet"), "--calibration", str(text_file)]
    tokens = ["--calibration-tokens", "600", "--sequence-length", "300"]
    assert main(["analyze", *model, *scores, *tokens]) == 0
    assert capsys.readouterr().err.count(said) == 1


def test_a_column_of_conversations_calibrates_and_is_found_again(prune, text_file, tmp_path):
    rows = [{"role": "user", "content": text} for text in text_file.read_text().split("\n\n")]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(json.dumps({"turns": [row], "text": "no"}) for row in rows))
    status, made = prune("out", "0.5", "0.3", "--calibration", f"{path}:turns")
    assert status == 0
    compression = read_compression(made / "compression.json")
    assert compression.calibration.source == f"{path}:turns"
    again = tmp_path / "again"
    assert main(["apply", str(made / "compression.json"), "--output", str(again)]) == 0
    assert (again / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()


def test_files_that_an_editor_of_windows_wrote_are_read(prune, sweep, tmp_path):
    _, made = prune()
    path = tmp_path / "edited.json"
    text = (made / "compression.json").read_text()
    path.write_bytes(text.replace("\n", "\r\n").encode("utf-8-sig"))
    again = tmp_path / "again"
    assert main(["apply", str(path), "--output", str(again)]) == 0
    assert (again / "compression.json").read_text() == text
    _, output = sweep("0.5", "0")
    output.write_bytes(output.read_text().replace("\n", "\r\n").encode("utf-8-sig"))
    assert sweep("0,0.5", "0")[0] == 0
    assert len(pd.read_csv(output)) == 2


# --- memory -----------------------------------------------------------------------------------


def test_the_dense_weights_are_gone_when_the_pruned_model_is_measured(prune, tmp_path, monkeypatch):
    """They are half of the memory that a cut takes, or more."""
    load_really, measure_really = cli.load_model, bench_module.evaluate
    dense, alive = [], []

    def load(*arguments):
        loaded = load_really(*arguments)
        dense[:] = [weakref.ref(weight) for weight in loaded.model.parameters()]
        return loaded

    def measure(*arguments):
        alive.append(sum(weight() is not None for weight in dense))
        return measure_really(*arguments)

    for module in (cli, cut_spec_module):
        monkeypatch.setattr(module, "load_model", load)
    monkeypatch.setattr(bench_module, "evaluate", measure)
    monkeypatch.setenv("TRANSACT_CACHE", str(tmp_path / "one"))
    status, made = prune()
    assert status == 0
    monkeypatch.setenv("TRANSACT_CACHE", str(tmp_path / "two"))
    again = ["--output", str(tmp_path / "again")]
    assert main(["apply", str(made / "compression.json"), *again]) == 0
    # Both measure the dense model and then the pruned one.
    assert alive == [len(dense), 0, len(dense), 0]
