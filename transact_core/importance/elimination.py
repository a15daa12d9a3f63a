"""Backward elimination (optimal brain surgeon) of channels and heads with a refitted projection.

From the whole module, remove the channel (or head) whose removal adds the least squared error once
the output projection has been refitted to compensate, refit, and go on until nothing is left. The
kept sets are nested, so one elimination serves every width. This is the optimal brain surgeon's
criterion on the layer-wise problem of the output projection.

With X the transitional activations (one row for each token), W the output projection's weight and
H = XᵀX + damping, the error of replacing W by W' is `tr((W − W') H (W − W')ᵀ)`. With P = H⁻¹ over
the remaining channels, the least error that removing a set J adds, and the updates that follow, are

    cost(J) = tr(W_J (P_JJ)⁻¹ W_Jᵀ),   W ← W − W_J (P_JJ)⁻¹ P_J,   P ← P − P_Jᵀ (P_JJ)⁻¹ P_J.

A token's row is divided by the root mean square of the residual stream after the module, as the
next RMSNorm divides the stream: an error matters relative to the stream it is added to, and a few
tokens of enormous norm would otherwise decide alone.

Sources: Hassibi & Stork 1993, Second order derivatives for network pruning: optimal brain surgeon;
Frantar & Alistarh 2022, Optimal brain compression (arXiv 2208.11580); Kurtic, Frantar & Alistarh
2023, ZipLM (arXiv 2302.04089), structured removal.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from transformers import LlamaForCausalLM

from transact_core.base.errors import Progress, TransActError, silent
from transact_core.base.linalg import factored_in_place, in_float64, inverse_rms, second_moments
from transact_core.data.windows import Windows
from transact_core.forward.stream import Stream
from transact_core.forward.waists import MODULES, head_rows, output_projections

RIDGE = 1e-2
"""Damping of each channel, as a share of its own energy."""
FLOOR = 1e-5
"""Damping of each channel, as a share of the mean energy, so that a dead channel has some."""
BLOCK_SHARE = 1 / 64
"""At most this share of the remaining channels is removed between two updates of P and W."""

Removal = tuple[torch.Tensor, torch.Tensor]
"""Units in the order of their removal (int64), and the error that each removal added (float64),
both on the CPU."""


@torch.no_grad()
def eliminate(
    model: LlamaForCausalLM, windows: Windows, progress: Progress = silent
) -> dict[str, torch.Tensor]:
    """Eliminates every layer's heads, attention channels and MLP channels.

    Gives float64 tensors on the CPU, larger for units that are removed later: `heads`, shape
    (layers, num_attention_heads), by `head_energies`; `head_channels`, (layers,
    num_attention_heads × head_dim), and `channels`, (layers, intermediate_size), are positions in
    the order of removal, from 0.

    Costs one pass without the LM head, the second moments, and two factorisations for each layer.
    Memory beside the hidden states of all windows is one module's: about one matrix in float64 and
    one in float32 of the width of its waist.

    Raises:
        TransActError: a transitional activation is NaN or infinite.
    """
    rows: dict[str, list[torch.Tensor]] = {"heads": [], "head_channels": [], "channels": []}
    stream = Stream(model, windows)
    layers = len(stream.layers)
    for layer_index in range(layers):
        progress("Eliminating channels", layer_index, layers)
        with stream.layers.borrow(layer_index) as layer:
            for module in MODULES:
                weighted = weighted_rows(stream, layer_index, module, model.config.rms_norm_eps)
                found = eliminate_module(layer, layer_index, module, weighted)
                for name, scores in found.items():
                    rows[name].append(scores)
    progress("Eliminating channels", layers, layers)
    return {name: torch.stack(scores) for name, scores in rows.items()}


def eliminate_module(
    layer: nn.Module, layer_index: int, module: str, weighted: Iterable[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Eliminates the units of one module: `heads` and `head_channels`, or `channels`, as above.

    `layer` is the decoder layer. `weighted` gives the rows of X, each times its token's weight, as
    matrices of shape (tokens, width of the waist) one after the other.

    Raises:
        TransActError: the second moments are NaN or infinite.
    """
    projection = output_projections(layer)[module]
    # The second moments are passed on without a name, so that they can be freed when inverted.
    try:
        scale, inverse = damped_inverse(second_moments(weighted, projection.in_features))
    except torch.linalg.LinAlgError:
        raise TransActError(
            f"The second moments of the {module} of layer {layer_index} cannot be inverted: the "
            "residual stream there is NaN or infinite; compute in float32, and if it stays "
            "so the weights are damaged."
        ) from None

    def columns() -> torch.Tensor:
        return in_float64(projection.weight).to(scale.device) * scale

    found = {}
    if module == "mha":
        attention = layer.self_attn
        found["heads"] = head_energies(
            inverse, columns(), attention.head_dim, attention.num_key_value_groups
        )
    # Converted before the columns are made, so that only one matrix at a time is in float64.
    inverse = inverse.float()
    order, _ = eliminate_channels(inverse, columns().float())
    return {**found, "head_channels" if module == "mha" else "channels": _positions(order)}


def weighted_rows(
    stream: Stream, layer_index: int, module: str, eps: float
) -> Iterator[torch.Tensor]:
    """Rows of X a batch at a time, each over the root mean square of the stream it is added to.

    Shape (tokens, width), float32; moves the stream past the module. `eps` is the RMSNorm's.
    """
    for transitional, residual in stream.advance(layer_index, module):
        yield (transitional.float() * inverse_rms(residual, eps)).flatten(0, -2)


def damped_inverse(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of the damped second moments, in units in which every channel has energy 1.

    With D the diagonal of H = gram + damping, gives `scale = √D`, shape (width,), and
    `(D^-½ H D^-½)⁻¹`, shape (width, width), both float64 and where `in_float64` puts them; columns
    of W are to be multiplied by `scale`, and then every formula above holds, costs included. These
    units keep the inverse's entries near 1, so that float32 suffices afterwards.

    Raises:
        LinAlgError: the damped second moments are not positive definite.
    """
    damped = in_float64(gram)
    del gram
    energy = damped.diagonal().clone()
    damping = RIDGE * energy + FLOOR * (energy.mean() if energy.any() else 1.0)
    damped.diagonal().add_(damping)
    scale = (energy + damping).sqrt()
    damped.div_(scale).div_(scale[:, None])
    factor = factored_in_place(damped)
    return scale, torch.cholesky_inverse(factor, out=factor)


def eliminate_channels(inverse: torch.Tensor, columns: torch.Tensor) -> Removal:
    """Backward elimination of single channels.

    Takes P, shape (width, width), and W, shape (hidden_size, width), in the units of
    `damped_inverse`. Between two updates of all of P and W, at most `BLOCK_SHARE` of the remaining
    channels are removed, one by one and with exact costs, chosen among the twice as many that were
    cheapest when the block began: of two redundant channels, both cheap, only one is removed.
    Updates are in float32, and overwrite arguments that are in float32.
    """
    inverse, columns = inverse.float(), columns.float()
    names = torch.arange(len(inverse))
    gone = torch.zeros(len(inverse), dtype=torch.bool, device=inverse.device)
    order, costs = [], []
    alive = len(inverse)
    while alive:
        taken, paid = _cheapest(inverse, columns, gone, max(1, int(alive * BLOCK_SHARE)))
        order.append(names[taken.cpu()])
        costs.append(paid)
        alive -= len(taken)
        gain = _solve(inverse[taken][:, taken], inverse[taken])
        columns.addmm_(columns[:, taken], gain, alpha=-1)
        inverse.addmm_(inverse[:, taken], gain, alpha=-1)
        gone[taken] = True
        # Removed channels stay in place for a while: compaction costs as much as an update.
        if alive and len(gone) - alive >= len(gone) / 8:
            kept = (~gone).nonzero().flatten()
            inverse, columns = inverse[kept[:, None], kept], columns[:, kept]
            names, gone = names[kept.cpu()], gone[kept]
    return torch.cat(order), torch.cat(costs)


def _cheapest(
    inverse: torch.Tensor, columns: torch.Tensor, gone: torch.Tensor, count: int
) -> Removal:
    """The next `count` channels to remove, in their order, and their costs."""
    tiny = torch.finfo(inverse.dtype).tiny
    cost = columns.square().sum(dim=0) / inverse.diagonal().clamp_min(tiny)
    ranked = cost.masked_fill(gone, math.inf).argsort(stable=True)
    if count == 1:
        return ranked[:1], cost[ranked[:1]].double().cpu()
    candidates = ranked[: 2 * count]
    p = inverse[candidates][:, candidates].cpu().double()
    w = columns[:, candidates].cpu().double()
    # The costs depend on W only through the inner products of its columns.
    products = w.T @ w
    closed = torch.zeros(len(candidates), dtype=torch.float64)
    taken, paid = [], []
    for _ in range(count):
        cost = products.diagonal() / p.diagonal().clamp_min(tiny) + closed
        best = int(cost.argmin())
        taken.append(best)
        paid.append(cost[best].clamp_min(0))
        closed[best] = math.inf
        step = p[best] / p[best, best]
        half = products[best] - products[best, best] / 2 * step
        products.addr_(half, step, alpha=-1).addr_(step, half, alpha=-1)
        p.addr_(p[:, best].clone(), step, alpha=-1)
    return candidates[torch.tensor(taken, device=candidates.device)], torch.stack(paid)


def head_energies(
    inverse: torch.Tensor, columns: torch.Tensor, head_dim: int, queries_per_group: int
) -> torch.Tensor:
    """Score of each head, shape (heads,), float64 on the CPU: the error that its removal added.

    Scores are raised where needed so that along the order of removal they rise strictly. Under
    grouped queries, heads are ranked by an elimination that takes one head of each group in turn,
    since single heads can only be removed that way, and then scaled so that the mean over a group
    is the group's own score in an elimination of whole groups.
    """
    heads = _rising(*eliminate_heads(inverse, columns, head_dim, queries_per_group))
    if queries_per_group == 1:
        return heads
    groups = _rising(*eliminate_heads(inverse, columns, head_dim * queries_per_group))
    members = heads.unflatten(0, (-1, queries_per_group))
    means = members.mean(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    return (members * (groups / means)[:, None]).flatten()


def eliminate_heads(
    inverse: torch.Tensor, columns: torch.Tensor, head_dim: int, queries_per_group: int = 1
) -> Removal:
    """Backward elimination of whole heads, in the dtype of what is given.

    Takes P and W as `eliminate_channels` does; a head is `head_dim` neighbouring channels and a
    group `queries_per_group` neighbouring heads. Without groups, heads are removed one at a time.
    With them they are removed in rounds, one head of each group: a round is filled greedily with
    the cheapest head, then heads are exchanged for others of their groups for as long as the round
    as a whole gets cheaper.
    """
    names = list(range(len(inverse) // head_dim))
    order, costs = [], []
    while names:
        groups = [head // queries_per_group for head in names] if queries_per_group > 1 else None
        leaving = _round(inverse, columns, head_dim, groups)
        for place, cost in leaving:
            order.append(names[place])
            costs.append(cost)
        gone = sorted(place for place, _ in leaving)
        inverse, columns = _without(inverse, columns, head_rows(gone, head_dim))
        for place in reversed(gone):
            del names[place]
    return torch.tensor(order), torch.tensor(costs, dtype=torch.float64)


def _round(
    inverse: torch.Tensor, columns: torch.Tensor, head_dim: int, groups: list[int] | None
) -> list[tuple[int, float]]:
    """The heads to remove next, by their positions among the rest, and the cost of each in turn."""
    places = list(range(len(inverse) // head_dim))

    def together(leaving: list[int]) -> float:
        rows = head_rows(leaving, head_dim)
        written = columns[:, rows]
        return (written * _solve(inverse[rows][:, rows], written.T).T).sum().item()

    def cheapest(leaving: list[int], among: list[int]) -> int:
        return min(among, key=lambda place: together([*leaving, place]))

    leaving = [cheapest([], places)]
    if groups is not None:
        while waiting := set(groups) - {groups[place] for place in leaving}:
            among = [place for place in places if groups[place] in waiting]
            leaving.append(cheapest(leaving, among))
        least, improved = together(leaving), True
        while improved:
            improved = False
            for turn, place in enumerate(leaving):
                others = leaving[:turn] + leaving[turn + 1 :]
                group = [other for other in places if groups[other] == groups[place]]
                best = cheapest(others, group)
                cost = together([*others, best])
                if cost < least * (1 - 1e-9):
                    leaving[turn], least, improved = best, cost, True
    totals = [0.0, *(together(leaving[: count + 1]) for count in range(len(leaving)))]
    return [
        (place, after - before)
        for place, before, after in zip(leaving, totals[:-1], totals[1:], strict=True)
    ]


def _without(
    inverse: torch.Tensor, columns: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """P and W of the channels that stay when these rows are removed."""
    kept = torch.ones(len(inverse), dtype=torch.bool)
    kept[rows] = False
    kept = kept.nonzero().flatten()
    gain = _solve(inverse[rows][:, rows], inverse[rows][:, kept])
    return inverse[kept][:, kept] - inverse[kept][:, rows] @ gain, (
        columns[:, kept] - columns[:, rows] @ gain
    )


def _solve(positive: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Solves positive definite systems by Cholesky: the batched LU of some builds of torch fails on
    many large heads."""
    return torch.cholesky_solve(right, torch.linalg.cholesky(positive))


def _positions(order: torch.Tensor) -> torch.Tensor:
    """The position of each unit in the order, float64."""
    positions = torch.empty(len(order), dtype=torch.float64)
    positions[order] = torch.arange(len(order), dtype=torch.float64)
    return positions


def _rising(order: torch.Tensor, costs: torch.Tensor) -> torch.Tensor:
    """Costs by unit, each raised above all that were removed before it."""
    scores = torch.empty_like(costs)
    last = -math.inf
    for unit, cost in zip(order.tolist(), costs.tolist(), strict=True):
        last = max(cost, math.nextafter(last, math.inf))
        scores[unit] = last
    return scores
