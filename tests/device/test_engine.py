"""The engine on every kind of device that is there: the CPU, and CUDA where there is a GPU.

    python -m pytest tests/device -k cuda     # on a machine with a GPU: within ten minutes

Each test takes the `device` fixture of tests/conftest.py, in float32 and in bfloat16, and holds what
the device computes to the CPU in float32: statistics and scores, perplexity, a cut and its repair,
the damage curves, and the command line from a checkpoint to an exported folder. In bfloat16 sums are
rounded at every layer, so tolerances are wide there; they still tell a wrong device or dtype from a
right one. Any other test of the engine takes the device in the same way: `device` among its
arguments, and `bench_on(device, dtype, ...)` or `model.to(device)`.
"""

import json

import pytest
import torch

from tests.conftest import VOCAB_SIZE, bench_of, make_model, windows_for
from transact_core.cli import main
from transact_core.experiments.bench import Bench, Choices, compress
from transact_core.forward.perplexity import evaluate
from transact_core.importance.scores import IMPORTANCES
from transact_core.pruning.plan import GRANULARITIES
from transact_core.pruning.surgery import prune

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
"""Largest relative difference of a perplexity from the CPU's in float32."""
SHAPE = {
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "initializer_range": 0.05,
}
"""Small enough for a second on a CPU. Its weights are small, so that rounding stays a small error."""
RATIOS = 0.34, 0.3


@pytest.fixture(params=DTYPES)
def dtype(request) -> str:
    return request.param


def bench_on(device: torch.device, dtype: str, tokenizer, **changes) -> Bench:
    model = make_model(**SHAPE | changes).to(device, DTYPES[dtype])
    return bench_of(model, tokenizer, windows_for(tokenizer))


@pytest.fixture(scope="module")
def reference(tokenizer) -> Bench:
    """The same model on the CPU, in float32."""
    return bench_on(torch.device("cpu"), "float32", tokenizer)


def test_perplexity_is_stock_transformers(device, dtype, tokenizer, reference):
    bench = bench_on(device, dtype, tokenizer)
    measured = evaluate(bench.loaded.model, bench.evaluation)
    stock = reference.loaded.model
    ids = bench.evaluation.ids
    loss = torch.stack([stock(window[None], labels=window[None]).loss for window in ids]).mean()
    assert measured.nll.dtype == torch.float32
    assert measured.scored_tokens == ids.shape[0] * (ids.shape[1] - 1)
    assert measured.perplexity == pytest.approx(loss.exp().item(), rel=TOLERANCE[dtype])


def test_statistics_are_the_cpus(device, dtype, tokenizer, reference):
    found = bench_on(device, dtype, tokenizer).statistics()
    wanted = reference.statistics()
    for module in ("mha", "mlp"):
        rms, expected = getattr(found, module).rms, getattr(wanted, module).rms
        assert rms.shape == expected.shape
        torch.testing.assert_close(
            rms.cpu().double(), expected.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_scores_rank_units_as_on_the_cpu(device, dtype, tokenizer, reference, importance):
    found = bench_on(device, dtype, tokenizer).scores(importance)
    wanted = reference.scores(importance)
    channels, expected = found.channels, wanted.channels
    assert torch.isfinite(channels).all()
    ranks = [scores.argsort(-1).argsort(-1).double() for scores in (channels, expected)]
    agreement = torch.corrcoef(torch.stack([rank.flatten() for rank in ranks]))[0, 1]
    assert agreement > (0.999 if dtype == "float32" else 0.95)


@pytest.mark.parametrize("recovery", ["none", "bias", "least-squares"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_cut_is_carried_out_and_repaired(
    device, dtype, tokenizer, reference, granularity, recovery
):
    bench = bench_on(device, dtype, tokenizer)
    plan = reference.plan(*RATIOS, Choices(granularity=granularity))
    model, measurement = compress(bench, plan, recovery)
    expected = compress(reference, plan, recovery)[1]
    assert {weight.device.type for weight in model.parameters()} == {device.type}
    assert {weight.dtype for weight in model.parameters()} == {DTYPES[dtype]}
    assert measurement.perplexity == pytest.approx(expected.perplexity, rel=TOLERANCE[dtype])
    assert measurement.footprint.parameters == sum(weight.numel() for weight in model.parameters())
    assert len(measurement.fits) == len(expected.fits)
    for fit in measurement.fits:
        assert fit.ridge is None or fit.recovered_error < fit.bare_error


@torch.no_grad()
def test_removed_equals_zeroed(device, dtype, tokenizer, reference):
    """What is cut out leaves the same logits as the dense model with those channels silenced."""
    plan = reference.plan(0.0, RATIOS[1], Choices())
    dense = make_model(**SHAPE).to(device, DTYPES[dtype])
    ids = torch.arange(3, 99, device=device).reshape(4, 24) % VOCAB_SIZE
    found = prune(dense, plan)(ids).logits.float()
    for decoder, layer in zip(dense.model.layers, plan.layers, strict=True):
        removed = torch.ones(decoder.mlp.down_proj.in_features, dtype=torch.bool, device=device)
        removed[torch.tensor(layer.kept_channels, device=device)] = False
        decoder.mlp.down_proj.weight[:, removed] = 0
    wanted = dense(ids).logits.float()
    tolerance = 1e-4 if dtype == "float32" else 5e-2
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def test_damage_curves_fall_to_nothing_at_full_width(device, dtype, tokenizer, reference):
    choices = Choices()
    found = bench_on(device, dtype, tokenizer).damage(choices)
    wanted = reference.damage(choices)
    plan = reference.plan(*RATIOS, choices).applied_to(reference.loaded.architecture)
    shape = reference.loaded.architecture
    for module, width, full in (
        ("mha", plan.mha_width, shape.mha_width),
        ("mlp", plan.intermediate_size, shape.intermediate_size),
    ):
        curve, expected = getattr(found, module), getattr(wanted, module)
        loss = curve.at([width, full])
        assert (loss[..., 0] > loss[..., 1]).all() if loss.ndim > 1 else loss[0] > loss[1]
        assert loss == pytest.approx(expected.at([width, full]), rel=0.2, abs=1e-3)


def test_the_command_line_from_checkpoint_to_export(
    device, dtype, tokenizer, text_file, tmp_path, capsys
):
    source, output = tmp_path / "source", tmp_path / "out"
    make_model(**SHAPE).save_pretrained(source)
    tokenizer.save_pretrained(source)
    evaluation = ["--evaluation", str(text_file), "--evaluation-tokens", "256"]
    shared = [*evaluation, "--sequence-length", "32", "--device", device.type, "--dtype", dtype]
    calibration = ["--calibration", str(text_file), "--calibration-tokens", "1024"]
    ratios = ["--mha-ratio", "0.34", "--mlp-ratio", "0.3", "--output", str(output)]
    assert main(["prune", "--model", str(source), *ratios, *calibration, *shared, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert main(["evaluate", "--model", str(output), *shared, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    perplexity = json.loads((output / "report.json").read_text())["pruned"]["perplexity"]
    assert report["pruned"]["perplexity"] == perplexity
    measured = next(again[key] for key in ("dense", "model", "pruned") if again.get(key))
    assert measured["perplexity"] == pytest.approx(perplexity, rel=1e-5)
