"""Every family is cut as honestly as LLaMA: bits, zeroed units, slow references, plain loops.

Of each there are models with heads of their own keys and in groups, tied and untied.
"""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from tests.conftest import bench_of, same_weights, snapshot, windows_for
from tests.models.families.made import KINDS, MEMBERS, make_member
from transact_core.base.errors import TransActError
from transact_core.experiments.bench import Bench, Choices, compress
from transact_core.experiments.decide import decide, granularities_of
from transact_core.experiments.head_probe import attention_pattern
from transact_core.export.compression import describe_compression
from transact_core.export.folder import compress_to_folder
from transact_core.forward.continuations import Request, score_continuations
from transact_core.forward.layers import logits_of
from transact_core.forward.perplexity import evaluate, losses_behind_layers
from transact_core.forward.statistics import collect
from transact_core.forward.stream import Stream, added, run_module
from transact_core.forward.token_damage import measure_token_damage
from transact_core.forward.waists import MODULES, head_rows, output_projections
from transact_core.importance.gradients import channel_sums, collect_saliences
from transact_core.models.architecture import Architecture
from transact_core.models.families.table import FAMILIES
from transact_core.models.footprint import footprint
from transact_core.models.load import load_model
from transact_core.pruning.closed_form import recover
from transact_core.pruning.plan import GRANULARITIES, Decision
from transact_core.pruning.surgery import prune

IDS = torch.arange(3, 99).reshape(4, 24)
ONCE = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(params=KINDS)
def dense(request):
    return make_member(*KINDS[request.param])


@pytest.fixture(scope="module")
def few(request):
    """Windows of 24 tokens, longer than any sliding window here."""
    tokenizer = request.getfixturevalue("tokenizer")
    return windows_for(tokenizer, calibration_tokens=384, evaluation_tokens=96, sequence_length=24)


@pytest.fixture
def bench(dense, tokenizer, few) -> Bench:
    return bench_of(dense, tokenizer, few)


def test_every_family_is_among_the_members():
    assert {model_type for model_type, _ in MEMBERS.values()} == set(FAMILIES)


def zeroed(model, plan):
    """The dense model with what the plan removes silenced where it enters the residual stream."""
    silenced = copy.deepcopy(model)
    for decoder, layer in zip(silenced.model.layers, plan.layers, strict=True):
        for projection, kept in (
            (decoder.self_attn.o_proj, head_rows(layer.kept_heads, decoder.self_attn.head_dim)),
            (decoder.mlp.down_proj, torch.tensor(layer.kept_channels)),
        ):
            removed = torch.ones(projection.in_features, dtype=torch.bool)
            removed[kept] = False
            projection.weight[:, removed] = 0
    return silenced


@torch.no_grad()
def test_what_is_not_cut_keeps_every_bit(dense, bench):
    expected = dense(IDS).logits
    plan = bench.plan(0.0, 0.0, Choices(importance="magnitude"))
    assert torch.equal(prune(dense, plan)(IDS).logits, expected)
    stock = dense.model(IDS, output_hidden_states=True).hidden_states
    stream = Stream(dense, bench.calibration.__class__("", "", IDS))
    for layer_index in range(len(stream.layers)):
        assert torch.equal(stream.hidden, stock[layer_index])
        stream.pass_layer(layer_index)
    for states, logits in zip(dense.model.norm(stream.hidden), expected, strict=True):
        torch.testing.assert_close(logits_of(dense, states), logits, rtol=0, atol=1e-5)
    assert not any(module._forward_pre_hooks for module in dense.modules())


def test_a_removed_unit_is_a_zeroed_one_before_and_after_stock_reload(dense, bench, tmp_path):
    before = snapshot(dense)
    tied, shape = dense.config.tie_word_embeddings, bench.loaded.architecture
    for granularity in ("query-heads", "kv-groups") if tied else ("kv-groups", "query-heads"):
        plan = bench.plan(0.34, 0.4, Choices(importance="magnitude", granularity=granularity))
        assert plan.cuts_mha(shape)
        pruned = prune(dense, plan)
        exact = prune(copy.deepcopy(dense).double(), plan)(IDS).logits
        expected = zeroed(copy.deepcopy(dense).double(), plan)(IDS).logits
        torch.testing.assert_close(exact, expected, rtol=0, atol=1e-10)
    compression = describe_compression(bench, Decision(plan), "none")
    compress_to_folder(tmp_path / "cut", bench, compression)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert type(stock) is type(pruned)
    assert torch.equal(stock(IDS).logits, pruned(IDS).logits)
    assert torch.equal(
        stock.generate(IDS[:1], **ONCE), zeroed(dense, plan).generate(IDS[:1], **ONCE)
    )
    assert bench.footprint(plan, "none").parameters == stock.num_parameters()
    assert same_weights(dense, before)
    again = load_model(str(tmp_path / "cut"))
    assert again.architecture == Architecture.from_model(stock)
    assert same_weights(again.model, snapshot(stock))


def test_a_cut_keeps_its_class(dense, bench):
    """But for a LLaMA with a number of heads that does not divide its hidden size."""

    def class_with(heads: int) -> str:
        config = dense.config
        if config.model_type != "llama" or config.hidden_size % heads == 0:
            return type(dense).__name__
        biased = config.attention_bias or config.mlp_bias
        return "SmolLM3ForCausalLM" if biased else "MistralForCausalLM"

    shape, choices = bench.loaded.architecture, Choices(importance="magnitude")
    plans = [bench.plan(0.34, 0.4, replace(choices, granularity="kv-groups"))]
    if shape.queries_per_group == 1:
        # Of the six heads of the models that the tests make, five do not divide the hidden size.
        plans.append(bench.plan(round(1 / shape.num_attention_heads, 2), 0.4, choices))
        heads = plans[1].num_attention_heads
        if dense.config.model_type == "gemma3_text":
            # Its class has the rule too, and no other one computes the same.
            assert dense.config.hidden_size % heads == 0
        else:
            assert heads == shape.num_attention_heads - 1
    for plan in plans:
        assert type(prune(dense, plan)).__name__ == class_with(plan.num_attention_heads)


def test_narrower_heads_are_exact_or_refused_by_name(dense, bench):
    """With each head's pairs in their own slots, against the other dims silenced."""
    choices = Choices(importance="magnitude", granularity="head-dims")
    if "head-dims" not in granularities_of(bench):
        with pytest.raises(TransActError, match="granularity head-dims cannot be had here: "):
            bench.plan(0.5, 0.0, choices)
        return
    plan = bench.plan(0.5, 0.0, choices)
    layers = tuple(
        layer.model_copy(update={"slot_pairs": (plan.slots,) * len(layer.slot_pairs)})
        for layer in plan.layers
    )
    plan = plan.model_copy(update={"layers": layers})
    silenced, head_dim = copy.deepcopy(dense), bench.loaded.architecture.head_dim
    turning = torch.tensor([*plan.slots, *(pair + head_dim // 2 for pair in plan.slots)])
    for decoder, layer in zip(silenced.model.layers, plan.layers, strict=True):
        attention, silent = decoder.self_attn, torch.ones(head_dim, dtype=torch.bool)
        silent[turning] = False
        for tensor in (attention.q_proj.weight, attention.q_proj.bias):
            if tensor is not None:
                tensor.unflatten(0, (-1, head_dim))[:, silent] = 0
        for head in range(dense.config.num_attention_heads):
            silent = torch.ones(head_dim, dtype=torch.bool)
            silent[list(layer.value_dims[head // attention.num_key_value_groups])] = False
            attention.o_proj.weight[:, head * head_dim : (head + 1) * head_dim][:, silent] = 0
    pruned = prune(dense, plan)
    torch.testing.assert_close(pruned(IDS).logits, silenced(IDS).logits, rtol=1e-4, atol=1e-4)
    if dense.config.model_type == "granite":
        assert pruned.model.layers[0].self_attn.scaling == dense.model.layers[0].self_attn.scaling


def test_statistics_are_those_of_hooks_on_the_stock_model(dense, bench):
    windows, seen = bench.calibration, {}

    def keep(site, layer_index):
        def hook(_, inputs):
            seen.setdefault((site, layer_index), []).append(inputs[0].double().flatten(0, -2))

        return hook

    hooks = []
    for layer_index, layer in enumerate(dense.model.layers):
        hooks.append(layer.register_forward_pre_hook(keep("residual", layer_index)))
        for site, projection in output_projections(layer).items():
            hooks.append(projection.register_forward_pre_hook(keep(site, layer_index)))
    with torch.no_grad():
        for window in windows.ids:
            dense(window[None])
    for hook in hooks:
        hook.remove()
    found = collect(dense, windows)
    for site in (*MODULES, "residual"):
        for layer_index in range(len(dense.model.layers)):
            rows = torch.cat(seen[site, layer_index])
            statistics = getattr(found, site)
            torch.testing.assert_close(
                statistics.sum_of_squares[layer_index], rows.square().sum(0), rtol=1e-4, atol=1e-5
            )
            torch.testing.assert_close(
                statistics.max_abs[layer_index], rows.abs().amax(0), rtol=1e-4, atol=1e-5
            )


def test_the_footprint_is_that_of_the_tensors(dense):
    shape = Architecture.from_config(dense.config)
    assert shape == Architecture.from_model(dense)
    stored = {name: tuple(weight.shape) for name, weight in dense.named_parameters()}
    assert dict(shape.tensors()) == stored
    cost = footprint(shape, "float16", context_length=24)
    assert cost.parameters == sum(weight.numel() for weight in dense.parameters())
    cache = dense(IDS[:1, :4], use_cache=True).past_key_values
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cost.kv_bytes_per_token == kept // 4 // 2


@torch.no_grad()
def test_perplexity_is_that_of_a_plain_loop(dense, bench):
    losses = []
    for window in bench.evaluation.ids:
        logits = dense(window[None]).logits[0, :-1].float()
        losses.append(functional.cross_entropy(logits, window[1:], reduction="none"))
    mean = torch.stack(losses).double().mean().item()
    assert evaluate(dense, bench.evaluation).perplexity == pytest.approx(math.exp(mean), rel=1e-5)
    stream = Stream(dense, bench.evaluation)
    for layer_index in range(len(stream.layers)):
        stream.pass_layer(layer_index)
    behind = losses_behind_layers(dense, stream.hidden, bench.evaluation)
    torch.testing.assert_close(behind, torch.stack(losses), rtol=1e-4, atol=1e-4)


def test_least_squares_lowers_the_held_out_error(dense, bench):
    plan = bench.plan(0.34, 0.4, Choices(granularity="kv-groups"))
    model, measurement = compress(bench, plan, "least-squares")
    assert len(measurement.fits) == 2 * len(dense.model.layers)
    assert all(fit.recovered_error <= fit.bare_error for fit in measurement.fits)
    lower = [fit for fit in measurement.fits if fit.recovered_error < 0.98 * fit.bare_error]
    assert len(lower) >= len(measurement.fits) // 2
    # What is written into the model is nearer to the dense one on other text, too.
    errors = [
        (model_cut(IDS).logits - dense(IDS).logits).square().mean().item()
        for model_cut in (prune(dense, plan), model)
    ]
    assert errors[1] < errors[0]


def test_a_bias_is_written_or_refused_by_name(dense, bench):
    family = FAMILIES[dense.config.model_type]
    plan = bench.plan(0.34, 0.4, Choices(importance="magnitude", granularity="kv-groups"))
    if family.bias_fields == ("attention_bias", "mlp_bias") or family.computes_as_llama(
        dense.config
    ):
        model, _ = compress(bench, plan, "bias")
        assert model.model.layers[0].mlp.down_proj.bias.abs().sum() > 0
        return
    with pytest.raises(TransActError, match=f"{family.class_name} has no bias for each"):
        decide(bench, 0.34, 0.4, Choices(recovery="bias", importance="magnitude"))


def test_saliences_are_those_of_a_backward_pass_through_the_stock_model(dense, bench):
    windows = bench.calibration
    few = windows.__class__(windows.source, windows.sha256, windows.ids[:3])
    shape = bench.loaded.architecture
    plain = copy.deepcopy(dense).requires_grad_(True)
    for window in few.ids:
        logits = plain(window[None]).logits[0, :-1]
        functional.cross_entropy(logits, window[1:], reduction="sum").backward()
    found = collect_saliences(dense, few, shape)
    for module, names in shape.family.projections.items():
        for layer_index, layer in enumerate(plain.model.layers):
            weights = {name: layer.get_submodule(name).weight for name in names}
            slow = {name: (each * each.grad).abs().detach() for name, each in weights.items()}
            expected = channel_sums(slow, module, shape)
            torch.testing.assert_close(
                found[module][layer_index], expected, rtol=2e-3, atol=1e-5 * expected.max()
            )


@torch.no_grad()
def test_answers_and_damage_are_those_of_the_stock_logits(dense, bench):
    """Some families scale or bend what the LM head gives."""
    context, answer = tuple(IDS[0, :10].tolist()), tuple(IDS[0, 10:14].tolist())
    group = [Request(context, answer), Request(context, answer[:1])]
    logs = dense(IDS[:1]).logits[0, 9:13].log_softmax(-1)
    expected = logs[range(4), list(answer)]
    found = [each.log_likelihood for each in score_continuations(dense, [group], 64)[0]]
    assert found == pytest.approx([expected.sum().item(), expected[0].item()], rel=1e-4)
    windows = bench.evaluation
    damage = measure_token_damage(dense, dense, windows)
    for window, losses in zip(windows.ids, damage.pruned_nll, strict=True):
        logits = dense(window[None]).logits[0, :-1]
        wanted = functional.cross_entropy(logits, window[1:], reduction="none")
        torch.testing.assert_close(losses, wanted, rtol=1e-4, atol=1e-4)


def test_attention_patterns_are_those_of_the_stock_model(dense, bench):
    windows = bench.evaluation
    eager = copy.deepcopy(dense)
    eager.set_attn_implementation("eager")
    stock = eager(windows.ids[:1], output_attentions=True).attentions
    for layer_index in range(len(dense.model.layers)):
        found = attention_pattern(dense, windows, layer_index)
        torch.testing.assert_close(found, stock[layer_index][0], rtol=1e-4, atol=1e-5)


def test_every_granularity_is_had_or_refused(bench):
    assert set(granularities_of(bench)) <= set(GRANULARITIES)


def test_the_repaired_stream_is_that_of_the_pruned_model(dense, bench):
    """With one window nothing is held out and the bare cut is kept: the stream must be its own."""
    windows = bench.calibration
    one = windows.__class__(windows.source, windows.sha256, windows.ids[:1])
    plan = bench.plan(0.34, 0.4, Choices(importance="magnitude", granularity="kv-groups"))
    pruned = prune(dense, plan)
    found = recover(dense, pruned, plan, one, "least-squares")
    assert all(fit.is_bare for fit in found.fits)
    # The first attention reads the embeddings, which are the stock model's own.
    first = Stream(dense, one)
    layers = [each.model.layers[0] for each in (dense, pruned)]
    with torch.no_grad():
        wanted, kept = (
            added(layer, "mha", run_module(layer, "mha", first.hidden, first.arguments[0])[0])
            for layer in layers
        )
        behind = (first.hidden + wanted).square().mean(-1, keepdim=True).sqrt()
        lost, whole = (each.square().div(behind).sum().item() for each in (wanted - kept, wanted))
    assert found.fits[0].bare_error == pytest.approx(lost / whole, rel=1e-4)
    stream = Stream(pruned, one)
    for layer_index in range(len(stream.layers)):
        stream.pass_layer(layer_index)
    torch.testing.assert_close(found.hidden, stream.hidden, rtol=1e-4, atol=1e-4)
