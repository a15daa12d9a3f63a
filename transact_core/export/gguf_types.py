"""Which type each tensor of a GGUF file has under each quantisation, and how many bytes it takes.

A quantisation such as Q4_K_M is a mix: some matrices of some layers get a larger type. The rules
are those of llama.cpp (`llama-quant.cpp`), which are the same for all
architectures that are written here, so that a file
holds the bytes that llama.cpp's own quantiser would write.
"""

import math
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from transact_core.base.errors import TransActError
from transact_core.models.architecture import Architecture

Type = GGMLQuantizationType


@dataclass(frozen=True)
class Quantization:
    """One of the types that a file can be written in."""

    name: str
    base: Type
    """The type of every matrix that no rule gives another one."""
    file_type: LlamaFileType
    """What the file says of itself, `general.file_type`."""

    @property
    def is_float(self) -> bool:
        return self.base in FLOATS

    @property
    def block(self) -> int:
        """Weights of a row that its base type takes at a time."""
        return GGML_QUANT_SIZES[self.base][0]

    @property
    def wants_imatrix(self) -> bool:
        """Whether an importance matrix is used by default: below Q8_0, which hardly rounds."""
        return not self.is_float and self.name != "Q8_0"


FLOATS = (Type.F32, Type.F16, Type.BF16)
QUANTIZATIONS: dict[str, Quantization] = {
    name: Quantization(name, base, file_type)
    for name, base, file_type in (
        ("F32", Type.F32, LlamaFileType.ALL_F32),
        ("F16", Type.F16, LlamaFileType.MOSTLY_F16),
        ("BF16", Type.BF16, LlamaFileType.MOSTLY_BF16),
        ("Q8_0", Type.Q8_0, LlamaFileType.MOSTLY_Q8_0),
        ("Q6_K", Type.Q6_K, LlamaFileType.MOSTLY_Q6_K),
        ("Q5_K_M", Type.Q5_K, LlamaFileType.MOSTLY_Q5_K_M),
        ("Q5_1", Type.Q5_1, LlamaFileType.MOSTLY_Q5_1),
        ("Q5_0", Type.Q5_0, LlamaFileType.MOSTLY_Q5_0),
        ("Q4_K_M", Type.Q4_K, LlamaFileType.MOSTLY_Q4_K_M),
        ("Q4_1", Type.Q4_1, LlamaFileType.MOSTLY_Q4_1),
        ("Q4_0", Type.Q4_0, LlamaFileType.MOSTLY_Q4_0),
        ("IQ4_NL", Type.IQ4_NL, LlamaFileType.MOSTLY_IQ4_NL),
        ("IQ4_XS", Type.IQ4_XS, LlamaFileType.MOSTLY_IQ4_XS),
        ("Q3_K_M", Type.Q3_K, LlamaFileType.MOSTLY_Q3_K_M),
        ("Q2_K", Type.Q2_K, LlamaFileType.MOSTLY_Q2_K),
    )
}
"""By name, from the largest to the smallest."""
SMALLER_BLOCKS = {
    Type.IQ4_XS: Type.IQ4_NL,
    Type.Q2_K: Type.Q4_0,
    Type.Q3_K: Type.Q4_0,
    Type.Q4_K: Type.Q5_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q6_K: Type.Q8_0,
}
"""What a type that takes 256 weights at a time gives way to where a row is no multiple of 256."""
MANY_QUERIES = 4
"""Query heads a group from which some mixes give the few values more bits."""
LAYERS_OF_70B = 80
"""Layers by which llama.cpp recognises a 70B model with grouped queries."""


def quantization(name: str) -> Quantization:
    """The quantisation of a name, in capitals or not.

    Raises:
        TransActError: there is none of that name.
    """
    found = QUANTIZATIONS.get(name.strip().upper())
    if found is None:
        raise TransActError(
            f"There is no quantization {name.strip()!r}; choose one of {', '.join(QUANTIZATIONS)}."
        )
    return found


def stored_bytes(shape: tuple[int, ...], kind: Type) -> int:
    """Bytes of a tensor of this shape in a file, its padding not counted."""
    weights, size = GGML_QUANT_SIZES[kind]
    return math.prod(shape) // weights * size


def wanted_type(
    name: str,
    layer_index: int | None,
    chosen: Quantization,
    architecture: Architecture,
    row: int,
    with_imatrix: bool,
) -> Type:
    """The type that a matrix gets if its rows allow it.

    `name` is the tensor's in the file without layer and suffix, such as `ffn_down`; `row` is the
    length of its rows.
    """
    base, mix = chosen.base, chosen.name
    if chosen.is_float:
        return base
    if layer_index is None:
        # Of a tied model the embedding is the LM head too.
        if name == "output" or architecture.tie_word_embeddings:
            if row % GGML_QUANT_SIZES[base][0]:
                return Type.Q8_0
            return base if base == Type.Q8_0 else Type.Q6_K
        return base
    layers, first = architecture.num_hidden_layers, architecture.widths_of(0)
    many = first.num_attention_heads // first.num_key_value_heads >= MANY_QUERIES
    if name in ("attn_v", "attn_qkv"):  # a matrix that holds the values counts as them
        kind = _type_of_values(mix, base, layer_index, layers, many)
        grouped = first.num_attention_heads != first.num_key_value_heads
        if layers == LAYERS_OF_70B and grouped and kind in (Type.Q3_K, Type.Q4_K):
            return Type.Q5_K
        return kind
    if name == "ffn_down":
        return _type_of_down(mix, base, layer_index, layers, with_imatrix)
    if name == "attn_output":
        return {"Q2_K": Type.Q3_K, "Q3_K_M": Type.Q4_K}.get(mix, base)
    return base


def _type_of_values(mix: str, base: Type, layer: int, layers: int, many: bool) -> Type:
    if mix == "Q2_K":
        return Type.Q4_K if many else Type.Q3_K
    if mix == "Q3_K_M":
        return Type.Q5_K if layer < 2 else Type.Q4_K
    if mix in ("IQ4_NL", "IQ4_XS") and many:
        return Type.Q5_K
    if mix in ("Q4_K_M", "Q5_K_M") and _gets_more_bits(layer, layers):
        return Type.Q6_K
    return base


def _type_of_down(mix: str, base: Type, layer: int, layers: int, with_imatrix: bool) -> Type:
    is_early = layer < layers // 8
    if mix == "Q2_K":
        return Type.Q3_K
    if mix == "Q3_K_M":
        return Type.Q5_K if layer < layers // 16 else Type.Q4_K
    if mix in ("Q4_K_M", "Q5_K_M") and _gets_more_bits(layer, layers):
        return Type.Q6_K
    if mix in ("IQ4_NL", "IQ4_XS") and is_early and not with_imatrix:
        return Type.Q5_K
    if mix in ("Q4_0", "Q5_0") and is_early and with_imatrix:
        return Type.Q4_1 if mix == "Q4_0" else Type.Q5_1
    return base


def _gets_more_bits(layer: int, layers: int) -> bool:
    """Layers at both ends, and every third between them."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def possible_type(wanted: Type, row: int) -> Type:
    """The type that rows of this length can have: the wanted one, or the one it gives way to."""
    if wanted in FLOATS or row % GGML_QUANT_SIZES[wanted][0] == 0:
        return wanted
    smaller = SMALLER_BLOCKS.get(wanted, wanted)
    return smaller if row % GGML_QUANT_SIZES[smaller][0] == 0 else Type.F16
