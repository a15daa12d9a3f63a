"""The widths of a model: what decides its size, apart from any weights.

Everything that can be said exactly before a tensor is read starts here: which tensors a checkpoint
must hold, how wide the waists are, what a cut would leave. Widths belong to layers; a model whose
layers all have the same ones is the usual case, and the only one that stock classes load.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from transact_core.models.families.description import Block, Family
from transact_core.models.families.table import family_of

if TYPE_CHECKING:
    # Not imported with torch behind it: the first page needs the sizes and nothing else.
    from torch import nn

    from transact_core.models.stock_class import StockConfig, StockModel

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes that one weight takes, by the name of its dtype in torch."""


@dataclass(frozen=True)
class LayerWidths:
    """The widths of one decoder layer that may differ from those of other layers."""

    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int

    def __post_init__(self) -> None:
        _require_positive(vars(self))
        _require_even_groups(self.num_attention_heads, self.num_key_value_heads)


@dataclass(frozen=True)
class Architecture:
    """Field names are those of `transformers.LlamaConfig`.

    Where layers differ, `layer_widths` has an entry for each of them, and the three widths beside
    it are the largest of any layer.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    attention_bias: bool
    """Whether all projections of the attention have biases. Where a family gives some of them
    biases in any case, these do not count."""
    mlp_bias: bool
    layer_widths: tuple[LayerWidths, ...] = ()
    """Empty where all layers have the same widths, those of the fields above."""
    model_type: str = "llama"
    """Of the family, which says which tensors there are beside the projections."""

    def __post_init__(self) -> None:
        _require_positive(self.config_values())
        if self.uniform:
            _require_even_groups(self.num_attention_heads, self.num_key_value_heads)
            return
        if len(self.layer_widths) != self.num_hidden_layers:
            raise ValueError(
                f"there are widths of {len(self.layer_widths)} layers, where the model has "
                f"{self.num_hidden_layers}"
            )
        for name, widest in _widest(self.layer_widths).items():
            if getattr(self, name) != widest:
                raise ValueError(f"{name} is not {widest}, the largest of any layer")

    @classmethod
    def from_config(cls, config: "StockConfig") -> "Architecture":
        """Of a model whose layers are as its configuration says, all alike."""
        return cls(**_values_of(config))

    @classmethod
    def from_model(cls, model: "StockModel") -> "Architecture":
        """Of a model in memory, whose layers may have widths of their own."""
        values = _values_of(model.config)
        layers = [_widths_in(layer, values["head_dim"]) for layer in model.model.layers]
        # The configuration has the largest widths of any layer, which need not make a layer.
        return cls(**values | vars(layers[0])).with_layers(layers)

    def with_layers(self, layers: Sequence[LayerWidths]) -> "Architecture":
        """The same with these widths of its layers, one entry a layer."""
        own = () if len(set(layers)) == 1 else tuple(layers)
        return replace(self, **_widest(layers), layer_widths=own)

    def config_values(self) -> dict[str, int | bool]:
        """The fields that a configuration of transformers has too, by name."""
        return {name: getattr(self, name) for name in CONFIG_FIELDS}

    @property
    def family(self) -> Family:
        """What is known of the family."""
        return family_of(self.model_type)

    @property
    def uniform(self) -> bool:
        """Whether all layers have the same widths."""
        return not self.layer_widths

    @property
    def layers(self) -> tuple[LayerWidths, ...]:
        """The widths of each layer."""
        return tuple(map(self.widths_of, range(self.num_hidden_layers)))

    def widths_of(self, layer_index: int) -> LayerWidths:
        """The widths of one layer."""
        if self.layer_widths:
            return self.layer_widths[layer_index]
        return LayerWidths(
            self.num_attention_heads, self.num_key_value_heads, self.intermediate_size
        )

    @property
    def mha_width(self) -> int:
        """Width of the attention's transitional activation, the input of `o_proj`.

        Where layers differ, of the widest one.
        """
        return self.num_attention_heads * self.head_dim

    @property
    def queries_per_group(self) -> int:
        """Query heads that share one key-value head (1 without grouping).

        Raises:
            ValueError: layers differ, so that there is no one number.
        """
        if not self.uniform:
            raise ValueError("layers of different widths have no one number of queries a group")
        return self.num_attention_heads // self.num_key_value_heads

    def layer_tensors(self, layer_index: int) -> dict[str, tuple[int, ...]]:
        """Shapes of one decoder layer's tensors, by their names inside the layer."""
        hidden, family = self.hidden_size, self.family
        rows = self.block_rows(layer_index)
        linears: dict[str, tuple[int, int]] = {}
        for module, inputs, writer, width in (
            ("self_attn", family.attention_inputs, "o_proj", rows["queries"]),
            ("mlp", family.mlp_inputs, "down_proj", rows["channels"]),
        ):
            for name, blocks in inputs.items():
                linears[f"{module}.{name}"] = (sum(rows[block] for block in blocks), hidden)
            linears[f"{module}.{writer}"] = (hidden, width)
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in linears.items():
            module, projection = name.split(".")
            shapes[f"{name}.weight"] = shape
            biased = self.attention_bias if module == "self_attn" else self.mlp_bias
            if biased or projection in family.always_biased:
                shapes[f"{name}.bias"] = shape[:1]
        for name in family.head_norms:
            shapes[f"self_attn.{name}.weight"] = (self.head_dim,)
        for norms in family.norms.values():
            for name in filter(None, (norms.before, norms.after)):
                shapes[f"{name}.weight"] = (hidden,)
        return shapes

    def block_rows(self, layer_index: int) -> dict[Block, int]:
        """How many rows each block of a layer's projections has."""
        widths = self.widths_of(layer_index)
        key_value = widths.num_key_value_heads * self.head_dim
        return {
            "queries": widths.num_attention_heads * self.head_dim,
            "keys": key_value,
            "values": key_value,
            "channels": widths.intermediate_size,
        }

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
        for layer_index in range(self.num_hidden_layers):
            for name, shape in self.layer_tensors(layer_index).items():
                yield f"model.layers.{layer_index}.{name}", shape

    def layer_parameters(self, layer_index: int) -> int:
        """Number of parameters of one decoder layer, its norms among them."""
        return sum(math.prod(shape) for shape in self.layer_tensors(layer_index).values())

    @property
    def parameters(self) -> int:
        """Number of parameters, tied embeddings counted once."""
        outer = sum(math.prod(shape) for shape in self.outer_tensors().values())
        # Of a million layers that a damaged file claims, one is looked at.
        if self.uniform:
            return outer + self.num_hidden_layers * self.layer_parameters(0)
        return outer + sum(map(self.layer_parameters, range(self.num_hidden_layers)))


CONFIG_FIELDS = tuple(
    name for name in Architecture.__dataclass_fields__ if name not in ("layer_widths", "model_type")
)
"""The fields of an architecture that a configuration of transformers has too."""


def _values_of(config: "StockConfig") -> dict[str, int | bool | str]:
    """The fields of an architecture as a configuration has them, by name."""
    family = family_of(config.model_type)
    values = {name: getattr(config, name, None) for name in CONFIG_FIELDS}
    if values["head_dim"] is None:
        values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
    for name in ("attention_bias", "mlp_bias"):
        if name not in family.bias_fields:
            # The class makes no such biases, whatever its configuration says.
            values[name] = False
    return {**values, "model_type": config.model_type}


def _widths_in(layer: "nn.Module", head_dim: int) -> LayerWidths:
    """The widths of a decoder layer in memory."""
    attention = layer.self_attn
    inputs = family_of(attention.config.model_type).attention_inputs
    rows = {blocks: attention.get_submodule(name).out_features for name, blocks in inputs.items()}
    fused = rows.get(("queries", "keys", "values"))
    queries = attention.o_proj.in_features if fused else rows["queries",]
    keys = (fused - queries) // 2 if fused else rows["keys",]
    return LayerWidths(
        num_attention_heads=queries // head_dim,
        num_key_value_heads=keys // head_dim,
        intermediate_size=layer.mlp.down_proj.in_features,
    )


def _require_positive(values: dict[str, int | bool]) -> None:
    for name, value in values.items():
        if not isinstance(value, bool) and value < 1:
            raise ValueError(f"{name} is {value}")


def _require_even_groups(heads: int, groups: int) -> None:
    if heads % groups:
        raise ValueError(f"{heads} attention heads cannot share {groups} key-value heads evenly")


def _widest(layers: Sequence[LayerWidths]) -> dict[str, int]:
    """The largest of each width; together they need not make a possible layer."""
    return {
        name: max(getattr(layer, name) for layer in layers)
        for name in LayerWidths.__dataclass_fields__
    }
