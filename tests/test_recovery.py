import pytest
import torch

from tests.conftest import bench_of, make_model, same_weights, snapshot, windows_for
from transact_core import recovery
from transact_core.errors import TransActError
from transact_core.recovery import _Moments, least_squares, require_recovery
from transact_core.surgery import prune
from transact_core.sweep import Choices


def test_the_solution_is_that_of_plain_least_squares():
    torch.manual_seed(0)
    inputs, missing = torch.randn(4, 50, 12), torch.randn(4, 50, 5)
    moments = _Moments.of(inputs, missing)
    expected = torch.linalg.lstsq(inputs.flatten(0, 1), missing.flatten(0, 1)).solution
    torch.testing.assert_close(moments.solve(1e-9).float(), expected, rtol=1e-4, atol=1e-5)
    left = missing.flatten(0, 1) - inputs.flatten(0, 1) @ expected
    assert moments.error(expected.double()) == pytest.approx(left.square().sum().item(), rel=1e-4)


def test_a_strong_ridge_keeps_the_bare_cut():
    torch.manual_seed(0)
    moments = _Moments.of(torch.randn(2, 50, 12), torch.randn(2, 50, 5))
    assert moments.solve(1e12).abs().max() < 1e-9


def test_the_repair_lowers_the_error_and_touches_only_the_cut_projections(bench):
    dense = bench.loaded.model
    before = snapshot(dense)
    plan = bench.plan(0.5, 0.4, Choices())
    bare, repaired = prune(dense, plan), prune(dense, plan)
    fits = least_squares(dense, repaired, bench.calibration)
    assert same_weights(dense, before)
    assert [(fit.layer, fit.module) for fit in fits] == [
        (layer, module) for layer in range(3) for module in ("mha", "mlp")
    ]
    for fit in fits:
        assert fit.recovered_error <= fit.bare_error
        assert (fit.ridge is None) == (fit.recovered_error == fit.bare_error)
    assert any(fit.recovered_error < 0.9 * fit.bare_error for fit in fits)
    for (name, one), other in zip(
        bare.named_parameters(), repaired.parameters(), strict=True
    ):  # fmt: skip
        fitted = name.endswith(("o_proj.weight", "down_proj.weight"))
        assert fitted or torch.equal(one, other)


@pytest.mark.parametrize(("ratios", "module"), [((0.5, 0), "mha"), ((0, 0.5), "mlp")])
def test_a_module_that_is_not_cut_is_not_repaired(gqa_bench, ratios, module):
    dense = gqa_bench.loaded.model
    pruned = prune(dense, gqa_bench.plan(*ratios, Choices()))
    fits = least_squares(dense, pruned, gqa_bench.calibration)
    assert {fit.module for fit in fits} == {module}
    other = {"mha": "mlp.down_proj", "mlp": "self_attn.o_proj"}[module]
    for mine, theirs in zip(pruned.model.layers, dense.model.layers, strict=True):
        assert mine.get_submodule(other).weight is theirs.get_submodule(other).weight


def test_duplicated_channels_are_removed_without_loss(tokenizer):
    """Where the kept channels can say all that the removed ones said, nothing is lost."""
    model = make_model(num_key_value_heads=3, intermediate_size=40)
    for layer in model.model.layers:
        for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
            projection.weight[20:] = projection.weight[:20]
    windows = windows_for(tokenizer, calibration_tokens=2048)
    bench = bench_of(model, tokenizer, windows)
    plan = bench.plan(0, 0.5, Choices())
    halves = [tuple(index + 20 * (index % 2) for index in range(20)) for _ in plan.layers]
    layers = tuple(
        layer.model_copy(update={"kept_channels": tuple(sorted(half))})
        for layer, half in zip(plan.layers, halves, strict=True)
    )
    pruned = prune(model, plan.model_copy(update={"layers": layers}))
    ids = windows[1].ids[:2]
    bare = (pruned(ids).logits - model(ids).logits).square().mean()
    fits = least_squares(model, pruned, windows[0])
    repaired = (pruned(ids).logits - model(ids).logits).square().mean()
    assert max(fit.recovered_error for fit in fits) < 0.05
    assert repaired < 0.05 * bare


def test_no_repair_is_kept_that_is_worse_on_held_out_windows(gqa_bench, monkeypatch):
    monkeypatch.setattr(_Moments, "solve", lambda self, ridge: torch.ones_like(self.cross))
    dense = gqa_bench.loaded.model
    plan = gqa_bench.plan(0.5, 0.4, Choices())
    pruned = prune(dense, plan)
    fits = least_squares(dense, pruned, gqa_bench.calibration)
    assert all(fit.ridge is None for fit in fits)
    assert same_weights(pruned, snapshot(prune(dense, plan)))


def test_two_runs_give_the_same_bits(gqa_bench):
    dense, plan = gqa_bench.loaded.model, gqa_bench.plan(0.5, 0.4, Choices())
    twice = [prune(dense, plan), prune(dense, plan)]
    for pruned in twice:
        least_squares(dense, pruned, gqa_bench.calibration)
    assert same_weights(twice[0], snapshot(twice[1]))


def test_an_unknown_recovery_is_refused():
    with pytest.raises(TransActError, match="least-squares"):
        require_recovery("magic")
    for name in recovery.RECOVERIES:
        require_recovery(name)
