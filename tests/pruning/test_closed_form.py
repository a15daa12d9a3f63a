import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import bench_of, make_model, same_weights, snapshot, windows_for
from transact_core.base.errors import TransActError
from transact_core.data.windows import Windows
from transact_core.experiments.bench import Choices
from transact_core.forward.waists import output_projections
from transact_core.pruning import closed_form as recovery
from transact_core.pruning import narrow_heads as narrowing
from transact_core.pruning.closed_form import recover, require_recovery
from transact_core.pruning.surgery import prune


def test_one_window_cannot_be_judged_and_keeps_the_bare_cut(gqa_bench):
    dense, windows = gqa_bench.loaded.model, gqa_bench.calibration
    plan = gqa_bench.plan(0.5, 0.4, Choices())
    pruned = prune(dense, plan)
    one = Windows(windows.source, windows.sha256, windows.ids[:1])
    fits = recover(dense, pruned, plan, one, "least-squares").fits
    assert all(fit.ridge is None for fit in fits)
    assert same_weights(pruned, snapshot(prune(dense, plan)))


def test_a_bias_is_the_weighted_mean_of_what_was_cut(bench, tmp_path):
    dense, windows = bench.loaded.model, bench.calibration
    plan = bench.plan(0.5, 0.4, Choices())
    pruned = prune(dense, plan, with_biases=True)
    fits = recover(dense, pruned, plan, windows, "bias").fits
    assert {fit.ridge for fit in fits} <= {0.0, None}

    # The first module sees the same stream in both models; its own bias comes on top.
    before = prune(dense, plan, with_biases=True)
    layer, cut = dense.model.layers[0], before.model.layers[0]
    total, weight_sum = 0, 0
    for window in windows.ids:
        hidden = dense.model.embed_tokens(window[None])
        rotary = dense.model.rotary_emb(hidden, torch.arange(len(window))[None])
        normed = layer.input_layernorm(hidden)
        whole = layer.self_attn(normed, position_embeddings=rotary)[0][0]
        bare = cut.self_attn(normed, position_embeddings=rotary)[0][0]
        for token in range(len(window)):
            weight = 1 / (hidden[0, token] + whole[token]).square().mean().sqrt()
            total, weight_sum = total + weight * (whole - bare)[token], weight_sum + weight
    changed = pruned.model.layers[0].self_attn.o_proj.bias - cut.self_attn.o_proj.bias
    if fits[0].ridge is not None:
        torch.testing.assert_close(changed, total / weight_sum, rtol=1e-3, atol=1e-5)

    cost = bench.footprint(plan, "bias")
    assert cost.parameters == sum(weight.numel() for weight in pruned.parameters())
    pruned.save_pretrained(tmp_path)
    ids = windows.ids[:2]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(stock(ids).logits, pruned(ids).logits)


def test_errors_told_are_those_on_windows_no_fit_has_seen(gqa_bench):
    """The first module's error again, from its folds, with nothing but matrix algebra."""
    dense, windows = gqa_bench.loaded.model, gqa_bench.calibration
    plan = gqa_bench.plan(0.5, 0, Choices())
    pruned, bare = prune(dense, plan), prune(dense, plan)
    fit = recover(dense, pruned, plan, windows, "least-squares").fits[0]
    hidden = dense.model.embed_tokens(windows.ids)
    rotary = dense.model.rotary_emb(hidden, torch.arange(windows.sequence_length)[None])
    seen = []
    projection = output_projections(bare.model.layers[0])["mha"]
    handle = projection.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    normed = dense.model.layers[0].input_layernorm(hidden)
    written = bare.model.layers[0].self_attn(normed, position_embeddings=rotary)[0]
    handle.remove()
    wanted = dense.model.layers[0].self_attn(normed, position_embeddings=rotary)[0]
    root = (hidden + wanted).square().mean(-1, keepdim=True).pow(-1 / 4).double()
    x, y = seen[0].double() * root, (wanted - written).double() * root
    left = 0.0
    for fold in torch.arange(len(windows)).tensor_split(recovery.FOLDS):
        others = torch.tensor([n for n in range(len(windows)) if n not in fold.tolist()])
        features, missing = x[others].flatten(0, 1), y[others].flatten(0, 1)
        energy = features.square().sum(dim=0)
        damped = features.T @ features + fit.ridge * torch.diag(energy + 1e-3 * energy.mean())
        change = torch.linalg.solve(damped, features.T @ missing)
        left += (y[fold] - x[fold] @ change).square().sum().item()
    scale = (wanted.double() * root).square().sum().item()
    assert fit.recovered_error == pytest.approx(left / scale, rel=1e-4)
    assert fit.bare_error == pytest.approx(y.square().sum().item() / scale, rel=1e-4)


def test_the_repair_lowers_the_error_and_touches_only_the_cut_projections(bench):
    dense = bench.loaded.model
    before = snapshot(dense)
    plan = bench.plan(0.5, 0.4, Choices())
    bare, repaired = prune(dense, plan), prune(dense, plan)
    fits = recover(dense, repaired, plan, bench.calibration, "least-squares").fits
    assert same_weights(dense, before)
    assert [(fit.layer, fit.module) for fit in fits] == [
        (layer, module) for layer in range(3) for module in ("mha", "mlp")
    ]
    for fit in fits:
        assert fit.recovered_error <= fit.bare_error
        assert (fit.ridge is None) == (fit.recovered_error == fit.bare_error)
    assert any(fit.recovered_error < 0.9 * fit.bare_error for fit in fits)
    for (name, one), other in zip(bare.named_parameters(), repaired.parameters(), strict=True):
        fitted = name.endswith(("o_proj.weight", "down_proj.weight"))
        assert fitted or torch.equal(one, other)


@pytest.mark.parametrize(("ratios", "module"), [((0.5, 0), "mha"), ((0, 0.5), "mlp")])
def test_a_module_that_is_not_cut_is_not_repaired(gqa_bench, ratios, module):
    dense = gqa_bench.loaded.model
    plan = gqa_bench.plan(*ratios, Choices())
    pruned = prune(dense, plan)
    fits = recover(dense, pruned, plan, gqa_bench.calibration, "least-squares").fits
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
    plan = plan.model_copy(update={"layers": layers})
    pruned = prune(model, plan)
    ids = windows[1].ids[:2]
    bare = (pruned(ids).logits - model(ids).logits).square().mean()
    fits = recover(model, pruned, plan, windows[0], "least-squares").fits
    repaired = (pruned(ids).logits - model(ids).logits).square().mean()
    assert max(fit.recovered_error for fit in fits) < 0.05
    assert repaired < 0.05 * bare


def test_no_repair_is_kept_that_is_worse_on_held_out_windows(gqa_bench, monkeypatch):
    monkeypatch.setattr(
        "transact_core.pruning.ridge.solve_factored", lambda _, right: torch.ones_like(right)
    )
    dense = gqa_bench.loaded.model
    plan = gqa_bench.plan(0.5, 0.4, Choices())
    pruned = prune(dense, plan)
    fits = recover(dense, pruned, plan, gqa_bench.calibration, "least-squares").fits
    assert all(fit.ridge is None for fit in fits)
    assert same_weights(pruned, snapshot(prune(dense, plan)))


def test_heads_whose_fit_breaks_down_keep_their_bare_cut(gqa_bench, monkeypatch):
    monkeypatch.setattr(
        narrowing, "_fit_query", lambda query_map, *_: torch.full_like(query_map, torch.inf)
    )
    dense = gqa_bench.loaded.model
    plan = gqa_bench.plan(0.5, 0, Choices("head-dims"))
    pruned, bare = prune(dense, plan), prune(dense, plan)
    recover(dense, pruned, plan, gqa_bench.calibration, "least-squares")
    for mine, theirs in zip(pruned.model.layers, bare.model.layers, strict=True):
        for name in ("q_proj", "k_proj", "v_proj"):
            expected = theirs.self_attn.get_submodule(name).weight
            assert torch.equal(mine.self_attn.get_submodule(name).weight, expected)


def test_two_runs_give_the_same_bits(gqa_bench):
    dense, plan = gqa_bench.loaded.model, gqa_bench.plan(0.5, 0.4, Choices())
    twice = [prune(dense, plan), prune(dense, plan)]
    for pruned in twice:
        recover(dense, pruned, plan, gqa_bench.calibration, "least-squares")
    assert same_weights(twice[0], snapshot(twice[1]))


@pytest.mark.parametrize("granularity", ["query-heads", "head-dims"])
def test_what_is_only_judged_is_judged_as_what_is_kept(gqa_bench, granularity):
    dense, windows = gqa_bench.loaded.model, gqa_bench.calibration
    plan = gqa_bench.plan(0.5, 0.4, Choices(granularity))
    whole, judged = (
        recover(dense, prune(dense, plan), plan, windows, "least-squares", judge_only=only)
        for only in (False, True)
    )
    assert judged.fits == whole.fits
    assert torch.equal(judged.hidden, whole.hidden)


def test_an_unknown_recovery_is_refused():
    with pytest.raises(TransActError, match="least-squares"):
        require_recovery("magic")
    for name in recovery.RECOVERIES:
        require_recovery(name)
