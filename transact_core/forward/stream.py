"""The residual stream of all calibration windows, run layer by layer instead of window by window.

What is measured here needs more memory for one layer than the layer's weights take, so only one
layer is worked on at a time: the hidden states of all windows wait before it, pass through one of
its modules in batches, and wait again. Memory is those hidden states and what the caller keeps of
one module.

Every layer runs through its own modules, with the arguments that its model passes to it. Its
transitional activation is read, and changed where asked, by a forward pre-hook on the output
projection of a shallow copy, so the model itself carries no hook.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel

from transact_core.base.linalg import inverse_rms
from transact_core.data.windows import Windows
from transact_core.forward.layers import Arguments, before_layers, layers_of
from transact_core.forward.waists import MODULES, Finite, output_projections, windows_a_batch
from transact_core.models.families.table import family_of_layer
from transact_core.models.placement import device_of, placed

Rotary = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of the rotary embedding, each of shape (1, sequence_length, head_dim)."""
Change = Callable[[torch.Tensor], torch.Tensor]
"""From an activation to another of the same shape; leaves its argument as it was."""
Changes = Mapping[tuple[str, int], Change]
"""The change to make to the activation at (site, layer index), a site being one of
`waists.SITES`."""


def unchanged(activation: torch.Tensor) -> torch.Tensor:
    """The change that changes nothing."""
    return activation


def run_module(
    layer: nn.Module,
    module: str,
    hidden: torch.Tensor,
    arguments: Arguments,
    change: Change = unchanged,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the output projection of a layer's "mha" or "mlp" writes, and the module's waist.

    `hidden` is the residual stream before the module, shape (batch, sequence_length, hidden_size).
    Gives (written, transitional): the output of the projection, shaped like `hidden`, of which
    `added` makes what enters the stream; and its input after `change`, shape (batch,
    sequence_length, num_attention_heads × head_dim) or (batch, sequence_length, intermediate_size).
    """
    normed = module_input(layer, module, hidden)
    if module == "mha":
        attention, seen = _observed(layer.self_attn, "o_proj", change)
        written = attention(hidden_states=normed, **arguments)[0]
    else:
        mlp, seen = _observed(layer.mlp, "down_proj", change)
        written = mlp(normed)
    return written, seen.pop()


def module_input(layer: nn.Module, module: str, hidden: torch.Tensor) -> torch.Tensor:
    """What a module reads: the residual stream, after the norm where the family has one there."""
    norm = family_of_layer(layer).norms[module].before
    return hidden if norm is None else layer.get_submodule(norm)(hidden)


def added(layer: nn.Module, module: str, written: torch.Tensor) -> torch.Tensor:
    """What is added to the residual stream where a module's output projection wrote `written`."""
    family = family_of_layer(layer)
    if norm := family.norms[module].after:
        written = layer.get_submodule(norm)(written)
    if family.residual_multiplier:
        written = written * getattr(layer, family.residual_multiplier)
    return written


# A norm behind a module makes what is added to the stream no longer linear in what is written. Of
# a small error it passes on what these two say, less the part along the output. That part is
# counted as if it stayed, which is nearer to the truth of large errors: where a share r of the
# output's energy is lost, orthogonal to the rest, the norm makes of it 2 (1 − √(1 − r)), which is
# between r and 2 r, and not r (1 − r).
def gains(layer: nn.Module, module: str) -> torch.Tensor | None:
    """The factor of each output by the norm behind a module, shape (hidden_size,), float32.

    None where no norm is there.
    """
    if not (norm := family_of_layer(layer).norms[module].after):
        return None
    # Some families store one less than the factor, so the norm itself is asked.
    weight = output_projections(layer)[module].weight
    ones = weight.new_ones(len(weight), dtype=torch.float32)
    return layer.get_submodule(norm)(ones)


def slopes(layer: nn.Module, module: str, written: torch.Tensor) -> torch.Tensor | None:
    """The factor of each token's error by the norm behind a module, shape (…, 1), float32.

    `written` is what the output projection writes, shape (…, hidden_size). None where no norm is
    there.
    """
    if family_of_layer(layer).norms[module].after is None:
        return None
    return inverse_rms(written, layer.self_attn.config.rms_norm_eps)


def output_weight(layer: nn.Module, module: str) -> torch.Tensor:
    """The weight of a module's output projection, times the `gains` of a norm behind it."""
    weight, factors = output_projections(layer)[module].weight, gains(layer, module)
    return weight if factors is None else weight.float() * factors[:, None]


def _observed(
    module: nn.Module, projection_name: str, change: Change
) -> tuple[nn.Module, list[torch.Tensor]]:
    """A shallow copy of a module, and the list into which it puts its transitional activation.

    The copy shares all weights; only its output projection is another object, which carries the
    hook. So others may run the same module at the same time.
    """
    seen: list[torch.Tensor] = []

    def before_projection(_: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        seen.append(change(inputs[0]))
        return (seen[-1],)

    projection = copy.copy(module.get_submodule(projection_name))
    projection._forward_pre_hooks = copy.copy(projection._forward_pre_hooks)
    projection.register_forward_pre_hook(before_projection)
    observed = copy.copy(module)
    observed._modules = {**module._modules, projection_name: projection}
    return observed, seen


# --- inside the attention --------------------------------------------------------------------
_OBSERVED_ATTENTION = "transact_observed"
"""Name under which transformers finds the attention function of `queries_and_keys`."""


def _hand_over(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    observed_attention: list[torch.Tensor],
    **_: object,
) -> tuple[torch.Tensor, None]:
    observed_attention += [query, key]
    # Nobody reads what the attention gives here; it only has to have the right shape.
    return value.new_zeros(()).expand(*query.shape[:-1], value.shape[-1]).transpose(1, 2), None


AttentionInterface.register(_OBSERVED_ATTENTION, _hand_over)


def queries_and_keys(
    layer: nn.Module, hidden: torch.Tensor, arguments: Arguments
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of a layer's attention as they meet: normalised and rotated by its own code.

    `hidden` is the residual stream before the layer, shape (batch, sequence_length, hidden_size).
    Queries have shape (batch, num_attention_heads, sequence_length, head_dim), keys (batch,
    num_key_value_heads, sequence_length, head_dim).
    """
    attention = copy.copy(layer.self_attn)
    attention.config = copy.copy(attention.config)
    attention.config._attn_implementation = _OBSERVED_ATTENTION
    query_and_key: list[torch.Tensor] = []
    normed = module_input(layer, "mha", hidden)
    attention(hidden_states=normed, **arguments, observed_attention=query_and_key)
    query, key = query_and_key
    return query, key


def hidden_keys(arguments: Arguments, length: int, device: torch.device) -> torch.Tensor:
    """Which keys a layer's queries do not see, shape (queries, keys), bool.

    Those after the query, and before its sliding window where the layer has one that is shorter
    than the text. `arguments` are the layer's.
    """
    mask = arguments.get("attention_mask")
    if mask is None:
        return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
    return ~mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] < 0


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """Concatenated outputs of causal attention, (batch, sequence_length, heads × value dims).

    Each of query, key and value is (batch, heads, sequence_length, dims), key and value with a head
    for each group of queries. Dims of values may be other than those of queries and keys.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (heads.repeat_interleave(groups, dim=1) for heads in (key, value))
    heads = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    return heads.transpose(1, 2).flatten(2)


# --- all windows -----------------------------------------------------------------------------
class Stream:
    """Hidden states of all windows, shape (windows, sequence_length, hidden_size).

    They stand before the first layer and are moved on, module by module and in place, by
    `advance`. They are on the device of the layer that was entered last; see `enter`. The model is
    only read.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, windows: Windows) -> None:
        ids = windows.ids.to(model.device)
        self.layers = layers_of(model)
        self._windows_a_batch = windows_a_batch(windows.sequence_length)
        first, self.arguments = before_layers(model, ids[:1])
        self.hidden = first.new_empty(len(ids), *first.shape[1:])
        """The residual stream, before layer 0 at first."""
        for hidden, batch in zip(self.batches(), ids.split(self._windows_a_batch), strict=True):
            hidden.copy_(before_layers(model, batch)[0])

    def fork(self) -> "Stream":
        """Another stream that stands where this one does and moves on its own."""
        other = copy.copy(self)
        other.hidden = self.hidden.clone()
        return other

    @contextmanager
    def enter(self, layer_index: int) -> Iterator[tuple[nn.Module, Arguments]]:
        """A borrowed layer and what it is called with, the hidden states handed on to its device.

        Blocks may be nested, as those of `borrow`.
        """
        with self.layers.borrow(layer_index) as layer:
            device = device_of(layer)
            self.hidden = self.hidden.to(device)
            yield layer, placed(self.arguments[layer_index], device)

    def batches(self) -> Iterator[torch.Tensor]:
        """The hidden states as they stand, a few windows at a time: views of `hidden`."""
        yield from self.hidden.split(self._windows_a_batch)

    @torch.no_grad()
    def advance(
        self, layer_index: int, module: str, change: Change = unchanged
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """Passes every window through one module of a layer, a batch at a time.

        Gives (transitional, residual, slopes) of each batch: the module's waist, after `change`,
        from which the module writes; the residual stream after the module, a view that the next
        module will overwrite; and what `slopes` says of the tokens. The stream has moved on once
        all batches are taken; a layer's modules come in the order of the model, "mha" first.

        Raises:
            TransActError: a transitional activation is NaN or infinite; once all batches are taken.
        """
        with self.enter(layer_index) as (layer, arguments):
            seen = Finite(layer_index, module)
            for hidden in self.batches():
                written, transitional = run_module(layer, module, hidden, arguments, change)
                seen.add(transitional)
                hidden += added(layer, module, written)
                yield transitional, hidden, slopes(layer, module, written)
            seen.require()

    def pass_layer(self, layer_index: int, changes: Changes = MappingProxyType({})) -> None:
        """Passes every window through a layer, with those of the `changes` that are in it.

        Raises:
            TransActError: a transitional activation is NaN or infinite.
        """
        with self.enter(layer_index):
            if change := changes.get(("residual", layer_index)):
                self.hidden = change(self.hidden)
            for module in MODULES:
                change = changes.get((module, layer_index), unchanged)
                for _ in self.advance(layer_index, module, change):
                    pass
