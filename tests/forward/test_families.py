"""A stream is the stock model's to the last bit, whatever the family's attention does."""

import pytest
import torch
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from transact_core.data.windows import Windows
from transact_core.forward.stream import Stream

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
IDS = torch.arange(4 * 32).view(4, 32) % 97
ALTERNATING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}


def require_same_bits(model):
    stock = model.model(IDS, output_hidden_states=True).hidden_states
    stream = Stream(model, Windows("", "", IDS))
    for layer_index in range(len(stream.layers)):
        assert torch.equal(stream.hidden, stock[layer_index])
        stream.pass_layer(layer_index)
    logits = model.lm_head(model.model.norm(stream.hidden))
    assert torch.equal(logits, model(IDS).logits)
    assert not any(module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_llama_models_of_every_kind(model):
    require_same_bits(model)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "config", "changes"),
    [
        (Qwen3ForCausalLM, Qwen3Config, {}),
        (Qwen2ForCausalLM, Qwen2Config, ALTERNATING),
        (MistralForCausalLM, MistralConfig, {"sliding_window": 5}),
        (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    ],
)
def test_other_families(family, config, changes):
    torch.manual_seed(0)
    model = family(config(**SIZES, **changes)).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.uniform_(0.5, 1.5)
    require_same_bits(model)
