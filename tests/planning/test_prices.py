"""What one module's cut does to the predictions, against models that are cut and run whole."""

import copy

import pytest
import torch
from torch.nn import functional

from tests.conftest import KINDS, bench_of, make_model
from tests.models.families.made import make_member
from transact_core.data.windows import Windows
from transact_core.experiments.bench import Choices, carry_out
from transact_core.forward.waists import output_projections
from transact_core.planning.damage import kept_first
from transact_core.planning.prices import (
    RIDGE,
    SCORED_EVERY,
    HeldOut,
    marginal_losses,
    repaired,
    single_losses,
)


def held_out_of(model, windows) -> HeldOut:
    held_out = Windows("a+b", "", windows[1].ids[:3, :20])
    return HeldOut.of(model, held_out, ("a", "a", "b"))


def divergences(dense, other, ids) -> torch.Tensor:
    """The slow reference: both models whole, on whole windows."""
    log_p, log_q = (
        model(ids).logits[:, ::SCORED_EVERY].double().log_softmax(-1) for model in (dense, other)
    )
    return functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean(-1)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("module", ["mha", "mlp"])
def test_a_bare_cut_alone_is_that_of_a_model_with_zeros(kind, module, tokenizer, windows):
    model = make_model(**KINDS["gqa"]) if kind == "llama" else make_member("gemma3", grouped=False)
    held_out = held_out_of(model, windows)
    width = output_projections(model.model.layers[0])[module].in_features
    order = torch.stack([torch.randperm(width) for _ in model.model.layers])
    levels = [width // 2, width // 4]
    found = single_losses(model, windows[0], held_out, module, order, levels, "none")
    assert found.shape == (len(model.model.layers), 2, 3)
    for layer_index, kept in ((0, 0), (1, 1)):
        cut = copy.deepcopy(model)
        projection = output_projections(cut.model.layers[layer_index])[module]
        projection.weight[:, order[layer_index, levels[kept] :]] = 0
        expected = divergences(model, cut, held_out.windows.ids)
        torch.testing.assert_close(found[layer_index, kept], expected, rtol=1e-3, atol=1e-6)


def test_a_repair_is_the_ridge_regression_on_the_weighted_waist():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    rows[:, -1] = rows[:, -1].abs()  # the constant, times the token's weight
    projection = torch.nn.Linear(5, 4, bias=False).requires_grad_(False)
    weight, moments = projection.weight.double(), (rows.T @ rows).float()
    order, kept = torch.tensor([3, 0, 4, 1, 2]), 3
    made = repaired(projection, moments, order, kept, "least-squares")
    x, y = rows[:, order[:kept]], rows[:, order[kept:]] @ weight[:, order[kept:]].T
    energy = x.square().sum(0)
    ridges = torch.diag((RIDGE * energy).sqrt())
    change = torch.linalg.lstsq(
        torch.cat([x, ridges]), torch.cat([y, torch.zeros(kept, 4, dtype=torch.float64)])
    ).solution
    expected = (weight[:, order[:kept]] + change.T).float()
    torch.testing.assert_close(made.weight[:, order[:kept]], expected, rtol=2e-3, atol=1e-4)
    assert not made.weight[:, order[kept:]].any()
    with_mean = repaired(projection, moments, order, kept, "bias")
    mean = (rows[:, order[kept:]] * rows[:, -1:]).sum(0) / rows[:, -1].square().sum()
    torch.testing.assert_close(
        with_mean.bias, (weight[:, order[kept:]] @ mean).float(), rtol=1e-4, atol=1e-6
    )


def test_parts_of_a_cut_are_half_its_slope_towards_each_dense_module(tokenizer, windows):
    model = make_model(**KINDS["gqa"])
    bench = bench_of(model, tokenizer, windows)
    cut, _ = carry_out(bench, bench.plan(0.5, 0.4, Choices()), "least-squares")
    held_out = held_out_of(model, windows)
    ids = held_out.windows.ids
    whole, parts = marginal_losses(model, cut, held_out)
    torch.testing.assert_close(whole, divergences(model, cut, ids), rtol=1e-4, atol=1e-6)

    def towards_dense(layer_index: int, module: str, step: float) -> torch.Tensor:
        """The divergence with one module's output a little on the way to the dense module's."""
        name = {"mha": "self_attn", "mlp": "mlp"}[module]
        cut_module = cut.model.layers[layer_index].get_submodule(name)
        dense_module = model.model.layers[layer_index].get_submodule(name)

        def mix(_, inputs, named, written):
            wanted = dense_module(*inputs, **named)
            if module == "mlp":
                return written + step * (wanted - written)
            return written[0] + step * (wanted[0] - written[0]), *written[1:]

        hook = cut_module.register_forward_hook(mix, with_kwargs=True)
        found = divergences(model, cut, ids)
        hook.remove()
        return found

    for layer_index, module in ((0, "mha"), (1, "mlp"), (2, "mlp")):
        before, after = (towards_dense(layer_index, module, step) for step in (-1e-2, 1e-2))
        slope = (before - after) / 2e-2
        torch.testing.assert_close(parts[module][layer_index], slope / 2, rtol=2e-2, atol=2e-4)


def test_means_are_taken_by_kind(tokenizer, windows):
    held_out = held_out_of(make_model(), windows)
    means = held_out.by_kind(torch.tensor([[1.0, 3.0, 7.0]]))
    assert means.tolist() == [[2.0, 7.0]]


def test_the_order_of_channels_is_the_plans(tokenizer, windows):
    bench = bench_of(make_model(**KINDS["gqa"]), tokenizer, windows)
    shape = bench.loaded.architecture
    orders = kept_first(bench.scores("activation"), shape)
    plan = bench.plan(0.5, 0.4, Choices())
    kept = orders["mlp"]["mlp"][:, : plan.intermediate_size].sort(dim=1).values
    assert kept.tolist() == [list(layer.kept_channels) for layer in plan.layers]
