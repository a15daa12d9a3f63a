"""Small random models of every family, made by transformers itself.

`TRANSACT_TEST_CHECKPOINT` names a real checkpoint (a folder or a hub id) that takes their place in
`test_honest.py`.
"""

import os
from itertools import product

import torch
from transformers import PreTrainedModel

from tests.conftest import VOCAB_SIZE
from transact_core.models.families.table import family_of
from transact_core.models.load import load_model

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
GROUPED = {"num_key_value_heads": 3}
WINDOW = 5
"""Tokens of a sliding window, shorter than the windows that the tests feed."""
MEMBERS: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, sliding": ("mistral", {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", {}),
    "qwen2, half sliding": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
        },
    ),
    "phi3": ("phi3", {"sliding_window": None}),
    "gemma3": (
        "gemma3_text",
        {
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 12,
            "final_logit_softcapping": 20.0,
        },
    ),
}
"""`model_type` and what is particular of its configuration, by a name for the test."""
KINDS = {
    f"{member}, {'gqa' if grouped else 'mha, tied'}": (member, grouped, not grouped)
    for member, grouped in product(MEMBERS, (False, True))
}
"""Every member with heads of their own keys, tied, and in groups, untied: groups and the LM head
have nothing to do with each other."""
CHECKPOINT = os.environ.get("TRANSACT_TEST_CHECKPOINT")
if CHECKPOINT:
    KINDS = {CHECKPOINT: (CHECKPOINT,)}


def make_member(
    member: str, grouped: bool = True, tied: bool = False, **changes
) -> PreTrainedModel:
    """A model of that member, with random norms and biases too, ready to be read."""
    if member == CHECKPOINT:
        return load_model(member, device="cpu", dtype="float32").model
    torch.manual_seed(0)
    model_type, own = MEMBERS[member]
    family = family_of(model_type)
    values = SIZES | (GROUPED if grouped else {}) | {"tie_word_embeddings": tied} | own | changes
    model = family.model_class(family.model_class.config_class(**values)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                # Around what each starts from: 1, or 0 where 1 is added to it.
                weight.add_(torch.empty_like(weight).uniform_(-0.5, 0.5))
            if name.endswith("bias"):
                weight.normal_(std=0.2)
    return model.requires_grad_(False)
