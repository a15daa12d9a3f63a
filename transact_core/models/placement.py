"""Layers laid over several devices, and the hand-over of what passes through them.

Where a model fits into several GPUs together and into none alone, each of them holds neighbouring
layers, and the residual stream is handed on from one to the next: it is small beside the weights.
Embedding, last norm and LM head are on the first device, to which the stream returns behind the
last layer. So what runs the model as a whole, or looks at its logits, has to know of one device
only.

A layer that is called as a whole moves what it is called with by itself (`hand_on`). Whoever runs a
layer's modules one by one moves the stream to the layer's device first (`forward.stream`).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from transact_core.models.architecture import Architecture
from transact_core.models.devices import MemoryEstimate, free_memory

HALVINGS = 30
"""How often the range of a device's share of its memory is halved, to find the smallest one."""


def lay_out(
    architecture: Architecture, dtype: torch.dtype, devices: Sequence[torch.device]
) -> tuple[MemoryEstimate, tuple[torch.device, ...]]:
    """The device of each layer, in the order of the devices, all of which fill the same share of
    their free memory as far as whole layers allow.

    Also what loading takes and what is free. Where not all layers fit, what is free counts whole
    layers only, and the devices are of the layers that do.
    """
    layers = [
        architecture.layer_parameters(index) * dtype.itemsize
        for index in range(architecture.num_hidden_layers)
    ]
    outer = sum(map(math.prod, architecture.outer_tensors().values())) * dtype.itemsize
    free = [free_memory(device) for device in devices]

    def filled(share: float) -> list[int]:
        """How many layers lie on each device that fills at most this share of its memory."""
        counts, following, taken = [], 0, outer
        for available in free:
            begin = following
            while following < len(layers) and taken + layers[following] <= share * available:
                taken += layers[following]
                following += 1
            counts.append(following - begin)
            taken = 0
        return counts

    least, most = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (least + most) / 2
        if sum(filled(middle)) == len(layers):
            most = middle
        else:
            least = middle
    counts = filled(most)
    of_layers = tuple(
        device for device, count in zip(devices, counts, strict=True) for _ in range(count)
    )
    fits = len(of_layers) == len(layers) and outer <= free[0]
    available = sum(free) if fits else min(outer, free[0]) + sum(layers[: len(of_layers)])
    names = ", ".join(map(str, devices))
    return MemoryEstimate(outer + sum(layers), available, names), of_layers


def device_of(module: nn.Module) -> torch.device:
    """Where a layer's weights are, or those of another module that has some."""
    return next(module.parameters()).device


def layout_of(model: PreTrainedModel) -> tuple[torch.device, ...]:
    """The device of each layer where they are on several; nothing where all are on one, or are read
    from disk when they are needed."""
    layers = tuple(device_of(layer) for layer in model.model.layers)
    return layers if {*layers} - {model.device, torch.device("meta")} else ()


def devices_of(model: PreTrainedModel) -> tuple[torch.device, ...]:
    """The devices that a model's weights are on, without repetition, that of all outside of the
    layers first."""
    return tuple(dict.fromkeys((model.device, *layout_of(model))))


def hand_on(model: PreTrainedModel) -> None:
    """Has each layer, and the norm behind them, move what they are called with to their device."""
    for module in (*model.model.layers, model.model.norm):
        module.register_forward_pre_hook(_move, with_kwargs=True)


def _move(module: nn.Module, arguments: tuple, named: dict) -> tuple[tuple, dict]:
    device = device_of(module)
    return placed(arguments, device), placed(named, device)


def placed(value: Any, device: torch.device) -> Any:
    """A tensor on a device, and so with those in tuples, lists and dictionaries; other values are
    given back as they are."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(placed(each, device) for each in value)
    if isinstance(value, dict):
        return {name: placed(each, device) for name, each in value.items()}
    return value
