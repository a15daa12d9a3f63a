"""Any number of heads: other stock classes compute the same where `LlamaConfig` refuses it."""

import copy
import dataclasses
import json
from itertools import product

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MistralConfig, SmolLM3Config

from tests.conftest import bench_of, make_model, same_weights, snapshot, windows_for
from tests.pruning.test_surgery import IDS, ROPES, zeroed
from transact_core.base.errors import TransActError
from transact_core.experiments.bench import Choices, compress
from transact_core.export.compression import describe_compression
from transact_core.export.folder import compress_to_folder
from transact_core.models.architecture import Architecture
from transact_core.models.families.table import FAMILIES
from transact_core.models.load import load_model
from transact_core.models.stock_class import config_for, explanation, family_for
from transact_core.pruning.plan import Decision, head_counts
from transact_core.pruning.surgery import cast, prune

SHAPES = {
    "mha": {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8},
    "gqa": {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 4},
}
"""A quarter of the heads less leaves 6 or 12, which do not divide a hidden_size of 64."""
BIASES = {
    "none": {},
    "attention": {"attention_bias": True},
    "mlp": {"mlp_bias": True},
    "both": {"attention_bias": True, "mlp_bias": True},
}


def made(shape: str, **changes) -> LlamaForCausalLM:
    return make_model(hidden_size=64, **SHAPES[shape], **changes)


@pytest.mark.parametrize(
    ("shape", "granularity", "tied", "rope"),
    list(product(SHAPES, ("query-heads", "kv-groups"), (False, True), ("default", "llama3"))),
)
@pytest.mark.parametrize("biases", BIASES)
def test_heads_that_do_not_divide_compute_the_same_before_and_after_stock_reload(
    tokenizer, windows, tmp_path, shape, granularity, tied, rope, biases
):
    dense = made(shape, tie_word_embeddings=tied, rope_parameters=ROPES[rope], **BIASES[biases])
    bench = bench_of(dense, tokenizer, windows)
    plan = bench.plan(0.25, 0.3, Choices(granularity=granularity))
    assert plan.num_attention_heads == dense.config.num_attention_heads * 3 // 4
    pruned = prune(dense, plan)
    assert type(pruned).__name__ == (
        "MistralForCausalLM" if biases == "none" else "SmolLM3ForCausalLM"
    )
    exact = prune(copy.deepcopy(dense).double(), plan)(IDS).logits
    torch.testing.assert_close(
        exact, zeroed(copy.deepcopy(dense).double(), plan)(IDS).logits, rtol=0, atol=1e-10
    )
    logits = pruned(IDS).logits
    pruned.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(stock) is type(pruned)
    assert torch.equal(stock(IDS).logits, logits)
    generate = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(stock.generate(IDS[:1], **generate), pruned.generate(IDS[:1], **generate))
    assert (stock.lm_head.weight is stock.model.embed_tokens.weight) == tied
    assert bench.footprint(plan, "none").parameters == stock.num_parameters()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("recovery", ["none", "least-squares", "bias"])
def test_the_folder_of_such_a_cut_is_stock_and_can_be_cut_again(
    tokenizer, windows, tmp_path, shape, recovery
):
    bench = bench_of(made(shape, tie_word_embeddings=True), tokenizer, windows)
    plan = bench.plan(0.25, 0.3, Choices(recovery=recovery))
    compression = describe_compression(bench, Decision(plan), recovery)
    model, measurement = compress(bench, plan, recovery)
    folder = tmp_path / "first"
    again = compress_to_folder(folder, bench, compression)
    assert again.perplexity == measurement.perplexity
    name = "SmolLM3ForCausalLM" if recovery == "bias" else "MistralForCausalLM"
    report = json.loads((folder / "report.json").read_text())
    assert report["pruned"]["model_class"] == name
    card = " ".join((folder / "README.md").read_text().split())
    assert f"stock `{name}`, which computes the same, because LlamaConfig requires" in card

    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert type(stock).__name__ == name
    assert torch.equal(stock(IDS).logits, model(IDS).logits)

    loaded = load_model(str(folder))
    assert loaded.architecture == Architecture.from_config(model.config)
    assert same_weights(loaded.model, snapshot(model))
    second = bench_of(loaded.model, tokenizer, windows)
    plan = second.plan(0.34, 0.5, Choices(recovery=recovery))
    assert plan.cuts_mha(second.loaded.architecture)
    compression = describe_compression(second, Decision(plan), recovery)
    assert compress_to_folder(tmp_path / "second", second, compression).perplexity > 1
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "second")).__name__ == name
    card = " ".join((tmp_path / "second" / "README.md").read_text().split())
    assert f"stock `{name}`: " in card
    assert "LlamaConfig requires" not in card


@pytest.mark.parametrize("rope", ["default", "llama3"])
@pytest.mark.parametrize("with_biases", [False, True])
def test_heads_of_such_a_model_can_be_made_narrower(
    tokenizer, windows, tmp_path, rope, with_biases
):
    dense = made("mha", rope_parameters=ROPES[rope])
    first = bench_of(dense, tokenizer, windows)
    source = prune(dense, first.plan(0.25, 0.0, Choices()), with_biases)
    bench = bench_of(source, tokenizer, windows)
    plan = bench.plan(0.5, 0.3, Choices(granularity="head-dims"))
    model, measurement = compress(bench, plan, "bias" if with_biases else "least-squares")
    assert type(model) is type(source) is not LlamaForCausalLM
    assert model.config.head_dim == 4
    model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(stock(IDS).logits, model(IDS).logits)
    assert torch.equal(stock.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert measurement.perplexity > 1


def test_the_heads_of_llama_3_lose_a_quarter_where_a_quarter_is_asked_for(tokenizer, tmp_path):
    """32 heads over 8 groups; the hidden_size, as 4096, is not divided by 24."""
    dense = make_model(hidden_size=64, num_attention_heads=32, num_key_value_heads=8, head_dim=4)
    bench = bench_of(dense, tokenizer, windows_for(tokenizer))
    assert head_counts(bench.loaded.architecture, "query-heads") == [8, 16, 24, 32]
    plan = bench.plan(0.25, 0.0, Choices())
    assert (plan.num_attention_heads, plan.num_key_value_heads) == (24, 8)
    compression = describe_compression(bench, Decision(plan), "least-squares")
    measurement = compress_to_folder(tmp_path / "out", bench, compression)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert stock.config.num_attention_heads == 24
    ids = bench.evaluation.ids
    with torch.inference_mode():
        nll = stock(ids, labels=ids).loss
    assert nll.exp().item() == pytest.approx(measurement.perplexity, rel=1e-5)


def test_counts_that_divide_stay_a_llama(tokenizer, windows):
    dense = made("gqa")
    bench = bench_of(dense, tokenizer, windows)
    pruned = prune(dense, bench.plan(0.5, 0.3, Choices()), with_biases=True)
    assert type(pruned) is type(cast(pruned, torch.float16)) is LlamaForCausalLM


@pytest.mark.parametrize("biases", BIASES)
def test_every_field_is_written_out(tmp_path, biases):
    """Defaults differ between classes and versions, so that none may be left to them."""
    dense = made("gqa", **BIASES[biases])
    shape = Architecture.from_config(dense.config)
    config = config_for(dense.config, dataclasses.replace(shape, num_attention_heads=12))
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    before = json.loads(dense.config.to_json_string())
    own = {"num_attention_heads", "model_type", "pretraining_tp", "transformers_version"}
    for name in before.keys() - own - {"attention_bias", "mlp_bias"}:
        assert written[name] == before[name], name
    assert written["num_attention_heads"] == 12
    assert written["sliding_window"] is None
    if biases == "none":
        assert written["model_type"] == "mistral"
    else:
        assert written["model_type"] == "smollm3"
        assert written["no_rope_layers"] == [1] * 3
        assert written["layer_types"] == ["full_attention"] * 3
        assert written["use_sliding_window"] is False
        for name in ("attention_bias", "mlp_bias"):
            assert written[name] == before[name]


@pytest.mark.parametrize("heads", [8, 12])
def test_code_beside_the_source_is_not_named(heads):
    """A copy of the configuration has no such code beside it; 12 heads make it a Mistral."""
    dense = made("gqa")
    dense.config.auto_map = {"AutoConfig": "code.Config"}
    shape = dataclasses.replace(Architecture.from_config(dense.config), num_attention_heads=heads)
    cut = config_for(dense.config, shape)
    assert cut.model_type == ("llama" if heads == 8 else "mistral")
    assert "auto_map" not in cut.to_dict()
    assert dense.config.auto_map


def test_only_another_class_than_the_sources_is_explained():
    assert "LlamaConfig requires" in explanation("MistralForCausalLM")
    assert "LlamaConfig requires" in explanation("SmolLM3ForCausalLM", "mistral")
    for source_type, family in FAMILIES.items():
        assert explanation(family.class_name, source_type) is None
        assert explanation("LlamaForCausalLM", source_type) is None


def test_a_model_stays_of_the_class_it_came_in():
    config = made("gqa").config
    shape = Architecture.from_config(config)
    assert family_for(shape, config).model_type == "llama"
    config = MistralConfig(**SHAPES["gqa"], hidden_size=64, sliding_window=None)
    assert family_for(Architecture.from_config(config), config).model_type == "mistral"
    biased = Architecture.from_config(made("gqa", mlp_bias=True).config)
    assert family_for(biased, config).model_type == "llama"


def test_only_what_computes_as_a_llama_does_may_change_its_class():
    biased = Architecture.from_config(made("gqa", mlp_bias=True).config)
    config = MistralConfig(**SHAPES["gqa"], hidden_size=64, sliding_window=8)
    with pytest.raises(TransActError, match="MistralForCausalLM has no bias"):
        family_for(biased, config)
    config = SmolLM3Config(**SHAPES["gqa"], hidden_size=64)
    assert not FAMILIES["smollm3"].computes_as_llama(config)
    assert family_for(biased, config).model_type == "smollm3"
