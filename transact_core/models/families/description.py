"""What tells one family of decoder models from another, as far as cutting them is concerned.

All families share the two waists, the inputs of `self_attn.o_proj` and of `mlp.down_proj`, and the
places of what lies outside the layers: `model.embed_tokens`, `model.layers`, `model.norm`,
`model.rotary_emb` and `lm_head`. A description says what differs. Everything that a model's own
code can be asked for (masks, positions, scaled embeddings, scaled logits) is asked of that code and
stands in no description.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Block = Literal["queries", "keys", "values", "channels"]
"""What a block of a projection's rows makes: `queries` has a head for each query head, `keys` and
`values` one for each key-value head, `channels` a row for each channel of the MLP."""


@dataclass(frozen=True)
class Norms:
    """Names of a module's norms in the decoder layer; None where there is none."""

    before: str | None
    after: str | None = None


@dataclass(frozen=True)
class InLlamaCpp:
    """What llama.cpp, with its own converter, makes of a family. The defaults are LLaMA's."""

    biases: bool = True
    """Whether it reads a model with biases on all projections of a module."""
    any_attention_width: bool = True
    """Whether it reads heads that together are not as wide as the residual stream."""
    unrotated: int | None = None
    """It takes every layer of this number to be one that does not rotate; None for none."""
    unlimited: int | None = None
    """It takes every layer of this number to be one that sees all tokens, and the others to have
    the sliding window; None where it forgets sliding windows."""
    scale_is_of: str | None = None
    """Field of the configuration that it takes to equal head_dim; None for none."""


@dataclass(frozen=True)
class AsGguf:
    """How a model of a family is written for llama.cpp. The defaults are LLaMA's."""

    architecture: str = "llama"
    """`general.architecture`, which decides what llama.cpp computes."""
    in_pairs: bool = True
    """Whether it rotates dims 2i and 2i + 1 of a head together, where transformers rotates i and
    i + head_dim / 2."""
    rope_factors: bool = True
    """Whether it reads factors that every rotary frequency is divided by."""
    any_attention_width: bool = True
    """Whether it reads heads that together are not as wide as the residual stream."""
    or_llama: bool = False
    """Whether the architecture `llama` computes the same, for what this one cannot hold."""
    attention_bias: bool = True
    mlp_bias: bool = True
    """Whether it reads a model with biases on all projections of the module."""
    unrotated: int | None = None
    """It takes every layer of this number to be one that does not rotate; None for none."""
    scales: Mapping[str, str] = field(default_factory=dict)
    """For each factor that its metadata holds, by key, the configuration's field."""


@dataclass(frozen=True)
class InCTranslate2:
    """What CTranslate2's converter makes of a family. The defaults are LLaMA's."""

    has_converter: bool = True
    any_attention_width: bool = False
    """Whether it reads heads that together are not as wide as the residual stream."""
    needs_unknown_token: bool = False
    """Whether it refuses a tokenizer without an unknown token."""
    scale_is_of: str | None = None
    """Field of the configuration that it takes to equal head_dim; None for none."""
    refuses_longer_texts: bool = False
    """Whether it refuses a text that is longer than the sliding window, in place of forgetting
    the window."""


@dataclass(frozen=True)
class Family:
    """One family. The defaults are LLaMA's."""

    model_type: str
    """As `config.json` names it."""
    title: str
    """As people name it."""
    class_name: str
    """The causal language model's class in transformers."""
    attention_inputs: Mapping[str, tuple[Block, ...]] = field(
        default_factory=lambda: {
            "q_proj": ("queries",),
            "k_proj": ("keys",),
            "v_proj": ("values",),
        }
    )
    """The blocks of rows of each projection into the attention, in the order of the rows."""
    mlp_inputs: Mapping[str, tuple[Block, ...]] = field(
        default_factory=lambda: {"gate_proj": ("channels",), "up_proj": ("channels",)}
    )
    """The same for the MLP."""
    bias_fields: tuple[str, ...] = ("attention_bias", "mlp_bias")
    """Fields of the configuration that give all projections of a module biases. A field that is
    missing here is one that the class does not read."""
    always_biased: tuple[str, ...] = ()
    """Projections that have a bias whatever the configuration says."""
    norms: Mapping[str, Norms] = field(
        default_factory=lambda: {
            "mha": Norms("input_layernorm"),
            "mlp": Norms("post_attention_layernorm"),
        }
    )
    """Around each module, "mha" and "mlp"."""
    head_norms: Mapping[str, Block] = field(default_factory=dict)
    """Norms in the attention over the dims of one head, by name, and the block they are of."""
    residual_multiplier: str | None = None
    """Attribute of a decoder layer: what the module's output is multiplied by before it is added to
    the residual stream."""
    attention_multiplier: str | None = None
    """Field of the configuration that the factor of the attention's logits follows from; None where
    it is one over the root of head_dim."""
    rotates_field: str | None = None
    """Field of the configuration with an entry for each layer, 0 for one that does not rotate its
    queries and keys; None where all do."""
    not_causal_field: str | None = None
    """Field of the configuration that lets the attention look at later tokens, which a model of
    language must not; models that set it are refused."""
    divides_hidden_size: bool = False
    """Whether the configuration refuses a number of heads that does not divide hidden_size."""
    gguf: str | None = None
    """`general.architecture` of the GGUF files that transformers reads as this family."""
    as_gguf: AsGguf | None = None
    """How it is written as a GGUF file; None where it is not. A model that computes what a LLaMA
    does is written as one, whatever its class."""
    as_llama: Callable[[int], dict[str, object]] | None = None
    """Takes a number of layers and gives the fields with which the class computes what a LLaMA
    does, from the same tensors; None where it cannot."""

    llama_cpp: InLlamaCpp | None = InLlamaCpp()
    """None where it was not tried."""
    ctranslate2: InCTranslate2 | None = InCTranslate2()
    """None where it was not tried."""

    @property
    def projections(self) -> dict[str, tuple[str, ...]]:
        """Names in the decoder layer of the projections that lose width, by module.

        The last one of each loses columns, the others rows.
        """
        return {
            "mha": (*(f"self_attn.{name}" for name in self.attention_inputs), "self_attn.o_proj"),
            "mlp": (*(f"mlp.{name}" for name in self.mlp_inputs), "mlp.down_proj"),
        }

    @property
    def model_class(self) -> "type[PreTrainedModel]":
        """The class in transformers, which is imported at the first call."""
        import transformers

        return getattr(transformers, self.class_name)

    def holds(
        self, heads: set[int], hidden_size: int, attention_bias: bool, mlp_bias: bool
    ) -> bool:
        """Whether the class can be had with these numbers of heads and these biases."""
        if self.divides_hidden_size and any(hidden_size % count for count in heads):
            return False
        wanted = {"attention_bias": attention_bias, "mlp_bias": mlp_bias}
        return all(name in self.bias_fields for name, wants in wanted.items() if wants)

    def allows_heads(self, heads: int, hidden_size: int) -> bool:
        """Whether a cut to this number of heads can be saved, in this class or in another one that
        computes the same."""
        return not self.divides_hidden_size or bool(self.as_llama) or hidden_size % heads == 0

    def read_config(self, raw: Mapping[str, Any]) -> "PreTrainedConfig":
        """The configuration that a `config.json` of this family holds.

        Raises:
            Exception: whatever the class raises where a field is of a wrong type or value.
        """
        return self.model_class.config_class.from_dict(dict(raw))

    def rotates(self, config: "PreTrainedConfig", layer_index: int) -> bool:
        """Whether a layer of such a model rotates its queries and keys."""
        return not self.rotates_field or bool(getattr(config, self.rotates_field)[layer_index])

    def computes_as_llama(self, config: "PreTrainedConfig") -> bool:
        """Whether a model of this configuration computes what a LLaMA does of the same tensors."""
        layers = range(config.num_hidden_layers)
        return (
            self.as_llama is not None
            and sliding_window(config) is None
            and all(self.rotates(config, layer_index) for layer_index in layers)
        )


def rotary_parameters(config: "PreTrainedConfig") -> list[Mapping[str, Any]]:
    """The parameters of the rotary embedding, or of each kind of layers where kinds have their
    own."""
    parameters = config.rope_parameters or {}
    of_kinds = [each for each in parameters.values() if isinstance(each, dict)]
    return of_kinds or [parameters]


def rotary_kinds(config: "PreTrainedConfig") -> list[str]:
    """The `rope_type` of each of `rotary_parameters`."""
    return [each.get("rope_type", "default") for each in rotary_parameters(config)]


def sliding_window(config: "PreTrainedConfig") -> int | None:
    """To how many tokens some layer's attention reaches back; None where all layers see all."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    return getattr(config, "sliding_window", None)
