"""Which stock class of transformers holds a cut.

A cut stays of its source's class, so that the runtimes that know the source know it too. One case
is different: `LlamaConfig` refuses a `num_attention_heads` that does not divide `hidden_size`. Some
other classes compute exactly the same with the same weights and have no such rule:
`MistralForCausalLM` without a sliding window, which knows no biases, and `SmolLM3ForCausalLM` with
rotary embeddings in every layer, which does. All three name their tensors alike.
"""

import copy
from dataclasses import replace

from transformers import PreTrainedConfig, PreTrainedModel

from transact_core.base.errors import TransActError, last_line
from transact_core.models.architecture import Architecture
from transact_core.models.families.description import Family
from transact_core.models.families.table import FAMILIES, family_of

StockModel = PreTrainedModel
"""A causal language model of one of the families."""
StockConfig = PreTrainedConfig
"""Its configuration."""

CLASS_FIELDS = (
    "model_type",
    "architectures",
    "transformers_version",
    "pretraining_tp",
    "auto_map",
)
"""Fields of a configuration that belong to its class or its file, not to the model."""
WINDOW_FIELDS = ("sliding_window", "use_sliding_window", "no_rope_layers", "layer_types")


def family_for(architecture: Architecture, config: StockConfig) -> Family:
    """The family whose class holds a cut of these widths; `config` is the dense model's.

    A model stays of its source's class where that class can hold it.

    Raises:
        TransActError: biases that neither the source's class nor one that computes the same has,
            or a number of heads that the source's class refuses and no other can take its place.
    """
    require_biases(config, architecture.attention_bias, architecture.mlp_bias)
    heads = {widths.num_attention_heads for widths in architecture.layer_widths}
    heads.add(architecture.num_attention_heads)
    biases = architecture.attention_bias, architecture.mlp_bias
    for family in _candidates(config):
        if family.holds(heads, architecture.hidden_size, *biases):
            return family
    raise TransActError(
        f"{architecture.num_attention_heads} heads do not divide the hidden size of "
        f"{architecture.hidden_size}, which {family_of(config.model_type).class_name} requires; "
        "choose another ratio."
    )


def require_biases(config: StockConfig, attention: bool, mlp: bool) -> None:
    """Refuses biases of whole modules that no class which computes the same can have.

    Raises:
        TransActError: there is none; the sentence names the source's class.
    """
    if not any(family.holds(set(), 1, attention, mlp) for family in _candidates(config)):
        raise TransActError(
            f"{family_of(config.model_type).class_name} has no bias for each of its projections, "
            "into which the recovery bias writes; choose the recovery least-squares or none."
        )


def _candidates(config: StockConfig) -> list[Family]:
    """The source's family, and those whose classes compute the same with the same weights."""
    source = family_of(config.model_type)
    if not source.computes_as_llama(config):
        return [source]
    return [source, *(family for family in FAMILIES.values() if family.as_llama)]


def config_for(config: StockConfig, architecture: Architecture) -> StockConfig:
    """A copy of `config` with these widths, of another class where its own cannot hold them.

    Every field that the classes have different defaults for is set, so that no default of the
    other class takes the place of what the source says.

    Raises:
        TransActError: as `family_for` does.
    """
    family = family_for(architecture, config)
    values = written_values(replace(architecture, model_type=family.model_type))
    if family.model_type == config.model_type:
        cut = copy.deepcopy(config)
        # It names code that lies beside the source's weights and not beside those of the cut.
        vars(cut).pop("auto_map", None)
        for name, value in values.items():
            setattr(cut, name, value)
        _require_readable(cut, family)
        return cut
    left_out = {*CLASS_FIELDS, *WINDOW_FIELDS, *architecture.config_values()}
    raw = {name: value for name, value in config.to_dict().items() if name not in left_out}
    own = family.as_llama(architecture.num_hidden_layers)
    cut = family.read_config(raw | own | values)
    cut._attn_implementation = config._attn_implementation
    return cut


def _require_readable(config: StockConfig, family: Family) -> None:
    """Refuses a configuration that the class would write and not read again.

    Raises:
        TransActError: the class refuses it; the sentence says why.
    """
    try:
        family.read_config(config.to_dict())
    except Exception as error:
        raise TransActError(
            f"{family.class_name} cannot have these widths ({last_line(error)}); choose a ratio of "
            "0 for the attention."
        ) from None


def written_values(architecture: Architecture) -> dict[str, int | bool]:
    """The fields of a configuration that say the widths, those that the family's class reads.

    `head_dim` is implied by the other widths where it is absent, so it is written out too.
    """
    unread = {"attention_bias", "mlp_bias"} - set(architecture.family.bias_fields)
    values = architecture.config_values()
    return {name: value for name, value in values.items() if name not in unread}


def explanation(model_class: str, source_type: str = "llama") -> str | None:
    """Why a model is saved as another class than its source's, whose `model_type` is given.

    None where it is the same class, or `LlamaForCausalLM`.

    One sentence without a subject, to follow the name of the class.
    """
    if model_class in (family_of("llama").class_name, family_of(source_type).class_name):
        return None
    return (
        "which computes the same, because LlamaConfig requires the number of attention heads to "
        "divide hidden_size"
    )
