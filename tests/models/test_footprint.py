import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from transact_core.experiments.bench import Choices
from transact_core.models.architecture import Architecture
from transact_core.models.footprint import footprint
from transact_core.pruning.surgery import prune

CONTEXT_LENGTH = 12


@pytest.fixture(params=[(0, 0), (0.5, 0.3)])
def measured(request, bench):
    """A dense or pruned model and its footprint, the latter from the plan alone."""
    plan = bench.plan(*request.param, Choices())
    cut = plan.widths.applied_to(bench.loaded.architecture)
    return prune(bench.loaded.model, plan), footprint(cut, "float32", CONTEXT_LENGTH)


def test_parameters_are_those_of_the_cut_model(measured):
    model, cost = measured
    assert cost.parameters == sum(weight.numel() for weight in model.parameters())


def test_weight_bytes_are_those_on_disk(measured, tmp_path):
    model, cost = measured
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert cost.weight_bytes == sum(tensor.nbytes for tensor in stored.values())


def test_kv_bytes_are_those_of_the_cache(measured):
    model, cost = measured
    cache = model(torch.arange(10)[None], use_cache=True).past_key_values
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cost.kv_bytes_per_token == stored // 10


def test_flops_are_those_of_decoding_the_last_token(measured):
    model, cost = measured
    model.set_attn_implementation("eager")
    ids = torch.arange(CONTEXT_LENGTH)[None]
    cache = model(ids[:, :-1], use_cache=True).past_key_values
    # The rotary frequencies of a position are no weight and no attention.
    with FlopCounterMode(display=False) as counter:
        model(ids[:, -1:], past_key_values=cache)
    assert cost.flops_per_token == counter.get_total_flops()


def test_widths_are_named_as_in_the_report(model):
    cost = footprint(Architecture.from_config(model.config), "float16")
    assert cost.mha_width == model.model.layers[0].self_attn.o_proj.in_features
    assert cost.mlp_width == model.model.layers[0].mlp.down_proj.in_features
    assert dataclasses.asdict(cost)["context_length"] == 1024
