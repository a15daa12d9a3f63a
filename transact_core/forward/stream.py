"""The residual stream of all calibration windows, run layer by layer instead of window by window.

What is measured here needs more room for one layer than a whole layer's weights take, so only one
layer is looked at at a time: the hidden states of every window wait before it, pass through one of
its modules, and wait again. Memory is those hidden states and what the caller keeps of one module.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from transact_core.data.windows import Windows
from transact_core.forward.waists import MODULES, require_finite, windows_a_batch

Rotary = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of the rotary embedding, each of shape (1, sequence_length, head_dim)."""
Change = Callable[[torch.Tensor], torch.Tensor]
"""From an activation to another of the same shape; leaves what it is given as it was."""
Changes = Mapping[tuple[str, int], Change]
"""What is done to the activation at (site, layer), a site being one of `activations.SITES`."""


def unchanged(activation: torch.Tensor) -> torch.Tensor:
    """The change that is none."""
    return activation


def run_attention(
    layer: nn.Module, hidden: torch.Tensor, rotary: Rotary, change: Change = unchanged
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the attention of a decoder layer writes to the residual stream, and its waist.

    `hidden` is the residual stream before the layer, shape (batch, sequence_length, hidden_size);
    every window attends causally to itself. Gives (output, transitional): the output without the
    residual, shaped like `hidden`, and the input of `o_proj`, shape (batch, sequence_length,
    num_attention_heads × head_dim), after `change`.
    """
    attention = layer.self_attn
    query, key, value = queries_keys_values(attention, layer.input_layernorm(hidden))
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    transitional = change(attend(query, key, value, attention.scaling))
    return attention.o_proj(transitional), transitional


def queries_keys_values(attention: nn.Module, normed: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values before rotation, each (batch, heads, sequence_length, head_dim)."""
    return tuple(
        projection(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """Concatenated outputs of causal attention, (batch, sequence_length, heads × value dims).

    Each of query, key and value is (batch, heads, sequence_length, dims), key and value with a head
    for each group of queries.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    heads = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    return heads.transpose(1, 2).flatten(2)


def run_mlp(
    layer: nn.Module, hidden: torch.Tensor, change: Change = unchanged
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the MLP of a decoder layer writes to the residual stream, and its waist.

    `hidden` is the residual stream after the layer's attention, shape (batch, sequence_length,
    hidden_size). Gives (output, transitional): the output without the residual, shaped like
    `hidden`, and the input of `down_proj`, shape (batch, sequence_length, intermediate_size), after
    `change`.
    """
    mlp = layer.mlp
    normed = layer.post_attention_layernorm(hidden)
    transitional = change(mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed))
    return mlp.down_proj(transitional), transitional


def run_module(
    layer: nn.Module, module: str, hidden: torch.Tensor, rotary: Rotary, change: Change = unchanged
) -> tuple[torch.Tensor, torch.Tensor]:
    """`run_attention` where `module` is "mha", `run_mlp` where it is "mlp"."""
    if module == "mha":
        return run_attention(layer, hidden, rotary, change)
    return run_mlp(layer, hidden, change)


class Stream:
    """Hidden states of all windows, shape (windows, sequence_length, hidden_size).

    They stand before the first layer and are moved on, module by module and in place, by
    `advance`. The model is only read.
    """

    @torch.no_grad()
    def __init__(self, model: LlamaForCausalLM, windows: Windows) -> None:
        ids = windows.ids.to(model.device)
        self.layers = model.model.layers
        self.hidden = model.model.embed_tokens(ids)
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        self.rotary: Rotary = model.model.rotary_emb(self.hidden, positions)
        self._windows_a_batch = windows_a_batch(windows.sequence_length)

    def fork(self) -> "Stream":
        """A stream of its own that stands where this one does."""
        other = copy.copy(self)
        other.hidden = self.hidden.clone()
        return other

    def batches(self) -> Iterator[torch.Tensor]:
        """The hidden states as they stand, a few windows at a time."""
        yield from self.hidden.split(self._windows_a_batch)

    @torch.no_grad()
    def advance(
        self, number: int, module: str, change: Change = unchanged
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Passes every window through one module of layer `number`, a batch at a time.

        Gives (transitional, residual) of each batch: the module's waist, after `change`, from which
        the module writes, and the residual stream after the module, a view that the next module
        will overwrite. The stream has moved on once all batches are taken; the layers' modules come
        in the order of the model, "mha" first.

        Raises:
            TransActError: a transitional activation is NaN or infinite.
        """
        layer = self.layers[number]
        for hidden in self.batches():
            output, transitional = run_module(layer, module, hidden, self.rotary, change)
            require_finite(transitional, number, module)
            hidden += output
            yield transitional, hidden

    def pass_layer(self, number: int, changes: Changes = MappingProxyType({})) -> None:
        """Passes every window through layer `number`, with what is changed in it.

        Raises:
            TransActError: a transitional activation is NaN or infinite.
        """
        if change := changes.get(("residual", number)):
            self.hidden = change(self.hidden)
        for module in MODULES:
            for _ in self.advance(number, module, changes.get((module, number), unchanged)):
                pass
