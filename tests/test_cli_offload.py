"""`--offload`: the same bytes as with the layers in memory."""

import json

import pytest

from transact_core.cli import main
from transact_core.models.stored_layers import StoredLayers

RATIOS = ["--mha-ratio", "0.5", "--mlp-ratio", "0.3"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a command with and without `--offload`, each with a cache of its own; gives what both
    printed."""
    read, borrow = [], StoredLayers.borrow

    def noted(self, layer_index):
        read.append(layer_index)
        return borrow(self, layer_index)

    monkeypatch.setattr(StoredLayers, "borrow", noted)

    def both(*words):
        printed = []
        for name in ("whole", "offloaded"):
            monkeypatch.setenv("TRANSACT_CACHE", str(tmp_path / f"cache-{name}"))
            (tmp_path / name).mkdir(exist_ok=True)
            own = [str(word).replace("HERE", str(tmp_path / name)) for word in words]
            own += ["--offload"] * (name == "offloaded")
            assert main(own) == 0
            told = capsys.readouterr()
            printed.append(told.out.replace(str(tmp_path / name), "HERE"))
            assert bool(read) == (name == "offloaded")
            assert ("read from disk one at a time" in told.err) == bool(read)
            read.clear()
        return printed

    return both


@pytest.fixture
def of_model(checkpoint):
    return ["--model", checkpoint]


@pytest.fixture
def of_texts(text_file):
    return ["--evaluation", text_file, "--evaluation-tokens", 128, "--sequence-length", 32]


@pytest.fixture
def of_calibration(text_file):
    return ["--calibration", text_file, "--calibration-tokens", 512]


def same_files(tmp_path, folder):
    whole, offloaded = tmp_path / "whole" / folder, tmp_path / "offloaded" / folder
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in offloaded.iterdir())
    for name in names:
        assert (whole / name).read_bytes() == (offloaded / name).read_bytes(), name


def test_prune_and_apply_write_the_same_folder(run, of_model, of_texts, of_calibration, tmp_path):
    options = [*of_model, *of_texts, *of_calibration, *RATIOS, "--save-dtype", "bfloat16"]
    whole, offloaded = run("prune", *options, "--output", "HERE/cut", "--json")
    assert json.loads(whole) == json.loads(offloaded)
    same_files(tmp_path, "cut")
    run("apply", "HERE/cut/compression.json", "--output", "HERE/again")
    same_files(tmp_path, "again")
    weights = (tmp_path / name / "model.safetensors" for name in ("whole/cut", "offloaded/again"))
    assert len({path.read_bytes() for path in weights}) == 1


def test_evaluate_prints_the_same(run, of_model, of_texts):
    whole, offloaded = run("evaluate", *of_model, *of_texts)
    assert whole == offloaded


def test_analyze_writes_the_same_scores(run, of_model, of_calibration, tmp_path):
    words = [*of_model, *of_calibration, "--sequence-length", 32, "--importance", "taylor"]
    run("analyze", *words, "--output", "HERE/scores.parquet")
    files = [tmp_path / name / "scores.parquet" for name in ("whole", "offloaded")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_sweep_measures_the_same_points(run, of_model, of_texts, of_calibration, tmp_path):
    options = [*of_model, *of_texts, *of_calibration]
    run("sweep", *options, "--mha-ratio", "0.5", "--mlp-ratio", "0,0.3", "--output", "HERE/p.csv")
    one, other = (
        [line.rpartition(",")[0] for line in (tmp_path / name / "p.csv").read_text().splitlines()]
        for name in ("whole", "offloaded")
    )
    assert one == other
    assert len(one) == 3


def test_training_is_refused_with_its_reason(of_model, of_texts, tmp_path, capsys):
    output, options = tmp_path / "out", ["--tune-tokens", "64", "--offload"]
    words = ["prune", *of_model, *of_texts, *RATIOS, *options, "--output", output]
    assert main(list(map(str, words))) == 2
    assert "Training needs the whole model in memory" in capsys.readouterr().err
    assert not output.exists()
