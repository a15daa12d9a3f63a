"""Where the decoder layers of a model come from, and what the model passes to them.

Every pass over a model takes a layer from `layers_of(model)`, for as long as it works on it, and
runs it with the arguments that the model's own code passes to it.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from transact_core.models.stored_layers import StoredLayers

Arguments = Mapping[str, object]
"""What a decoder layer is called with beside the hidden states: `attention_mask`,
`position_embeddings`, `position_ids` and so on. They hold for one window, with a batch dimension of
1, and broadcast over any number of windows of the same length."""


class Layers:
    """The decoder layers of a model, lent one at a time; here they are all in memory.

    A layer is used only inside the `with` block that borrowed it, so that it may be read from disk
    for that time, as `StoredLayers` are. Blocks may be nested: a layer that is borrowed again
    inside the block that borrowed it is the same object.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        self._layers = layers

    def __len__(self) -> int:
        return len(self._layers)

    @contextmanager
    def borrow(self, layer_index: int) -> Iterator[nn.Module]:
        """The decoder layer of that index, counted from 0."""
        yield self._layers[layer_index]


def layers_of(model: PreTrainedModel) -> Layers | StoredLayers:
    """The layers of a causal language model."""
    return model.model.layers if on_disk(model) else Layers(model.model.layers)


def on_disk(model: PreTrainedModel) -> bool:
    """Whether the model's layers are read from disk when they are borrowed."""
    return isinstance(model.model.layers, StoredLayers)


def weights_of(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a model by its name, in the order of `state_dict`; those of a layer hold
    until the next one is asked for."""
    done = set()
    for name, tensor in model.state_dict().items():
        if not name.startswith("model.layers."):
            yield name, tensor
            continue
        layer_index = int(name.split(".")[2])
        if layer_index not in done:
            done.add(layer_index)
            with layers_of(model).borrow(layer_index) as layer:
                for own_name, weight in layer.state_dict().items():
                    yield f"model.layers.{layer_index}.{own_name}", weight


class _Recorder(nn.Module):
    """Stands where a decoder layer does, keeps what it is called with and computes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: Arguments = {}

    def forward(self, hidden: torch.Tensor, **arguments: object) -> torch.Tensor:
        self.arguments = arguments
        return hidden


@torch.no_grad()
def before_layers(
    model: PreTrainedModel, ids: torch.Tensor
) -> tuple[torch.Tensor, tuple[Arguments, ...]]:
    """The hidden states that enter the first layer, and what each layer is called with.

    `ids` are token ids of shape (windows, sequence_length) on the model's device; the hidden states
    have shape (windows, sequence_length, hidden_size). Both come from the model's own forward
    pass, run on a shallow copy in which recorders stand in for the layers and the last norm is left
    out. So masks, positions and scaled embeddings are right for every family of models.
    """
    recorders = [_Recorder() for _ in range(len(layers_of(model)))]
    body = copy.copy(model.model)
    # The copy shares the table of submodules until it gets one of its own.
    body._modules = {
        **body._modules,
        "layers": nn.ModuleList(recorders),
        "norm": nn.Identity(),
    }
    hidden = body(input_ids=ids, use_cache=False).last_hidden_state
    return hidden, tuple(recorder.arguments for recorder in recorders)


def behind_layers(
    model: PreTrainedModel,
    ids: torch.Tensor,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> torch.Tensor:
    """The hidden states that leave the last layer, each window run alone as the model's own forward
    pass runs it; each layer is borrowed once for all windows.

    `ids` are as in `before_layers`. `report` is told how many of all windows have passed how many
    layers, and how many do so in all.
    """
    layers = layers_of(model)
    total = len(layers) * len(ids)
    arguments = before_layers(model, ids[:1])[1]
    hidden = torch.cat([before_layers(model, window)[0] for window in ids.split(1)])
    for layer_index in range(len(layers)):
        with layers.borrow(layer_index) as layer:
            for place, window in enumerate(hidden.split(1)):
                report(layer_index * len(ids) + place, total)
                window.copy_(layer(window, **arguments[layer_index]))
    report(total, total)
    return hidden


class _Given(nn.Module):
    """Stands where a model's body does and gives the states that were put into it."""

    def __init__(self, states: torch.Tensor) -> None:
        super().__init__()
        self.states = states

    def forward(self, **_: object) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=self.states)


def logits_of(model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """The logits of states that have passed the last norm, by the model's own code.

    `states` have shape (tokens, hidden_size), the logits (tokens, vocab_size). Some families scale
    or bend what the LM head gives; all of that is the code's own.
    """
    head = copy.copy(model)
    head._modules = {**model._modules, "model": _Given(states[None])}
    return head(use_cache=False).logits[0]
