"""What an architecture costs: parameters, bytes, FLOPs. Exact, without touching a weight."""

import math
from collections import Counter
from dataclasses import dataclass

from transact_core.models.architecture import DTYPE_BYTES, Architecture

CONTEXT_LENGTH = 1024
"""Tokens of context that FLOPs are counted at unless another number is asked for."""


@dataclass(frozen=True)
class Footprint:
    """Field names are those of `report.json`."""

    parameters: int
    """Tied embeddings counted once."""
    weight_bytes: int
    mha_width: int | float
    """`num_attention_heads × head_dim`; where layers differ, its mean over layers."""
    mlp_width: int | float
    """`intermediate_size`; where layers differ, its mean over layers."""
    kv_bytes_per_token: int
    """K and V of all layers."""
    flops_per_token: int
    """2 per multiply-add: every projection, the LM head, and attention at `context_length`."""
    context_length: int


def footprint(
    architecture: Architecture, dtype: str, context_length: int = CONTEXT_LENGTH
) -> Footprint:
    """The footprint with weights and KV cache stored as `dtype`, by its name in torch.

    Sums over layers are exact where layers differ; their two widths are then means.
    """
    weight_size = DTYPE_BYTES[dtype]
    layers = architecture.layers
    multiply_adds = architecture.vocab_size * architecture.hidden_size
    for widths, count in Counter(layers).items():
        shapes = architecture.layer_tensors(layers.index(widths)).values()
        per_layer = sum(math.prod(shape) for shape in shapes if len(shape) == 2)
        # Scores against the keys, then the weighted sum of the values.
        per_layer += 2 * widths.num_attention_heads * architecture.head_dim * context_length
        multiply_adds += count * per_layer
    key_value_heads = sum(widths.num_key_value_heads for widths in layers)
    return Footprint(
        parameters=architecture.parameters,
        weight_bytes=architecture.parameters * weight_size,
        mha_width=_mean([widths.num_attention_heads * architecture.head_dim for widths in layers]),
        mlp_width=_mean([widths.intermediate_size for widths in layers]),
        kv_bytes_per_token=2 * key_value_heads * architecture.head_dim * weight_size,
        flops_per_token=2 * multiply_adds,
        context_length=context_length,
    )


def _mean(widths: list[int]) -> int | float:
    """A whole number where all layers have the same width."""
    return widths[0] if len(set(widths)) == 1 else sum(widths) / len(widths)
