"""What an architecture costs: parameters, bytes, FLOPs. Exact, without touching a weight."""

from dataclasses import dataclass

from transact_core.models.architecture import DTYPE_BYTES, Architecture

CONTEXT_LENGTH = 1024


@dataclass(frozen=True)
class Footprint:
    """Field names are those of `report.json`."""

    parameters: int
    """Tied embeddings counted once."""
    weight_bytes: int
    mha_width: int
    """`num_attention_heads × head_dim`."""
    mlp_width: int
    kv_bytes_per_token: int
    """K and V of all layers."""
    flops_per_token: int
    """2 per multiply-add: every projection, the LM head, and attention at `context_length`."""
    context_length: int


def footprint(
    architecture: Architecture, dtype: str, context_length: int = CONTEXT_LENGTH
) -> Footprint:
    """The footprint with weights and KV cache stored as `dtype`, by its name in torch."""
    bytes_each = DTYPE_BYTES[dtype]
    multiply_adds = architecture.vocab_size * architecture.hidden_size
    matrices = (shape for shape in architecture.layer_tensors().values() if len(shape) == 2)
    per_layer = sum(rows * columns for rows, columns in matrices)
    # Scores against the keys, then the weighted sum of the values.
    per_layer += 2 * architecture.mha_width * context_length
    multiply_adds += architecture.num_hidden_layers * per_layer
    return Footprint(
        parameters=architecture.parameters,
        weight_bytes=architecture.parameters * bytes_each,
        mha_width=architecture.mha_width,
        mlp_width=architecture.intermediate_size,
        kv_bytes_per_token=(
            2 * architecture.num_hidden_layers * architecture.key_value_width * bytes_each
        ),
        flops_per_token=2 * multiply_adds,
        context_length=context_length,
    )
