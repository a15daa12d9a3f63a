"""Code beside a checkpoint whose layers have widths of their own, run by stock transformers."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, dynamic_module_utils

from tests.conftest import same_weights, snapshot
from transact_core.experiments.allocate import plan_by_hand
from transact_core.experiments.bench import Choices, compress
from transact_core.export.compression import describe_compression
from transact_core.export.folder import compress_to_folder, write_checkpoint
from transact_core.export.modeling_file import FILE, has_blocks
from transact_core.models.load import load_model
from transact_core.pruning.plan import Decision

BY_HAND = {
    "other heads": ((3, 40), (6, 8), (6, 23)),
    "heads alike": ((3, 40), (3, 8), (3, 23)),
}


@pytest.fixture(autouse=True)
def modules_of_their_own(tmp_path, monkeypatch):
    """transformers copies code that it is told to trust into its cache before it runs it."""
    folder = str(tmp_path / "modules")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", folder)
    monkeypatch.syspath_prepend(folder)


def written(bench, widths, folder, streamed=False):
    choices = Choices(widths="by-hand", by_hand=widths)
    plan = plan_by_hand(bench, choices)
    model, measurement = compress(bench, plan, "none")
    compression = describe_compression(bench, Decision(plan, widths="by-hand"), "none")
    if streamed:
        compress_to_folder(folder, bench, compression, modeling_file=True)
    else:
        write_checkpoint(folder, model, bench, measurement, compression, modeling_file=True)
    return model


@pytest.mark.parametrize("which", BY_HAND)
def test_transformers_that_trusts_it_computes_the_same(gqa_bench, which, tmp_path):
    folder, again = tmp_path / "cut", tmp_path / "again"
    model = written(gqa_bench, BY_HAND[which], folder)
    ids = gqa_bench.evaluation.ids[:2]
    with torch.no_grad():
        expected = model(ids).logits
        trusted = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert torch.equal(trusted(ids).logits, expected)
        assert trusted.generate(ids[:, :4], max_new_tokens=3, do_sample=False).shape[1] == 7
        # What it saves is such a checkpoint too.
        trusted.save_pretrained(again)
    saved = json.loads((again / "config.json").read_text())
    stored = json.loads((folder / "config.json").read_text())
    assert saved["per_layer_config"] == stored["per_layer_config"]
    with pytest.raises(Exception, match="per-layer"):
        AutoModelForCausalLM.from_pretrained(folder)
    card = (folder / "README.md").read_text()
    assert f"the code in `{FILE}`" in card
    # This program opens it without running the code.
    (folder / FILE).write_text("raise SystemExit('it was run')")
    opened = load_model(str(folder))
    assert same_weights(opened.model, snapshot(model))
    assert has_blocks(opened.architecture) == (which == "heads alike")
    assert not hasattr(opened.model.config, "block_configs")


def test_block_configurations_are_those_that_vllm_reads(gqa_bench, tmp_path):
    folder = tmp_path / "cut"
    written(gqa_bench, BY_HAND["heads alike"], folder, streamed=True)
    stored = json.loads((folder / "config.json").read_text())
    assert stored["architectures"] == ["DeciLMForCausalLM"]
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert config.model_type == "nemotron-nas"
    shape = gqa_bench.loaded.architecture
    assert len(config.block_configs) == len(stored["block_configs"]) == shape.num_hidden_layers
    for (heads, channels), block, as_text in zip(
        BY_HAND["heads alike"], config.block_configs, stored["block_configs"], strict=True
    ):
        # The fields of vLLM's nemotron_nas.py: it divides the query heads by those of a group, and
        # takes the width of the MLP only where there is no `ffn_mult`.
        assert config.num_attention_heads == heads
        assert config.num_attention_heads // block.attention.n_heads_in_group == 3
        assert block.ffn.intermediate_size == channels
        assert [block.attention.no_op, block.ffn.no_op] == [False, False]
        assert not hasattr(block.ffn, "ffn_mult")
        assert as_text == {"attention": vars(block.attention), "ffn": vars(block.ffn)}


def test_no_code_is_written_where_it_is_not_needed_or_asked_for(gqa_bench, tmp_path):
    plan = gqa_bench.plan(0.5, 0.3, Choices())
    model, measurement = compress(gqa_bench, plan, "none")
    compression = describe_compression(gqa_bench, Decision(plan), "none")
    folder = tmp_path / "uniform"
    write_checkpoint(folder, model, gqa_bench, measurement, compression, modeling_file=True)
    assert not (folder / FILE).exists()
    assert "auto_map" not in json.loads((folder / "config.json").read_text())
    AutoModelForCausalLM.from_pretrained(folder)
