"""All families, found by their `model_type`."""

from typing import TYPE_CHECKING

from transact_core.models.families import (
    gemma3,
    granite,
    llama,
    mistral,
    phi3,
    qwen2,
    qwen3,
    smollm3,
)
from transact_core.models.families.description import Family

if TYPE_CHECKING:
    from torch import nn

_MODULES = (llama, mistral, qwen2, qwen3, smollm3, granite, phi3, gemma3)
FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in _MODULES}
"""By `model_type`. Of those that compute what a LLaMA does, the first that can hold a cut is taken
where the source's own class cannot."""


def family_of(model_type: str) -> Family:
    """The family of that `model_type`.

    Raises:
        KeyError: it is none of `FAMILIES`.
    """
    return FAMILIES[model_type]


def family_of_layer(layer: "nn.Module") -> Family:
    """The family of a decoder layer."""
    return FAMILIES[layer.self_attn.config.model_type]
