"""NaN, infinite and degenerate models: a clear error or finite results, never silent NaN."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.conftest import make_model
from transact_core.cli import main
from transact_core.experiments.bench import Choices, compress
from transact_core.importance.scores import IMPORTANCES
from transact_core.pruning.closed_form import RECOVERIES

TEXTS = ["--calibration-tokens", "512", "--evaluation-tokens", "128", "--sequence-length", "32"]


@pytest.fixture
def run(text_file, tmp_path, capsys):
    """Runs a command on a checkpoint; returns the exit status, stdout and the error line."""

    def run(command, folder, *options):
        texts = ["--evaluation", str(text_file), *TEXTS[2:]]
        if command != "evaluate":
            texts = ["--calibration", str(text_file), *texts, *TEXTS[:2]]
        status = main([command, "--model", str(folder), *texts, *options])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        errors = [line for line in printed.err.splitlines() if line.startswith("Error:")]
        assert len(errors) == (status != 0)
        return status, printed.out, "".join(errors) or printed.err

    return run


@pytest.fixture
def prune(run, tmp_path):
    def prune(folder, *options, mha="0.5", mlp="0.3"):
        output = tmp_path / "out"
        ratios = ["--mha-ratio", mha, "--mlp-ratio", mlp, "--output", str(output)]
        return (*run("prune", folder, *ratios, *options), output)

    return prune


@pytest.fixture
def saved(tokenizer, tmp_path):
    def saved(model, name="checkpoint"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return saved


def changed(folder, name, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors[name])
    save_file(tensors, path, {"format": "pt"})
    return folder


def all_numbers(values) -> bool:
    """Whether every float in nested dictionaries is finite."""
    if isinstance(values, dict):
        return all(map(all_numbers, values.values()))
    return not isinstance(values, float) or math.isfinite(values)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "module", ["self_attn.v_proj", "self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"]
)
@pytest.mark.parametrize("importance", ["activation", "magnitude", "taylor", "reconstruction"])
def test_weights_that_are_no_numbers(checkpoint, prune, value, module, importance):
    name = f"model.layers.1.{module}.weight"
    changed(checkpoint, name, lambda weight: weight[0].fill_(value))
    status, out, error, folder = prune(checkpoint, "--importance", importance)
    assert (status, out) == (2, "")
    assert "NaN or infinite" in error or "not a number" in error
    assert not folder.exists()


@pytest.mark.parametrize("granularity", ["query-heads", "kv-groups", "head-dims"])
@pytest.mark.parametrize("recovery", RECOVERIES)
def test_a_layer_that_writes_nothing(checkpoint, prune, granularity, recovery):
    """All its activations are zero, so the repair's equations are singular."""
    for module in ("self_attn.v_proj", "mlp.up_proj"):
        changed(checkpoint, f"model.layers.1.{module}.weight", torch.Tensor.zero_)
    status, out, _, folder = prune(
        checkpoint, "--granularity", granularity, "--recovery", recovery, "--json"
    )
    assert status == 0
    assert all_numbers(json.loads(out))
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert all(weight.isfinite().all() for weight in stock.parameters())


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_scores_of_a_layer_that_writes_nothing(checkpoint, prune, importance):
    for module in ("self_attn.v_proj", "mlp.up_proj"):
        changed(checkpoint, f"model.layers.1.{module}.weight", torch.Tensor.zero_)
    status, out, _, _ = prune(checkpoint, "--importance", importance, "--json")
    assert status == 0
    assert all_numbers(json.loads(out))


def test_a_layer_that_cannot_be_solved_keeps_its_bare_cut(gqa_bench, monkeypatch):
    def unsolvable(matrix):
        raise torch.linalg.LinAlgError("not positive definite")

    plan = gqa_bench.plan(0.5, 0.3, Choices())
    bare, _ = compress(gqa_bench, plan, "none")
    monkeypatch.setattr(torch.linalg, "cholesky", unsolvable)
    model, measurement = compress(gqa_bench, plan, "least-squares")
    assert all(fit.ridge is None for fit in measurement.fits)
    assert all(fit.recovered_error == fit.bare_error for fit in measurement.fits)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, bare.state_dict()[name])


def test_weights_that_float16_cannot_hold(checkpoint, prune, tmp_path):
    changed(checkpoint, "model.layers.1.mlp.down_proj.weight", lambda weight: weight.mul_(1e6))
    status, out, error, folder = prune(checkpoint, "--save-dtype", "float16")
    assert (status, out) == (2, "")
    assert "float16" in error
    assert not folder.exists()
    assert prune(checkpoint, "--save-dtype", "bfloat16")[0] == 0


def test_activations_that_float16_cannot_hold(checkpoint, run, prune):
    for name in ("gate_proj", "up_proj"):
        changed(checkpoint, f"model.layers.1.mlp.{name}.weight", lambda weight: weight.mul_(3000))
    status, out, error = run("evaluate", checkpoint, "--dtype", "float16")
    assert (status, out) == (2, "")
    assert "overflows in its dtype" in error
    status, out, error, folder = prune(checkpoint, "--dtype", "float16")
    assert (status, out) == (2, "")
    assert "compute in float32" in error or "overflows in its dtype" in error
    assert not folder.exists()


@pytest.mark.parametrize("granularity", ["query-heads", "kv-groups", "head-dims", "auto"])
def test_a_model_of_one_head_keeps_it(saved, prune, granularity):
    folder = saved(make_model(num_attention_heads=1, num_key_value_heads=1, head_dim=8))
    status, out, _, made = prune(folder, "--granularity", granularity, "--json")
    assert status == 0
    result = json.loads(out)
    assert all_numbers(result)
    config = json.loads((made / "config.json").read_text())
    assert config["num_attention_heads"] == 1


@pytest.mark.parametrize("text", ["a", "\n", "", "é"])
def test_a_text_of_one_token_or_none(checkpoint, run, tmp_path, text, capsys):
    path = tmp_path / "short.txt"
    path.write_text(text)
    status, out, error = run("evaluate", checkpoint, "--evaluation", str(path))
    assert (status, out) == (2, "")
    assert "fewer than one window" in error or "is empty" in error


def test_a_tokenizer_of_another_model(saved, run, prune, tmp_path):
    folder = saved(make_model(num_key_value_heads=3, vocab_size=200))
    for status, out, error in (run("evaluate", folder), prune(folder)[:3]):
        assert (status, out) == (2, "")
        assert "tokenizer and model do not belong together" in error


def test_a_loss_that_is_infinite_is_refused(checkpoint, run):
    changed(checkpoint, "lm_head.weight", lambda weight: weight[5].fill_(-3e38))
    changed(checkpoint, "model.norm.weight", lambda weight: weight.fill_(1e30))
    status, out, error = run("evaluate", checkpoint)
    assert (status, out) == (2, "")
    assert "not a number" in error
