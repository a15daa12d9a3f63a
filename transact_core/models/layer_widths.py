"""Models whose layers have widths of their own: how `config.json` says so, and how one is made.

transformers has a notation for it, `per_layer_config`: from the index of a layer to those fields of
the configuration that are different there. Version 5.23 reads it into a configuration, and its
model classes refuse that configuration, so stock transformers does not load such a checkpoint. Here
the classes are made with the largest widths of any layer, and each layer is then made anew with its
own.
"""

import copy
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from transact_core.models.architecture import Architecture, LayerWidths
from transact_core.models.families.description import Family

FIELD = "per_layer_config"
MODELING_CLASS, BLOCK_CLASS = "OwnWidthsForCausalLM", "DeciLMForCausalLM"
"""What `architectures` names where code for other programs lies beside such a checkpoint: the class
in that code, and the class by which vLLM knows models with block configurations."""
FOR_OTHERS = ("auto_map", "block_configs")
"""Fields that say the same widths to those programs."""
WIDTH_FIELDS = tuple(LayerWidths.__dataclass_fields__)
Overrides = Mapping[int, Mapping[str, int]]
"""The widths of a layer that are not those of the configuration, by the layer's index."""


def per_layer_config(architecture: Architecture) -> dict[str, dict[str, int]]:
    """What `config.json` holds under `FIELD`; empty where all layers have the same widths."""
    overrides = {}
    for layer_index, widths in enumerate(architecture.layer_widths):
        own = {
            name: size for name, size in vars(widths).items() if size != getattr(architecture, name)
        }
        if own:
            overrides[str(layer_index)] = own
    return overrides


def separated(raw: Mapping[str, Any]) -> tuple[dict[str, Any], Overrides]:
    """A `config.json` without what it says of single layers, and that.

    Raises:
        ValueError: it says of a layer what cannot be had here, which the message names.
    """
    rest = dict(raw)
    stored = rest.pop(FIELD, None) or {}
    if stored:
        rest = {name: value for name, value in rest.items() if name not in FOR_OTHERS}
    if not isinstance(stored, dict):
        raise ValueError(f"{FIELD} is no mapping of layers to their fields")
    overrides = {}
    for layer, fields in stored.items():
        if not isinstance(fields, dict):
            raise ValueError(f"{FIELD} of layer {layer} is no mapping of fields")
        if others := sorted(set(fields) - set(WIDTH_FIELDS)):
            raise ValueError(f"{FIELD} of layer {layer} sets {others[0]}, which is not known here")
        if wrong := [name for name, size in fields.items() if type(size) is not int]:
            raise ValueError(f"{wrong[0]} of layer {layer} is {fields[wrong[0]]!r}")
        overrides[int(layer)] = dict(fields)
    return rest, overrides


def with_overrides(architecture: Architecture, overrides: Overrides) -> Architecture:
    """The architecture of a configuration, with the widths that single layers have of their own.

    Raises:
        ValueError: a layer that does not exist, or widths that cannot be had.
    """
    if not overrides:
        return architecture
    if wrong := set(overrides) - set(range(architecture.num_hidden_layers)):
        raise ValueError(f"{FIELD} names layer {min(wrong)}, which does not exist")
    general = {name: getattr(architecture, name) for name in WIDTH_FIELDS}
    return architecture.with_layers(
        [
            LayerWidths(**general | dict(overrides.get(layer_index, {})))
            for layer_index in range(architecture.num_hidden_layers)
        ]
    )


def narrow_layers(model: PreTrainedModel, architecture: Architecture) -> None:
    """Makes each decoder layer anew, with the widths that the architecture has for it.

    A stock layer takes its widths from the configuration that it is made with, so each is made
    with one of its own. The model's own configuration has the largest widths of any layer.
    """
    for layer_index, widths in enumerate(architecture.layers):
        config = copy.copy(model.config)
        for name, value in vars(widths).items():
            setattr(config, name, value)
        layer = type(model.model.layers[layer_index])(config, layer_index)
        model.model.layers[layer_index] = layer


def class_with_widths(family: Family, architecture: Architecture) -> type[PreTrainedModel]:
    """The family's class, whose models have layers of these widths; to load a checkpoint with."""

    class WithWidths(family.model_class):
        def __init__(self, config: Any, *given: Any, **named: Any) -> None:
            super().__init__(config, *given, **named)
            narrow_layers(self, architecture)

    return WithWidths
