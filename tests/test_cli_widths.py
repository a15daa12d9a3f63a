"""What the command line says about widths, and what `apply` holds in memory."""

import json
import weakref

import pytest

from tests.conftest import make_model
from transact_core.cli import main
from transact_core.export.compression import read_compression, reproduce_command
from transact_core.forward.perplexity import evaluate
from transact_core.models.load import load_model

TOKENS = ["--calibration-tokens", "512", "--sequence-length", "32", "--evaluation-tokens", "128"]


@pytest.fixture
def prune(checkpoint, text_file, tmp_path):
    """Runs `prune` with these options; gives its output folder."""

    def run(*options: str):
        texts = ["--calibration", str(text_file), "--evaluation", str(text_file), *TOKENS]
        folder = tmp_path / "out"
        chosen = ["--model", str(checkpoint), "--output", str(folder), *texts, *options]
        assert main(["prune", *chosen]) == 0
        return folder

    return run


def warnings(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("Warning:")]


def test_a_ratio_that_removes_nothing_says_so_in_one_line(prune, capsys):
    prune("--mha-ratio", "0.1", "--mlp-ratio", "0.3")
    (line,) = [line for line in warnings(capsys) if "attention" in line]
    assert "The attention loses nothing where 10.0% of its width was asked for" in line
    assert "keeps all 6 query heads by query-heads, the next one 3" in line


def test_a_ratio_that_removes_far_more_says_so_in_one_line(prune, capsys):
    prune("--mha-ratio", "0.3", "--mlp-ratio", "0.3")
    (line,) = [line for line in warnings(capsys) if "attention" in line]
    assert "The attention loses 50.0% where 30.0% of its width was asked for" in line


def test_a_sweep_says_each_of_them_once(checkpoint, text_file, tmp_path, capsys):
    texts = ["--calibration", str(text_file), "--evaluation", str(text_file), *TOKENS]
    ratios = ["--mha-ratio", "0.1,0.5", "--mlp-ratio", "0,0.3"]
    output = ["--output", str(tmp_path / "points.csv")]
    assert main(["sweep", "--model", str(checkpoint), *ratios, *output, *texts]) == 0
    assert len([line for line in warnings(capsys) if "attention loses nothing" in line]) == 1


def test_the_multiple_of_heads_is_an_option_of_its_own(prune):
    options = ["--granularity", "head-dims", "--multiple-of", "16", "--head-dim-multiple-of", "4"]
    folder = prune("--mha-ratio", "0.4", "--mlp-ratio", "0.3", *options)
    config = json.loads((folder / "config.json").read_text())
    assert (config["head_dim"], config["intermediate_size"]) == (4, 32)
    plan = read_compression(folder / "compression.json").plan
    assert (plan.multiple_of, plan.head_dim_multiple_of) == (16, 4)


def test_apply_lets_go_of_the_dense_weights_before_it_measures(prune, tmp_path, monkeypatch):
    folder = prune("--mha-ratio", "0.5", "--mlp-ratio", "0.3")
    # The dense model's own losses are kept from `prune`, so what is measured now is the cut.
    watched: list[weakref.ref] = []
    alive: list[int] = []

    def loading(*given):
        loaded = load_model(*given)
        watched.extend(weakref.ref(weight) for weight in loaded.model.parameters())
        return loaded

    def watching(*given, **named):
        alive.append(sum(weight() is not None for weight in watched))
        return evaluate(*given, **named)

    monkeypatch.setattr("transact_core.cli.load_model", loading)
    monkeypatch.setattr("transact_core.experiments.bench.evaluate", watching)
    again = ["apply", str(folder / "compression.json"), "--output", str(tmp_path / "again")]
    assert main(again) == 0
    assert watched
    assert alive == [0]


def test_a_cut_to_any_number_of_heads_can_be_cut_again(text_file, tokenizer, tmp_path, capsys):
    """32 heads over 8 groups, and a hidden_size that 24 does not divide."""
    dense = make_model(hidden_size=64, num_attention_heads=32, num_key_value_heads=8, head_dim=4)
    dense.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    texts = ["--calibration", str(text_file), "--evaluation", str(text_file), *TOKENS]

    def cut(source: str, output: str, *options: str) -> dict:
        folders = ["--model", str(tmp_path / source), "--output", str(tmp_path / output)]
        assert main(["prune", *folders, *texts, *options]) == 0
        assert not [line for line in warnings(capsys) if "attention" in line]
        return json.loads((tmp_path / output / "report.json").read_text())

    options = ["--mha-ratio", "0.25", "--mlp-ratio", "0"]
    first = cut("dense", "first", *options, "--granularity", "query-heads")
    assert first["pruned"]["mha_width"] == 24 * 4
    assert first["pruned"].pop("model_class") == "MistralForCausalLM"
    options = ["--mha-ratio", "0.333", "--mlp-ratio", "0.3", "--recovery", "bias"]
    second = cut("first", "second", *options)
    assert second["dense"] == first["pruned"]
    assert second["pruned"]["mha_width"] == 16 * 4
    assert second["pruned"]["model_class"] == "LlamaForCausalLM"


@pytest.fixture
def uneven_checkpoint(tokenizer, tmp_path):
    """A model whose second MLP matters little."""
    dense = make_model(num_key_value_heads=3)
    dense.model.layers[1].mlp.down_proj.weight.mul_(0.02)
    dense.save_pretrained(tmp_path / "uneven")
    tokenizer.save_pretrained(tmp_path / "uneven")
    return tmp_path / "uneven"


@pytest.mark.usefixtures("short_texts")
def test_allocated_widths_are_saved_opened_and_made_again(
    uneven_checkpoint, text_file, tmp_path, capsys
):
    texts = ["--calibration", str(text_file), "--evaluation", str(text_file), *TOKENS]
    options = ["--mha-ratio", "0", "--mlp-ratio", "0.4", "--widths", "allocated"]
    folder, again = tmp_path / "out", tmp_path / "again"
    chosen = ["--model", str(uneven_checkpoint), "--output", str(folder), *texts, *options]
    assert main(["prune", *chosen, "--keep-layers", "2"]) == 0
    assert "The widths were allocated in" in capsys.readouterr().err
    compression = read_compression(folder / "compression.json")
    assert (compression.widths, compression.keep_layers) == ("allocated", (2,))
    channels = [len(layer.kept_channels) for layer in compression.plan.layers]
    assert channels[2] == 40
    assert channels[1] < channels[0]
    assert sum(channels) == 3 * 24
    assert main(["apply", str(folder / "compression.json"), "--output", str(again)]) == 0
    for name in ("model.safetensors", "config.json", "compression.json", "report.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    capsys.readouterr()
    measured = ["evaluate", "--model", str(folder), "--evaluation", str(text_file), "--json"]
    assert main([*measured, *TOKENS[2:]]) == 0
    found = json.loads(capsys.readouterr().out)["model"]
    report = json.loads((folder / "report.json").read_text())["pruned"]
    assert found["perplexity"] == pytest.approx(report["perplexity"], rel=1e-5)
    assert found["parameters"] == report["parameters"]
    third = ["--model", str(folder), "--output", str(tmp_path / "third")]
    assert main(["prune", *third, *texts, *options]) == 2
    assert "cut the dense model that it was made of" in capsys.readouterr().err


def test_widths_by_hand_are_saved_and_made_again(prune, tmp_path):
    options = ["--mha-ratio", "0.5", "--mlp-ratio", "0.5", "--widths", "by-hand"]
    folder = prune(*options, "--layer-widths", "6:40,3:10,3:25")
    compression = read_compression(folder / "compression.json")
    kept = [(len(layer.kept_heads), len(layer.kept_channels)) for layer in compression.plan.layers]
    assert kept == [(6, 40), (3, 10), (3, 25)]
    assert compression.widths == "by-hand"
    assert compression.plan.mlp_ratio == 0.375
    assert "--widths by-hand --layer-widths 6:40,3:10,3:25" in reproduce_command(compression)
    again = tmp_path / "again"
    assert main(["apply", str(folder / "compression.json"), "--output", str(again)]) == 0
    for name in ("model.safetensors", "config.json", "compression.json", "report.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    assert "widths `by-hand`" in (folder / "README.md").read_text()


def test_widths_by_hand_are_no_sweep(checkpoint, tmp_path, capsys):
    options = ["--widths", "by-hand", "--layer-widths", "6:40,3:10,3:25"]
    ratios = ["--mha-ratio", "0", "--mlp-ratio", "0.3", "--output", str(tmp_path / "points.csv")]
    assert main(["sweep", "--model", str(checkpoint), *ratios, *options]) == 2
    assert "use prune for it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--widths", "allocated", "--granularity", "head-dims"], "choose query-heads or kv"),
        (["--keep-layers", "0"], "allocated or traded"),
        (["--widths", "traded", "--keep-layers", "9"], "There is no layer 9"),
        (["--widths", "traded", "--keep-layers", "first"], "'first' is not a whole number"),
        (["--widths", "by-hand"], "named for 0 layers, where the model has 3"),
        (["--layer-widths", "6:40,6:40,6:40"], "where the widths are by-hand"),
        (["--layer-widths", "6-40"], "not of the form HEADS:CHANNELS"),
    ],
)
def test_widths_that_cannot_be_had_are_one_line(
    checkpoint, text_file, tmp_path, capsys, options, complaint
):
    texts = ["--calibration", str(text_file), "--evaluation", str(text_file), *TOKENS]
    ratios = ["--mha-ratio", "0.5", "--mlp-ratio", "0.3", "--output", str(tmp_path / "out")]
    assert main(["prune", "--model", str(checkpoint), *ratios, *texts, *options]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error:")]
    assert complaint in line
    assert not (tmp_path / "out").exists()
