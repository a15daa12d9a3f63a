"""Removing a unit is exactly as good as having zeroed it."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import KINDS, bench_of, make_model, same_weights, snapshot
from tests.pruning.test_plan import uneven
from transact_core.base.errors import TransActError
from transact_core.experiments.bench import Choices
from transact_core.forward.waists import head_rows
from transact_core.models.architecture import Architecture
from transact_core.models.footprint import footprint
from transact_core.pruning.surgery import cast, prune, round_weights

IDS = torch.arange(3, 99).reshape(4, 24)
CUTS = [
    (0.5, 0.0, "query-heads"),
    (0.5, 0.0, "kv-groups"),
    (0.0, 0.4, "query-heads"),
    (0.34, 0.7, "kv-groups"),
    (0.99, 0.99, "query-heads"),
]


def zeroed(model, plan):
    """The dense model with what the plan removes silenced where it enters the residual stream."""
    silenced = copy.deepcopy(model)
    head_dim = model.config.head_dim
    for decoder, layer in zip(silenced.model.layers, plan.layers, strict=True):
        for projection, kept in (
            (decoder.self_attn.o_proj, head_rows(layer.kept_heads, head_dim)),
            (decoder.mlp.down_proj, torch.tensor(layer.kept_channels)),
        ):
            removed = torch.ones(projection.in_features, dtype=torch.bool)
            removed[kept] = False
            projection.weight[:, removed] = 0
    return silenced


@pytest.mark.parametrize(("mha_ratio", "mlp_ratio", "granularity"), CUTS)
def test_removed_equals_zeroed_before_and_after_stock_reload(
    bench, tmp_path, mha_ratio, mlp_ratio, granularity
):
    dense = bench.loaded.model
    plan = bench.plan(mha_ratio, mlp_ratio, Choices(granularity=granularity))
    assert plan.cuts_anything(bench.loaded.architecture)
    pruned = prune(dense, plan)
    logits = pruned(IDS).logits
    # Shorter sums are rounded differently; in float64 what is left of that is far below 1e-10.
    exact = prune(copy.deepcopy(dense).double(), plan)(IDS).logits
    torch.testing.assert_close(
        exact, zeroed(copy.deepcopy(dense).double(), plan)(IDS).logits, rtol=0, atol=1e-10
    )
    pruned.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(stock(IDS).logits, logits)
    generate = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(
        stock.generate(IDS[:1], **generate), zeroed(dense, plan).generate(IDS[:1], **generate)
    )


@pytest.mark.parametrize("with_biases", [False, True])
def test_layers_of_their_own_widths_compute_what_is_left(bench, with_biases):
    dense = bench.loaded.model
    plan = uneven(bench.plan(0.5, 0.4, Choices()))
    shape = bench.loaded.architecture
    pruned = prune(dense, plan, with_biases)
    left = plan.applied_to(shape, with_biases)
    assert not left.uniform
    assert Architecture.from_model(pruned) == left
    assert left.parameters == sum(weight.numel() for weight in pruned.parameters())
    exact = prune(copy.deepcopy(dense).double(), plan, with_biases)
    expected = zeroed(copy.deepcopy(dense).double(), plan)
    torch.testing.assert_close(exact(IDS).logits, expected(IDS).logits, rtol=0, atol=1e-10)
    generate = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(
        pruned.generate(IDS[:1], **generate), zeroed(dense, plan).generate(IDS[:1], **generate)
    )
    cache = pruned(IDS[:1], use_cache=True).past_key_values
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    cost = footprint(left, "float32", context_length=24)
    assert cost.kv_bytes_per_token == stored // 24
    assert Architecture.from_model(cast(pruned, torch.float16)) == left


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("kind", KINDS)
def test_narrower_heads_equal_dense_ones_whose_other_dims_are_zero(
    kind, rope, tokenizer, windows, tmp_path
):
    dense = make_model(**KINDS[kind], rope_parameters=ROPES[rope])
    bench = bench_of(dense, tokenizer, windows)
    plan = bench.plan(0.5, 0, Choices(granularity="head-dims"))
    layers = tuple(
        layer.model_copy(update={"slot_pairs": (plan.slots,) * len(layer.slot_pairs)})
        for layer in plan.layers
    )
    plan = plan.model_copy(update={"layers": layers})
    silenced, head_dim = copy.deepcopy(dense), dense.config.head_dim
    turning = torch.tensor([*plan.slots, *(pair + head_dim // 2 for pair in plan.slots)])
    for decoder, layer in zip(silenced.model.layers, plan.layers, strict=True):
        attention = decoder.self_attn
        silent = torch.ones(head_dim, dtype=torch.bool)
        silent[turning] = False
        for tensor in (attention.q_proj.weight, attention.q_proj.bias):
            if tensor is not None:
                tensor.unflatten(0, (-1, head_dim))[:, silent] = 0
        for head in range(dense.config.num_attention_heads):
            silent = torch.ones(head_dim, dtype=torch.bool)
            silent[list(layer.value_dims[head // attention.num_key_value_groups])] = False
            attention.o_proj.weight[:, head * head_dim : (head + 1) * head_dim][:, silent] = 0
    pruned = prune(dense, plan)
    assert pruned.config.head_dim == head_dim // 2
    logits = pruned(IDS).logits
    torch.testing.assert_close(logits, silenced(IDS).logits, rtol=1e-4, atol=2e-5)
    pruned.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(stock(IDS).logits, logits)
    generate = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(stock.generate(IDS[:1], **generate), pruned.generate(IDS[:1], **generate))
    cost = bench.footprint(plan, "none")
    assert cost.parameters == sum(weight.numel() for weight in pruned.parameters())


def test_frequencies_that_depend_on_the_length_are_refused(tokenizer, windows):
    dynamic = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    bench = bench_of(make_model(rope_parameters=dynamic), tokenizer, windows)
    with pytest.raises(TransActError, match="'dynamic'; choose query-heads"):
        bench.plan(0.5, 0, Choices(granularity="head-dims"))


def test_the_dense_model_is_shared_and_never_changed(bench):
    dense = bench.loaded.model
    before = snapshot(dense)
    pruned = prune(dense, bench.plan(0.5, 0.4, Choices()))
    round_weights(pruned, torch.bfloat16)
    assert same_weights(dense, before)
    untouched = prune(dense, bench.plan(0.5, 0, Choices()))
    for mine, theirs in zip(untouched.model.layers, dense.model.layers, strict=True):
        assert mine.mlp.up_proj.weight is theirs.mlp.up_proj.weight
        assert mine.input_layernorm.weight is theirs.input_layernorm.weight
    assert untouched.model.embed_tokens.weight is dense.model.embed_tokens.weight


def test_ratios_of_zero_leave_every_weight_bit_for_bit(bench):
    dense = bench.loaded.model
    assert same_weights(prune(dense, bench.plan(0, 0, Choices())), snapshot(dense))


def test_tied_embeddings_stay_tied(bench):
    pruned = prune(bench.loaded.model, bench.plan(0.5, 0.4, Choices()))
    for model in (pruned, cast(pruned, torch.float16)):
        tied = model.lm_head.weight is model.model.embed_tokens.weight
        assert tied == model.config.tie_word_embeddings


def test_rounding_is_to_what_the_dtype_holds(gqa_bench):
    pruned = prune(gqa_bench.loaded.model, gqa_bench.plan(0.5, 0.4, Choices()))
    round_weights(pruned, torch.bfloat16)
    for weight in pruned.parameters():
        assert torch.equal(weight, weight.bfloat16().float())
    assert same_weights(cast(pruned, torch.bfloat16).float(), snapshot(pruned))
