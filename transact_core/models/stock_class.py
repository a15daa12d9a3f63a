"""Which stock class of transformers computes a LLaMA of given widths.

`LlamaConfig` refuses a `num_attention_heads` that does not divide `hidden_size`. Two other stock
classes compute exactly the same with the same weights and have no such rule: `MistralForCausalLM`
without a sliding window, which knows no biases, and `SmolLM3ForCausalLM` with rotary embeddings in
every layer, which does. All three name their tensors alike.
"""

import copy
from collections.abc import Mapping
from typing import Any

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from transact_core.models.architecture import CONFIG_FIELDS, Architecture

StockModel = LlamaForCausalLM | MistralForCausalLM | SmolLM3ForCausalLM
StockConfig = LlamaConfig | MistralConfig | SmolLM3Config

MODEL_CLASSES: dict[str, type[StockModel]] = {
    "llama": LlamaForCausalLM,
    "mistral": MistralForCausalLM,
    "smollm3": SmolLM3ForCausalLM,
}
"""By `model_type`, in the order in which they are preferred."""

CLASS_FIELDS = (
    "model_type",
    "architectures",
    "transformers_version",
    "pretraining_tp",
    "auto_map",
)
"""Fields of a configuration that belong to its class or its file, not to the model."""
WINDOW_FIELDS = ("sliding_window", "use_sliding_window", "no_rope_layers", "layer_types")


def model_type_for(architecture: Architecture, source_type: str = "llama") -> str:
    """The `model_type` of the class that holds this architecture.

    A model stays of its source's class where that class can hold it, so that a LLaMA whose head
    count divides `hidden_size` is saved as a LLaMA.
    """
    return next(
        model_type
        for model_type in (source_type, *MODEL_CLASSES)
        if _holds(model_type, architecture)
    )


def _holds(model_type: str, architecture: Architecture) -> bool:
    if model_type == "llama":
        counts = {layer.num_attention_heads for layer in architecture.layer_widths}
        counts.add(architecture.num_attention_heads)
        return all(architecture.hidden_size % count == 0 for count in counts)
    if model_type == "mistral":
        return not (architecture.attention_bias or architecture.mlp_bias)
    return True


def config_for(config: StockConfig, architecture: Architecture) -> StockConfig:
    """A copy of `config` with these widths, of another class where its own cannot hold them.

    Every field that the classes have different defaults for is set, so that no default of the
    other class takes the place of what the source says.
    """
    # head_dim is implied by the other widths where it is absent, so it is written out too.
    values = architecture.config_values()
    model_type = model_type_for(architecture, config.model_type)
    if model_type == config.model_type:
        cut = copy.deepcopy(config)
        # It names code that lies beside the source's weights and not beside those of the cut.
        vars(cut).pop("auto_map", None)
        for name, value in values.items():
            if hasattr(cut, name):
                setattr(cut, name, value)
        return cut
    left_out = {*CLASS_FIELDS, *WINDOW_FIELDS}
    raw = {name: value for name, value in config.to_dict().items() if name not in left_out}
    if model_type == "mistral":
        raw = {name: value for name, value in raw.items() if name not in CONFIG_FIELDS}
        del values["attention_bias"], values["mlp_bias"]
        values["sliding_window"] = None
    elif model_type == "smollm3":
        values |= {
            "sliding_window": None,
            "use_sliding_window": False,
            "no_rope_layers": [1] * architecture.num_hidden_layers,
            "layer_types": ["full_attention"] * architecture.num_hidden_layers,
        }
    cut = MODEL_CLASSES[model_type].config_class.from_dict(raw | values)
    cut._attn_implementation = config._attn_implementation
    return cut


def read_config(raw: Mapping[str, Any]) -> StockConfig:
    """The configuration that a `config.json` of one of the classes holds.

    Raises:
        Exception: whatever the class raises where a field is of a wrong type or value.
    """
    return MODEL_CLASSES[raw.get("model_type", "llama")].config_class.from_dict(dict(raw))


def difference_from_llama(raw: Mapping[str, Any]) -> str | None:
    """What a model of one of the classes computes that no LLaMA does; None where nothing.

    `raw` is its `config.json`. The words follow "because".
    """
    model_type = raw.get("model_type", "llama")
    if model_type == "mistral":
        window = raw.get("sliding_window", MistralConfig.sliding_window)
        if window is not None:
            return f"its tokens attend to the last {window} only (sliding_window)"
    if model_type == "smollm3":
        rotated, kinds = raw.get("no_rope_layers"), raw.get("layer_types")
        if not isinstance(rotated, list) or not all(rotated):
            return "some of its layers have no rotary embedding (no_rope_layers)"
        if kinds is not None and set(map(str, kinds)) != {"full_attention"}:
            return "some of its layers do not attend to all tokens (layer_types)"
    return None


def explanation(model_class: str, source_type: str = "llama") -> str | None:
    """Why a model is saved as another class than its source's, whose `model_type` is given.

    None where it is the same class, or `LlamaForCausalLM`.

    One sentence without a subject, to follow the name of the class.
    """
    if model_class in (LlamaForCausalLM.__name__, MODEL_CLASSES[source_type].__name__):
        return None
    return (
        "which computes the same, because LlamaConfig requires the number of attention heads to "
        "divide hidden_size"
    )
