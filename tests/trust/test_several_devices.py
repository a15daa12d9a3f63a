"""The engine on a model whose layers are laid over two devices, which refuse each other's tensors."""

import pytest
import torch

from tests import no_float64
from tests.conftest import KINDS, bench_of, make_model, windows_for
from tests.no_float64 import SEVERAL, Elsewhere, elsewhere, measured_alike, move, simulated
from transact_core.experiments.bench import Choices, compress
from transact_core.experiments.decide import decide
from transact_core.experiments.head_probe import attention_pattern, without_head
from transact_core.export import folder
from transact_core.export.compression import describe_compression
from transact_core.forward import stream, waists
from transact_core.forward.continuations import Request, score_continuations
from transact_core.forward.generation import generate
from transact_core.forward.imatrix import importance_matrix
from transact_core.forward.layers import weights_of
from transact_core.forward.perplexity import evaluate
from transact_core.forward.statistics import collect
from transact_core.forward.token_damage import measure_token_damage
from transact_core.importance.elimination import eliminate
from transact_core.models.checkpoint_folder import read_checkpoint
from transact_core.models.placement import devices_of, hand_on, layout_of
from transact_core.planning.prices import HeldOut, marginal_losses, single_losses
from transact_core.pruning import narrow_heads
from transact_core.pruning.closed_form import recover
from transact_core.pruning.plan import Decision
from transact_core.pruning.surgery import prune


@pytest.fixture
def there():
    with simulated(has_float64=True):
        yield


def laid_over(model):
    for layer, device in zip(model.model.layers, SEVERAL, strict=True):
        move(layer, device)
    move(model, SEVERAL[0])
    hand_on(model)
    return model


KIND = KINDS["gqa-biased-tied"] | {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
}
RATIOS = 0.5, 0.3


@pytest.fixture
def benches(tokenizer, there, monkeypatch):
    """The same model on the CPU, and with each of its two layers on a device of its own."""
    # Narrower heads are fitted in fewer steps: only where they are fitted matters here.
    for name in ("ITERATIONS", "ROUNDS"):
        monkeypatch.setattr(narrow_heads, name, 1)
    windows = windows_for(tokenizer, calibration_tokens=64, evaluation_tokens=64)
    on_cpu, on_devices = (bench_of(make_model(**KIND), tokenizer, windows) for _ in range(2))
    # What is measured is kept by the weights' fingerprint, and must not be shared here.
    on_devices.loaded.weight_files["devices"] = "0" * 64
    laid_over(on_devices.loaded.model)
    return on_cpu, on_devices


def close(ours, expected, tolerance=1e-4):
    assert not isinstance(ours, Elsewhere)
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def test_the_simulated_devices_refuse_what_real_ones_do(there):
    one, other = (elsewhere(torch.ones(2, 3), device) for device in SEVERAL)
    for mixed in (torch.add, torch.matmul, lambda x, y: torch.cat([x, y]), torch.Tensor.add_):
        with pytest.raises(RuntimeError, match="two devices"):
            mixed(one, other.T if mixed is torch.matmul else other)
    with pytest.raises(RuntimeError, match="two devices"):
        one + other.sum()
    assert (one + other.to(one.device)).device == one.device
    assert one.copy_(other).device == one.device


def test_a_forgotten_hand_over_is_noticed(benches, monkeypatch):
    _, bench = benches
    monkeypatch.setattr(stream, "device_of", lambda layer: SEVERAL[0])
    with pytest.raises(RuntimeError, match="two devices"):
        bench.statistics()


def test_it_is_measured_as_on_one_device(benches):
    on_cpu, bench = benches
    model = bench.loaded.model
    assert devices_of(model) == layout_of(model) == bench.loaded.devices == SEVERAL
    measured_alike(bench, on_cpu, close)
    close(bench.pairs().effects, on_cpu.pairs().effects)


@pytest.mark.parametrize(
    ("granularity", "recovery"),
    [("query-heads", "least-squares"), ("head-dims", "least-squares"), ("kv-groups", "bias")],
)
def test_a_cut_stays_where_the_dense_layers_are(benches, granularity, recovery):
    choices, losses = Choices(granularity=granularity, recovery=recovery), []
    for bench in benches:
        pruned, measured = compress(bench, bench.plan(*RATIOS, choices), recovery)
        losses.append(measured.evaluation.nll)
    assert layout_of(pruned) == SEVERAL
    assert {tensor.device for _, tensor in weights_of(pruned)} == set(SEVERAL)
    if granularity == "head-dims":
        assert losses[1].mean().item() == pytest.approx(losses[0].mean().item(), rel=0.05)
    else:
        close(*losses, 1e-3)


def test_a_written_cut_is_measured_where_the_dense_layers_were(benches, tmp_path, monkeypatch):
    _, bench = benches
    plan = bench.plan(*RATIOS, Choices())
    expected = compress(bench, plan, "least-squares")[1]
    asked = []

    def read_and_lay_over(path, dtype, device, of_layers):
        asked.append((device, of_layers))
        return laid_over(read_checkpoint(path, dtype))

    monkeypatch.setattr(folder, "spread_checkpoint", read_and_lay_over)
    compression = describe_compression(bench, Decision(plan), "least-squares")
    measured = folder.compress_to_folder(tmp_path / "out", bench, compression)
    assert asked == [(SEVERAL[0], SEVERAL)]
    assert torch.equal(measured.evaluation.nll, expected.evaluation.nll)


def test_decisions_damage_prices_and_probes(benches):
    choices = Choices(importance="reconstruction", sequential=True)
    assert len({decide(bench, *RATIOS, choices).plan for bench in benches}) == 1
    damages = [bench.damage(choices) for bench in benches]
    priced = []
    for bench in benches:
        model = bench.loaded.model
        held_out = HeldOut.of(model, bench.evaluation, ["text"] * len(bench.evaluation))
        order = torch.arange(16).repeat(2, 1)
        levels = single_losses(
            model, bench.calibration, held_out, "mlp", order, [12], "least-squares"
        )
        heads = torch.arange(32).repeat(2, 1)
        bare = single_losses(model, bench.calibration, held_out, "mha", heads, [24], "bias")
        cut = compress(bench, bench.plan(*RATIOS, choices), "bias")[0]
        losses, shares = marginal_losses(model, cut, held_out)
        priced.append([levels, bare, losses, *shares.values()])
        priced[-1].append(without_head(bench, 1, 2).evaluation.nll)
        priced[-1].append(attention_pattern(model, bench.evaluation, 1))
        priced[-1].append(measure_token_damage(model, cut, bench.evaluation).divergence)
    for module in ("mha", "mlp"):
        close(*(getattr(damage, module).errors for damage in reversed(damages)), 1e-3)
    for expected, ours in zip(*priced, strict=True):
        close(ours, expected, 1e-3)


def test_what_runs_the_model_as_a_whole(benches):
    on_cpu, on_devices = (bench.loaded.model for bench in benches)
    windows = benches[0].evaluation
    close(evaluate(on_devices, windows).nll, evaluate(on_cpu, windows).nll)
    prompt = windows.ids[0, :8].tolist()
    written = [[token.id for token in generate(each, prompt, 3)] for each in (on_cpu, on_devices)]
    assert written[0] == written[1]
    # Two answers share the tokens of their question, under a mask of their own.
    asked = [[Request(tuple(prompt), (5, 6)), Request(tuple(prompt), (9,))]]
    answers = [score_continuations(each, asked, 64)[0] for each in (on_cpu, on_devices)]
    for expected, ours in zip(*answers, strict=True):
        assert ours.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-4)
    expected, ours = (importance_matrix(each, windows) for each in (on_cpu, on_devices))
    assert ours.keys() == expected.keys()
    for name, means in ours.items():
        assert means == pytest.approx(expected[name], rel=1e-3)


@pytest.mark.parametrize("work", ["statistics", "reconstruction", "repair", "perplexity"])
def test_the_cpu_waits_for_a_layer_and_not_for_each_window(work, tokenizer, there, monkeypatch):
    """Else the device would stand still in every loop over the windows."""
    monkeypatch.setattr(waists, "BATCH_TOKENS", 32)  # one window
    counts = {}
    for windows in (4, 12):
        texts = windows_for(tokenizer, windows * 32, windows * 32)
        bench = bench_of(move(make_model(**KIND)), tokenizer, texts)
        model = bench.loaded.model
        plan = None
        if work == "repair":
            plan = bench.plan(*RATIOS, Choices(importance="magnitude"))
        no_float64.waits.clear()
        if work == "statistics":
            collect(model, bench.calibration)
        elif work == "reconstruction":
            eliminate(model, bench.calibration)
        elif work == "repair":
            recover(model, prune(model, plan), plan, bench.calibration, "least-squares")
        else:
            evaluate(model, bench.evaluation)
        counts[windows] = no_float64.waits.total()
    assert counts[4] > 0
    # Of 8 windows more, each is waited for once by the model's own code, which looks at the
    # positions, and a repair may try other ridges. Once in each of both layers would be 16.
    assert counts[12] - counts[4] < 14, counts
