"""Rotary pairs of the attention heads: the effect of each, and the frequencies narrow heads keep.

Dims *i* and *i + head_dim / 2* of queries and keys are rotated together by one frequency, so they
can only be removed together. A stock model has one set of frequencies for all its heads, so a
narrower one offers *slots* of frequencies that all heads share, and each key-value head assigns
pairs of its own to them. A pair keeps part of its effect in a slot of another frequency: pairs of
low frequency hardly rotate within a context and can replace each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from transact_core.base.errors import Progress, silent
from transact_core.base.linalg import in_float64
from transact_core.data.windows import Windows
from transact_core.forward.layers import Arguments
from transact_core.forward.stream import Stream, queries_and_keys

QUERY_STRIDE = 16
"""Attention is sampled at every 16th query."""
DISTANCES = 512
"""Distances in tokens, from 0, over which two frequencies are compared."""


@dataclass(frozen=True)
class PairEffects:
    """The effects of the rotary pairs on the attention.

    `effects` has shape (layers, num_key_value_heads, head_dim / 2), float64 on the CPU. `dropped`
    has shape (head_dim / 2,): indices of frequencies in the order in which their slots are dropped,
    so the last *n* are the slots of a head that keeps *n* pairs.
    """

    effects: torch.Tensor
    dropped: torch.Tensor
    inv_freq: torch.Tensor
    """Radians for each token, shape (head_dim / 2,), float64, descending."""

    def to_tensors(self) -> dict[str, torch.Tensor]:
        return {"effects": self.effects, "dropped": self.dropped, "inv_freq": self.inv_freq}

    def slots(self, count: int) -> tuple[int, ...]:
        """The pairs whose frequencies all heads share when they keep `count` pairs, ascending."""
        return tuple(sorted(self.dropped[-count:].tolist()))

    def assign(self, slots: Sequence[int]) -> torch.Tensor:
        """The pair that each key-value head puts into each slot: (layers, groups, slots), int64.

        Pairs keep their order, no pair is used twice, and the sum of effects, each times the
        similarity of its slot's frequency to its own, is the largest possible.
        """
        similarity = frequency_similarity(self.inv_freq)[:, list(slots)]
        _, chosen = _assignment(_shares(self.effects).flatten(0, 1), similarity)
        return chosen.unflatten(0, self.effects.shape[:2])


@torch.no_grad()
def measure_pairs(
    model: PreTrainedModel, windows: Windows, progress: Progress = silent
) -> PairEffects:
    """Measures each pair's effect on the attention distribution.

    The effect of pair p is the variance of its part of the logit, `q_p · k_p` after rotation, over
    keys under the attention weights, summed over the sampled queries: twice the Kullback-Leibler
    divergence of the softmax, to second order, when the pair is removed. It is summed over the
    query heads of a group.
    """
    stream = Stream(model, windows)
    layers = len(stream.layers)
    rows = []
    for layer_index in range(layers):
        progress("Measuring rotary pairs", layer_index, layers)
        with stream.enter(layer_index) as (layer, arguments):
            rows.append(_effects_of_layer(layer, stream, arguments))
            stream.pass_layer(layer_index)
    progress("Measuring rotary pairs", layers, layers)
    effects = torch.stack(rows)
    inv_freq = model.model.rotary_emb.inv_freq.cpu().double()
    return PairEffects(effects, drop_order(effects, inv_freq), inv_freq)


def _effects_of_layer(layer: nn.Module, stream: Stream, arguments: Arguments) -> torch.Tensor:
    """Effects of the pairs of one layer, shape (num_key_value_heads, head_dim / 2), float64."""
    total: torch.Tensor | int = 0
    for hidden in stream.batches():
        query, key, attention = _sampled_attention(layer, hidden, arguments)
        queries_per_group = query.shape[1] // key.shape[1]
        # The mean key shifts all logits of a query alike; without it less cancels below.
        key = (key - key.mean(dim=2, keepdim=True)).repeat_interleave(queries_per_group, dim=1)
        # A pair's part of the logit is linear in the key's two dims, so its variance needs only
        # their first and second moments under the attention.
        (x, y), (to_x, to_y) = key.chunk(2, dim=-1), query.chunk(2, dim=-1)
        moments = attention @ torch.cat([x, y, x * x, y * y, x * y], dim=-1)
        mean_x, mean_y, xx, yy, xy = moments.chunk(5, dim=-1)
        variance = (
            to_x.square() * (xx - mean_x.square())
            + to_y.square() * (yy - mean_y.square())
            + 2 * to_x * to_y * (xy - mean_x * mean_y)
        )
        by_head = variance.clamp_min(0).sum(dim=(0, 2))
        total = total + in_float64(by_head.unflatten(0, (-1, queries_per_group)).sum(dim=1))
    return total.cpu()


def _sampled_attention(
    layer: nn.Module, hidden: torch.Tensor, arguments: Arguments
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scaled rotated queries of every 16th token, rotated keys, attention weights; float32."""
    query, key = (vectors.float() for vectors in queries_and_keys(layer, hidden, arguments))
    length = hidden.shape[1]
    places = torch.arange(min(QUERY_STRIDE, length) - 1, length, QUERY_STRIDE, device=hidden.device)
    query = query[:, :, places] * layer.self_attn.scaling
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    later = torch.arange(length, device=hidden.device) > places[:, None]
    logits = (query @ keys.mT).masked_fill(later, -torch.inf)
    return query, key, logits.softmax(dim=-1)


# --- which frequencies stay ------------------------------------------------------------------
def frequency_similarity(inv_freq: torch.Tensor, distances: int = DISTANCES) -> torch.Tensor:
    """The share of its effect that a pair keeps in a slot of another frequency.

    It is 1 for the same frequency: one minus the mean of `|exp(iδΔ) − 1|²` over distances Δ
    weighted by 1 / (1 + Δ), δ being the difference of frequency, and at least 0, which is as bad as
    dropping the pair. Shape (pairs, pairs), float64.
    """
    distance = torch.arange(distances, dtype=torch.float64)
    weight = 1 / (1 + distance)
    difference = inv_freq.double()[:, None] - inv_freq.double()[None]
    turned = 2 - 2 * (difference[..., None] * distance).cos()
    return 1 - (turned @ (weight / weight.sum())).clamp_max(1)


def drop_order(effects: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    """Indices of frequencies, greedily ordered: each time the slot goes whose loss costs least."""
    shares, similarity = _shares(effects).flatten(0, 1), frequency_similarity(inv_freq)
    left, order = list(range(len(inv_freq))), []
    while len(left) > 1:
        values = [
            _assignment(shares, similarity[:, [slot for slot in left if slot != dropped]])[0]
            for dropped in left
        ]
        order.append(left.pop(max(range(len(left)), key=values.__getitem__)))
    return torch.tensor(order + left)


def _shares(effects: torch.Tensor) -> torch.Tensor:
    """Each head's effects as shares of their sum, so that all heads count the same."""
    total = effects.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return effects.double() / total


def _assignment(gains: torch.Tensor, similarity: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The best order-keeping assignment of pairs to slots, by dynamic programming.

    `gains` has shape (heads, pairs), `similarity` (pairs, slots). Gives the value of the assignment
    summed over heads, and the pairs assigned, shape (heads, slots).
    """
    heads, pairs = gains.shape
    # best[:, p] is the largest value of the slots so far, filled from the first p pairs.
    best = torch.zeros(heads, pairs + 1, dtype=torch.float64)
    taken = []
    for slot in range(similarity.shape[1]):
        value = best[:, :-1] + gains * similarity[:, slot]
        best, last = value.cummax(dim=1)
        taken.append(last)
        best = torch.cat([torch.full((heads, 1), -torch.inf, dtype=torch.float64), best], dim=1)
    chosen = torch.empty(heads, len(taken), dtype=torch.int64)
    end = torch.full((heads, 1), pairs - 1)
    for slot in reversed(range(len(taken))):
        pair = taken[slot].gather(1, end)
        chosen[:, slot] = pair[:, 0]
        end = (pair - 1).clamp_min(0)
    return best[:, -1].sum().item(), chosen
