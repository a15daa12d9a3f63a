"""The whole engine on a device that has no float64, as Apple's GPUs have none."""

import pytest
import torch

from tests.conftest import KINDS, bench_of, make_model, windows_for
from tests.no_float64 import Elsewhere, elsewhere, measured_alike, move, simulated
from transact_core.base.linalg import in_float64
from transact_core.experiments.bench import Choices, compress
from transact_core.experiments.head_probe import attention_pattern, without_head
from transact_core.experiments.premise import DISTURBANCES, disturb_all_layers
from transact_core.forward.perplexity import evaluate
from transact_core.pruning import narrow_heads


@pytest.fixture
def there():
    with simulated():
        yield


def close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert not isinstance(ours, Elsewhere)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "operation",
    [
        torch.Tensor.double,
        lambda x: x + torch.ones(3),
        lambda x: x.sum(dtype=torch.float64),
        lambda x: x.new_zeros(3, dtype=torch.float64),
        lambda x: torch.zeros(3, dtype=torch.float64, device=x.device),
        lambda x: torch.ones(3, dtype=torch.float64).to(x.device),
    ],
)
def test_the_simulated_device_refuses_what_a_real_one_does(there, operation):
    with pytest.raises((TypeError, RuntimeError), match=r"float64|two devices"):
        operation(elsewhere(torch.ones(2, 3)))


def test_values_move_to_the_cpu_before_they_become_float64(there):
    moved = in_float64(elsewhere(torch.ones(2, 3)))
    assert moved.device.type == "cpu"
    assert moved.dtype == torch.float64
    here = torch.ones(2, 3, dtype=torch.float64)
    assert in_float64(here) is here


@pytest.fixture(params=["gqa-tied", "mha-biased"])
def benches(request, tokenizer, there):
    """The same model on the CPU and on the simulated device."""
    windows = windows_for(tokenizer, calibration_tokens=320, evaluation_tokens=64)
    on_cpu, on_device = (
        bench_of(make_model(**KINDS[request.param], num_hidden_layers=2), tokenizer, windows)
        for _ in range(2)
    )
    # What is measured is kept by the weights' fingerprint, and must not be shared here.
    on_device.loaded.weight_files["device"] = "simulated"
    move(on_device.loaded.model)
    return on_cpu, on_device


def test_statistics_and_importances_are_measured(benches):
    on_cpu, on_device = benches
    measured_alike(on_device, on_cpu, close)


@pytest.mark.parametrize("recovery", ["least-squares", "bias"])
@pytest.mark.parametrize("granularity", ["query-heads", "kv-groups", "head-dims"])
def test_a_cut_is_made_repaired_and_measured(benches, granularity, recovery, monkeypatch):
    # Narrower heads are fitted in fewer steps: that each step can be made is what matters here.
    monkeypatch.setattr(narrow_heads, "ROUNDS", 1)
    monkeypatch.setattr(narrow_heads, "ITERATIONS", 3)
    choices = Choices(granularity=granularity, recovery=recovery)
    losses = []
    for bench in benches:
        pruned, repair = compress(bench, bench.plan(0.34, 0.3, choices), recovery)[:2]
        assert any(fit.recovered_error < fit.bare_error for fit in repair.fits)
        losses.append(evaluate(pruned, bench.evaluation).nll)
    assert pruned.device.type == "meta"
    if granularity == "head-dims":
        # Rounding decides which keys are sampled, and so the fit, but hardly how good it is.
        assert losses[1].mean().item() == pytest.approx(losses[0].mean().item(), rel=0.05)
    else:
        torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)


def test_damage_and_probes_are_measured(benches):
    damages = [bench.damage(Choices(granularity="query-heads")) for bench in benches]
    for module in ("mha", "mlp"):
        expected, ours = (getattr(damage, module).errors for damage in damages)
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
    for disturbance in DISTURBANCES:
        ours, expected = (list(disturb_all_layers(b, disturbance, [0.5], 2)) for b in benches)
        for mine, theirs in zip(ours, expected, strict=True):
            close(mine.evaluation.nll, theirs.evaluation.nll)
    patterns = [attention_pattern(bench.loaded.model, bench.evaluation, 1) for bench in benches]
    close(patterns[1], patterns[0])
    losses = [without_head(bench, 1, 2).evaluation.nll for bench in benches]
    close(losses[1], losses[0])
