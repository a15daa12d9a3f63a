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
tokens of enormous norm would otherwise decide alone. Where a norm stands behind the module, errors
count as it passes them on to first order: W is multiplied by its gains, and a token's row is
divided by the root mean square of what the module writes too.

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
from transact_core.forward.stream import Stream, output_weight
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
    # Heads have few scores, which are told as numbers; of channels only the order counts.
    dtype = torch.float64 if module == "mha" else torch.float32
    # The second moments are passed on without a name, so that they can be freed when inverted.
    try:
        scale, inverse = damped_inverse(second_moments(weighted, projection.in_features), dtype)
    except torch.linalg.LinAlgError:
        raise TransActError(
            f"The second moments of the {module} of layer {layer_index} cannot be inverted: the "
            "residual stream there is NaN or infinite; compute in float32, and if it stays "
            "so the weights are damaged."
        ) from None
    found = {}
    written_by = output_weight(layer, module)
    columns = written_by.to(scale.device, torch.float32) * scale.float()
    if module == "mha":
        attention = layer.self_attn
        found["heads"] = head_energies(
            inverse,
            in_float64(written_by).to(scale.device) * scale,
            attention.head_dim,
            attention.num_key_value_groups,
        )
    order, _ = eliminate_channels(inverse.float(), columns)
    return {**found, "head_channels" if module == "mha" else "channels": _positions(order)}


def weighted_rows(
    stream: Stream, layer_index: int, module: str, eps: float
) -> Iterator[torch.Tensor]:
    """Rows of X a batch at a time, each over the root mean square of the stream it is added to.

    Shape (tokens, width), float32; moves the stream past the module. `eps` is the RMSNorm's.
    """
    for transitional, residual, slopes in stream.advance(layer_index, module):
        factor = inverse_rms(residual, eps)
        if slopes is not None:
            factor *= slopes
        yield (transitional.float() * factor).flatten(0, -2)


def damped_inverse(
    gram: torch.Tensor, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of the damped second moments, in units in which every channel has energy 1.

    With D the diagonal of H = gram + damping, gives `scale = √D`, shape (width,), and
    `(D^-½ H D^-½)⁻¹`, shape (width, width), both in `dtype`; columns of W are to be multiplied by
    `scale`, and then every formula above holds, costs included. These units keep the inverse's
    entries near 1 and its rounding errors far below the damping, so that float32 suffices for
    single channels. In float32 the memory of `gram` is overwritten; in float64 the results are
    where `in_float64` puts them.

    Raises:
        LinAlgError: the damped second moments are not positive definite.
    """
    damped = in_float64(gram) if dtype == torch.float64 else gram.float()
    del gram
    energy = damped.diagonal().clone()
    damping = RIDGE * energy + FLOOR * (energy.mean() if energy.any() else 1.0)
    damped.diagonal().add_(damping)
    scale = (energy + damping).sqrt()
    damped.div_(scale).div_(scale[:, None])
    factor = factored_in_place(damped)
    # LAPACK's order is column-major, where the lower factor is an upper one.
    return scale, torch.cholesky_inverse(factor.mT, upper=True, out=factor.mT)


# --- channels --------------------------------------------------------------------------------


def eliminate_channels(inverse: torch.Tensor, columns: torch.Tensor) -> Removal:
    """Backward elimination of single channels.

    Takes P, shape (width, width), and W, shape (hidden_size, width), in the units of
    `damped_inverse`. Between two updates of all of P and W, at most `BLOCK_SHARE` of the remaining
    channels are removed, one by one and with exact costs, chosen among the twice as many that were
    cheapest when the block began: of two redundant channels, both cheap, only one is removed.
    Updates are in float32, and overwrite a P that is in float32.
    """
    inverse, columns = inverse.float(), columns.float().T.contiguous()
    names = torch.arange(len(inverse))
    order, costs = [], []
    while len(names):
        taken, paid = _cheapest(inverse, columns, max(1, int(len(names) * BLOCK_SHARE)))
        order.append(names[taken])
        costs.append(paid)
        rows = inverse[taken]
        factor = torch.linalg.cholesky(rows[:, taken])
        half = torch.linalg.solve_triangular(factor, rows, upper=False)
        written = torch.linalg.solve_triangular(factor, columns[taken], upper=False)
        columns.addmm_(half.T, written, alpha=-1)
        inverse.addmm_(half.T, half, alpha=-1)
        into, out_of = _moves(taken, len(names))
        inverse = _closed(inverse, into, out_of, len(taken))
        columns[into] = columns[out_of]
        names[into] = names[out_of]
        columns, names = columns[: -len(taken)], names[: -len(taken)]
    return torch.cat(order), torch.cat(costs)


def _cheapest(inverse: torch.Tensor, columns: torch.Tensor, count: int) -> Removal:
    """The next `count` channels to remove, in their order, and their costs."""
    tiny = torch.finfo(inverse.dtype).tiny
    energies = torch.linalg.vector_norm(columns, dim=1).square()
    cost = energies / inverse.diagonal().clamp_min(tiny)
    ranked = cost.argsort(stable=True)
    if count == 1:
        return ranked[:1].cpu(), cost[ranked[:1]].cpu().double()
    candidates = ranked[: 2 * count]
    p = inverse[candidates[:, None], candidates].cpu().double()
    w = columns[candidates]
    # The costs depend on W only through the inner products of its columns.
    products = (w @ w.T).cpu().double()
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
    return candidates[torch.tensor(taken, device=candidates.device)].cpu(), torch.stack(paid)


def _moves(gone: torch.Tensor, alive: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where in the first places holes are left, and the places at the end that fill them."""
    left = alive - len(gone)
    stays = torch.ones(alive, dtype=torch.bool)
    stays[gone] = False
    return (~stays[:left]).nonzero().flatten(), left + stays[left:].nonzero().flatten()


def _closed(
    symmetric: torch.Tensor, into: torch.Tensor, out_of: torch.Tensor, removed: int
) -> torch.Tensor:
    """A view of the matrix without what was removed, its last rows and columns moved into the
    holes: that moves little, where gathering all that is left would copy it."""
    symmetric[into] = symmetric[out_of]
    symmetric[:, into] = symmetric[:, out_of]
    return symmetric[:-removed, :-removed]


# --- heads -----------------------------------------------------------------------------------


def head_energies(
    inverse: torch.Tensor, columns: torch.Tensor, head_dim: int, queries_per_group: int
) -> torch.Tensor:
    """Score of each head, shape (heads,), float64 on the CPU: the error that its removal added.

    Scores are raised where needed so that along the order of removal they rise strictly. Under
    grouped queries, heads are ranked by an elimination that takes one head of each group in turn,
    since single heads can only be removed that way, and then scaled so that the mean over a group
    is the group's own score in an elimination of whole groups.
    """
    products = columns.T @ columns
    heads = _rising(*eliminate_heads(inverse, products, head_dim, queries_per_group))
    if queries_per_group == 1:
        return heads
    groups = _rising(*eliminate_heads(inverse, products, head_dim * queries_per_group))
    members = heads.unflatten(0, (-1, queries_per_group))
    means = members.mean(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    return (members * (groups / means)[:, None]).flatten()


def eliminate_heads(
    inverse: torch.Tensor, products: torch.Tensor, head_dim: int, queries_per_group: int = 1
) -> Removal:
    """Backward elimination of whole heads, in the dtype of what is given.

    Takes P, shape (width, width), and the Gram matrix Q = WᵀW of the same shape, in the units of
    `damped_inverse`, and leaves both as they are; a head is `head_dim` neighbouring channels and a
    group `queries_per_group` neighbouring heads. Without groups, heads are removed one at a time.
    With them they are removed in rounds, one head of each group: a round is filled greedily with
    the cheapest head, then heads are exchanged for others of their groups for as long as the round
    as a whole gets cheaper.

    W enters the costs only by Q, which is updated as P is: with G = (P_JJ)⁻¹ P_J and
    B = Q_J − ½ Q_JJ G, `Q ← Q − Bᵀ G − Gᵀ B`.
    """
    left = _Heads(inverse, products, head_dim)
    names = list(range(len(inverse) // head_dim))
    order, costs = [], []
    while names:
        groups = [head // queries_per_group for head in names] if queries_per_group > 1 else None
        leaving = _round(left, len(names), groups)
        order += [names[place] for place in leaving]
        costs.append(left.costs_in_turn(leaving))
        staying = [place for place in range(len(names)) if place not in leaving]
        left = left.without(leaving, staying)
        names = [names[place] for place in staying]
    return torch.tensor(order), torch.cat(costs).double().cpu()


class _Heads:
    """P and Q of the heads that are left, by their places among them."""

    def __init__(self, inverse: torch.Tensor, products: torch.Tensor, head_dim: int) -> None:
        self.inverse, self.products, self.head_dim = inverse, products, head_dim

    def costs(self, leaving: list[int], among: list[int]) -> torch.Tensor:
        """What the removal of each one among these adds once those that leave are gone."""
        own, others = self._rows(among), self._rows(leaving)
        shape = (len(among), self.head_dim)
        p = torch.stack([_part(self.inverse, rows, rows) for rows in own.split(self.head_dim)])
        q = torch.stack([_part(self.products, rows, rows) for rows in own.split(self.head_dim)])
        if leaving:
            half, gain, cross = (
                each.unflatten(1, shape).transpose(0, 1) for each in self._steps(others, own)
            )
            p = p - half.mT @ half
            mixed = cross.mT @ gain
            q = q - mixed - mixed.mT
        solved = torch.cholesky_solve(q, torch.linalg.cholesky(p))
        return solved.diagonal(dim1=1, dim2=2).sum(dim=1)

    def costs_in_turn(self, leaving: list[int]) -> torch.Tensor:
        """What the removal of each head adds, one after the other."""
        rows = self._rows(leaving)
        factor = torch.linalg.cholesky(_part(self.inverse, rows, rows))
        half = torch.linalg.solve_triangular(factor, _part(self.products, rows, rows), upper=False)
        whitened = torch.linalg.solve_triangular(factor, half.mT, upper=False)
        return whitened.diagonal().unflatten(0, (len(leaving), -1)).sum(dim=1)

    def without(self, leaving: list[int], staying: list[int]) -> "_Heads":
        """P and Q of those that stay, once those that leave are gone."""
        own = self._rows(staying)
        half, gain, cross = self._steps(self._rows(leaving), own)
        mixed = cross.T @ gain
        return _Heads(
            _part(self.inverse, own, own).addmm_(half.T, half, alpha=-1),
            _part(self.products, own, own).sub_(mixed).sub_(mixed.T),
            self.head_dim,
        )

    def _steps(self, gone: torch.Tensor, own: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the removal of some channels changes at others: with L the Cholesky factor of P_JJ,
        `L⁻¹ P_J`, G and B, each of shape (channels gone, own)."""
        factor = torch.linalg.cholesky(_part(self.inverse, gone, gone))
        half = torch.linalg.solve_triangular(factor, _part(self.inverse, gone, own), upper=False)
        gain = torch.linalg.solve_triangular(factor.mT, half, upper=True)
        cross = _part(self.products, gone, own)
        cross.addmm_(_part(self.products, gone, gone), gain, alpha=-0.5)
        return half, gain, cross

    def _rows(self, heads: list[int]) -> torch.Tensor:
        if not heads:
            return torch.empty(0, dtype=torch.int64)
        return head_rows(heads, self.head_dim).to(self.inverse.device)


def _part(matrix: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """A copy of the matrix at these rows and columns."""
    return matrix[rows[:, None], columns]


def _round(left: _Heads, count: int, groups: list[int] | None) -> list[int]:
    """The heads to remove next, by their places among the `count` that are left."""
    places = list(range(count))

    def cheapest(leaving: list[int], among: list[int]) -> tuple[int, float]:
        cost, best = left.costs(leaving, among).min(dim=0)
        return among[int(best)], cost.item()

    first, total = cheapest([], places)
    leaving = [first]
    if groups is None:
        return leaving
    while waiting := set(groups) - {groups[place] for place in leaving}:
        among = [place for place in places if groups[place] in waiting]
        place, cost = cheapest(leaving, among)
        leaving.append(place)
        total += cost
    improved = True
    while improved:
        improved = False
        for turn, place in enumerate(leaving):
            others = leaving[:turn] + leaving[turn + 1 :]
            among = [other for other in places if groups[other] == groups[place]]
            costs = left.costs(others, among)
            best = int(costs.argmin())
            saved = (costs[among.index(place)] - costs[best]).item()
            if saved > 1e-9 * total:
                leaving[turn], total, improved = among[best], total - saved, True
    return leaving


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
