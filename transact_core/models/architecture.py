"""The numbers of a LLaMA-family model that decide its size, apart from any weights.

Everything that can be said exactly before a tensor is read starts here: which tensors a checkpoint
must hold, how wide the waists are, what a cut would leave.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # Not imported with torch behind it: the first page needs the sizes and nothing else.
    from transformers import LlamaConfig

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Architecture:
    """Field names are those of `transformers.LlamaConfig`."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, bool) and value < 1:
                raise ValueError(f"{name} is {value}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} attention heads cannot share "
                f"{self.num_key_value_heads} key-value heads evenly"
            )

    @classmethod
    def from_config(cls, config: "LlamaConfig") -> "Architecture":
        return cls(**{name: getattr(config, name) for name in cls.__dataclass_fields__})

    @property
    def mha_width(self) -> int:
        """Width of the attention's transitional activation, the input of `o_proj`."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_width(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def queries_per_group(self) -> int:
        """Query heads that share one key-value head (1 without grouping)."""
        return self.num_attention_heads // self.num_key_value_heads

    def layer_tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes of one decoder layer's tensors, by their names inside the layer."""
        hidden, mlp = self.hidden_size, self.intermediate_size
        linears = {
            "self_attn.q_proj": (self.mha_width, hidden, self.attention_bias),
            "self_attn.k_proj": (self.key_value_width, hidden, self.attention_bias),
            "self_attn.v_proj": (self.key_value_width, hidden, self.attention_bias),
            "self_attn.o_proj": (hidden, self.mha_width, self.attention_bias),
            "mlp.gate_proj": (mlp, hidden, self.mlp_bias),
            "mlp.up_proj": (mlp, hidden, self.mlp_bias),
            "mlp.down_proj": (hidden, mlp, self.mlp_bias),
        }
        shapes: dict[str, tuple[int, ...]] = {}
        for name, (rows, columns, bias) in linears.items():
            shapes[f"{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{name}.bias"] = (rows,)
        shapes["input_layernorm.weight"] = (hidden,)
        shapes["post_attention_layernorm.weight"] = (hidden,)
        return shapes

    def outer_tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors outside the decoder layers; a tied LM head is not a tensor."""
        shapes = {
            "model.embed_tokens.weight": (self.vocab_size, self.hidden_size),
            "model.norm.weight": (self.hidden_size,),
        }
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor that a checkpoint of this architecture holds, as (name, shape)."""
        yield from self.outer_tensors().items()
        for layer in range(self.num_hidden_layers):
            for name, shape in self.layer_tensors().items():
                yield f"model.layers.{layer}.{name}", shape

    @property
    def parameters(self) -> int:
        """Number of parameters, tied embeddings counted once."""
        per_layer = sum(math.prod(shape) for shape in self.layer_tensors().values())
        outer = sum(math.prod(shape) for shape in self.outer_tensors().values())
        return outer + self.num_hidden_layers * per_layer
