import dataclasses
import math

import pytest
from torch import nn

from transact_core.models.architecture import Architecture, LayerWidths
from transact_core.models.footprint import footprint

UNEVEN = (LayerWidths(6, 3, 40), LayerWidths(4, 2, 10), LayerWidths(4, 4, 25))


def test_tensors_are_those_of_the_checkpoint(model):
    stored = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    assert dict(Architecture.from_config(model.config).tensors()) == stored


def test_parameters_are_counted_once(model):
    counted = sum(weight.numel() for weight in model.parameters())
    assert Architecture.from_config(model.config).parameters == counted


def test_a_model_in_memory_has_the_widths_of_its_configuration(model):
    assert Architecture.from_model(model) == Architecture.from_config(model.config)


def test_layers_alike_are_no_special_case(gqa_model):
    shape = Architecture.from_config(gqa_model.config)
    assert shape.uniform
    assert shape.with_layers(shape.layers) == shape
    assert shape.layers == (shape.widths_of(0),) * 3


def test_layers_whose_widest_counts_make_no_layer_are_read_from_a_model(gqa_model):
    """The widest layers have 3 heads and 2 groups, which cannot share evenly."""
    counts = [(2, 2), (3, 1), (2, 1)]
    for layer, (heads, groups) in zip(gqa_model.model.layers, counts, strict=True):
        layer.self_attn.q_proj = nn.Linear(48, heads * 8, bias=False)
        layer.self_attn.k_proj = nn.Linear(48, groups * 8, bias=False)
    gqa_model.config.num_attention_heads, gqa_model.config.num_key_value_heads = 3, 2
    shape = Architecture.from_model(gqa_model)
    assert shape.layers == tuple(LayerWidths(*pair, 40) for pair in counts)
    assert (shape.num_attention_heads, shape.num_key_value_heads) == (3, 2)


def test_sums_over_layers_of_different_widths_are_exact(gqa_model):
    shape = Architecture.from_config(gqa_model.config)
    uneven = shape.with_layers(UNEVEN)
    assert not uneven.uniform
    assert (uneven.num_attention_heads, uneven.num_key_value_heads) == (6, 4)
    assert uneven.parameters == sum(math.prod(size) for _, size in uneven.tensors())
    # What a layer costs is what it costs in a model of such layers alone.
    alone = [
        footprint(uneven.with_layers([uneven.widths_of(index)]), "float16", 7) for index in range(3)
    ]
    none = footprint(dataclasses.replace(shape, num_hidden_layers=1), "float16", 7)
    outer = footprint(dataclasses.replace(shape, num_hidden_layers=2), "float16", 7)
    together = footprint(uneven, "float16", 7)
    for name in ("parameters", "weight_bytes", "kv_bytes_per_token", "flops_per_token"):
        layer = getattr(outer, name) - getattr(none, name)
        rest = getattr(none, name) - layer
        layers = sum((getattr(each, name) - rest) // 3 for each in alone)
        assert getattr(together, name) == rest + layers, name
    assert together.mlp_width == 25
    assert together.mha_width == pytest.approx(8 * 14 / 3)


def test_widths_of_layers_that_contradict_the_others_are_refused(gqa_model):
    shape = Architecture.from_config(gqa_model.config)
    with pytest.raises(ValueError, match="widths of 2 layers"):
        shape.with_layers(UNEVEN[:2])
    with pytest.raises(ValueError, match="largest of any layer"):
        dataclasses.replace(shape, intermediate_size=41, layer_widths=UNEVEN)
    with pytest.raises(ValueError, match="cannot share"):
        LayerWidths(6, 4, 10)
    with pytest.raises(ValueError, match="no one number"):
        _ = shape.with_layers(UNEVEN).queries_per_group
