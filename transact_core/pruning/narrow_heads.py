"""Queries, keys and values of narrower heads, fitted to what the dense heads did.

The bare cut selects rotary pairs and value dims. Here every head gets projections that are fitted
on the calibration text in closed form:

*Queries and keys.* With A (head_dim' × head_dim) for each query head and B for each key-value
head, the logit `q · R(Δ) k` becomes `A q · R'(Δ) B k`, where R rotates by the dense frequencies and
R' by those of the shared slots. It is linear in A and linear in B, so the two are fitted in turn by
least squares on sampled pairs of a query and keys. Only differences between keys are fitted, since
the softmax is invariant to what all keys share. Keys are sampled from the attention weights, and a
share of them from a flatter distribution, so that the logits of unattended keys are constrained
too.

*Values.* From value to output a head is linear, so its outputs may be expressed in any basis. The
one chosen loses the least of what the output projection writes, and is shared by the heads of a
group. It is the truncated singular value decomposition in the metric of the activations (Wang et
al. 2024, SVD-LLM, arXiv 2403.07378), with one right factor for all heads of the group.

In-sample error is optimistic, and `closed_form` judges repairs on held-out windows. So queries and
keys are fitted three times: on each half of the windows, which the other half then runs through,
and on all of them for the model. The value basis has far fewer parameters and is fitted on all
windows.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, rotate_half

from transact_core.base.linalg import in_float64
from transact_core.forward.stream import Rotary, attend
from transact_core.forward.waists import windows_a_batch
from transact_core.pruning.plan import LayerPlan

ROUNDS = 2
"""Alternations between the query maps and the key map of a group."""
ITERATIONS = 15
"""Most steps of conjugate gradients in each fit."""
RIDGE = 1e-3
"""Ridge towards the bare cut, as a share of the mean curvature."""
KEYS_A_QUERY = 6
"""Keys sampled for each query."""
QUERY_STRIDE = 4
"""Every 4th token's query is sampled; fewer where that would be more than `MAX_QUERIES`."""
MAX_QUERIES = 8192
"""Most queries sampled for a head, which has few weights to fit."""
EVENLY = 0.25
"""Share of keys sampled from the softmax of half the logits, which is flatter."""
CONVERGED = 1e-5
"""The fit stops where the gradient's norm is this share of the first one's: further steps in
float32 would only accumulate rounding errors."""


@torch.no_grad()
def fit_narrow_heads(
    dense: nn.Module,
    pruned: nn.Module,
    plan: LayerPlan,
    normed: torch.Tensor,
    weights: torch.Tensor,
    rotary: tuple[Rotary, Rotary],
    judge_only: bool = False,
) -> torch.Tensor:
    """Replaces the projections of a layer's narrowed attention by fitted ones, in place.

    `dense` and `pruned` are the attentions before and after the bare cut. `normed` is the input of
    both, shape (windows, sequence_length, hidden_size), two windows or more; `weights` are the
    tokens' weights, shape (windows, sequence_length); `rotary` holds the cosines and sines of the
    dense and of the narrow heads. The output projection is only transformed to the new basis:
    `closed_form` fits it afterwards. With `judge_only`, queries and keys are left as fitted on one
    half of the windows.

    Gives the narrow waist for held-out judgement, shape (windows, sequence_length,
    num_attention_heads × head_dim'): each half of the windows through queries and keys that were
    fitted on the other half.

    Raises:
        LinAlgError: the numbers are not finite.
    """
    generator = torch.Generator(device=normed.device).manual_seed(0)
    seen = normed.new_empty(*normed.shape[:2], dense.o_proj.in_features)
    halves, halves_seen = (each.tensor_split(2) for each in (normed, seen))
    for fitted_on, judged, values in zip(halves, halves[::-1], halves_seen[::-1], strict=True):
        _fit_queries_and_keys(dense, pruned, plan, fitted_on, rotary, generator)
        at_once = windows_a_batch(normed.shape[1])
        for batch, into in zip(judged.split(at_once), values.split(at_once), strict=True):
            into.copy_(_dense_values(dense, pruned, batch, rotary[1]))
    waist = _fit_values(dense, pruned, seen, weights)
    if not judge_only:
        _fit_queries_and_keys(dense, pruned, plan, normed, rotary, generator)
    return waist


def _fit_queries_and_keys(
    dense: nn.Module,
    pruned: nn.Module,
    plan: LayerPlan,
    normed: torch.Tensor,
    rotary: tuple[Rotary, Rotary],
    generator: torch.Generator,
) -> None:
    """Replaces the query and key projections of `pruned` by ones fitted on these windows."""
    half = dense.head_dim // 2
    width = pruned.head_dim
    shape = (width, dense.head_dim)
    groups, queries = len(plan.slot_pairs), dense.num_key_value_groups
    key_maps = torch.zeros(groups, *shape, device=normed.device)
    for group, pairs in enumerate(plan.slot_pairs):
        dims = torch.tensor(pairs, device=normed.device)
        key_maps[group, torch.arange(width), torch.cat([dims, dims + half])] = 1
    query_maps = key_maps.repeat_interleave(queries, dim=0)
    for group in range(groups):
        heads = range(group * queries, (group + 1) * queries)
        samples = [_sample(dense, normed, head, rotary, generator) for head in heads]
        for _ in range(ROUNDS):
            for head, sample in zip(heads, samples, strict=True):
                query_maps[head] = _fit_query(query_maps[head], key_maps[group], sample)
            key_maps[group] = _fit_key(key_maps[group], query_maps[list(heads)], samples)
    # Most attentions divide logits by the root of head_dim, which is smaller now.
    _map_rows(dense.q_proj, pruned.q_proj, query_maps * (dense.scaling / pruned.scaling))
    _map_rows(dense.k_proj, pruned.k_proj, key_maps)


def _map_rows(source: nn.Linear, target: nn.Linear, maps: torch.Tensor) -> None:
    """Rows of each head of `source` mixed by its map, shape (heads, head_dim', head_dim)."""
    for name in ("weight", "bias"):
        rows = getattr(source, name)
        if rows is not None:
            per_head = rows.float().unflatten(0, (len(maps), -1))
            mixed = torch.einsum("hnd,hd...->hn...", maps, per_head).flatten(0, 1)
            setattr(target, name, nn.Parameter(mixed.to(rows.dtype), requires_grad=False))


# --- queries and keys ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sample:
    """Queries of one head, some keys for each, and the differences of logits to be fitted.

    `query` has shape (samples, head_dim), `key` (samples, keys, head_dim), both before rotation;
    `target` (samples, keys), less its mean over keys. The rotations are the narrow ones.
    """

    query: torch.Tensor
    key: torch.Tensor
    target: torch.Tensor
    query_rotary: Rotary
    key_rotary: Rotary


def _sample(
    dense: nn.Module,
    normed: torch.Tensor,
    head: int,
    rotary: tuple[Rotary, Rotary],
    generator: torch.Generator,
) -> _Sample:
    group = head // dense.num_key_value_groups
    length, dim = normed.shape[1], dense.head_dim
    query = _of_head(dense.q_proj, normed, head, dim)
    key = _of_head(dense.k_proj, normed, group, dim)
    (cos, sin), (narrow_cos, narrow_sin) = (
        (cosines[0].float(), sines[0].float()) for cosines, sines in rotary
    )
    stride = max(QUERY_STRIDE, math.ceil(normed[..., 0].numel() / MAX_QUERIES))
    stride = min(stride, length)
    places = torch.arange(stride - 1, length, stride, device=normed.device)
    query = query[:, places]
    turned = _turn(query, cos[places], sin[places]) * dense.scaling
    logits = turned @ _turn(key, cos, sin).mT
    logits = logits.masked_fill(
        torch.arange(length, device=normed.device) > places[:, None], -torch.inf
    )
    drawn_from = (1 - EVENLY) * logits.softmax(-1) + EVENLY * (logits / 2).softmax(-1)
    keys = torch.multinomial(
        drawn_from.flatten(0, 1), KEYS_A_QUERY, replacement=True, generator=generator
    ).unflatten(0, logits.shape[:2])
    window = torch.arange(len(normed), device=normed.device)[:, None, None]
    where = places.repeat(len(normed))
    return _Sample(
        query=query.flatten(0, 1) * dense.scaling,
        key=key[window, keys].flatten(0, 1),
        target=_centred(logits.gather(-1, keys)).flatten(0, 1),
        query_rotary=(narrow_cos[where, None], narrow_sin[where, None]),
        key_rotary=(narrow_cos[keys.flatten(0, 1)], narrow_sin[keys.flatten(0, 1)]),
    )


def _of_head(projection: nn.Linear, normed: torch.Tensor, head: int, dim: int) -> torch.Tensor:
    rows = slice(head * dim, (head + 1) * dim)
    bias = None if projection.bias is None else projection.bias[rows]
    return functional.linear(normed, projection.weight[rows], bias).float()


def _turn(vectors: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates dims i and i + dim / 2 together, as LLaMA's rotary embedding does."""
    return vectors * cos + rotate_half(vectors) * sin


def _centred(values: torch.Tensor) -> torch.Tensor:
    return values - values.mean(dim=-1, keepdim=True)


def _fit_query(query_map: torch.Tensor, key_map: torch.Tensor, sample: _Sample) -> torch.Tensor:
    key = _turn(sample.key @ key_map.T, *sample.key_rotary)
    key = key - key.mean(dim=1, keepdim=True)
    # Rotated back by the query's position, so that the logit is (A q) · key.
    cos, sin = sample.query_rotary
    key = _turn(key, cos, -sin)
    curvature = key.square().sum() * sample.query.square().mean() / key_map.numel() ** 0.5
    return _least_squares(
        query_map,
        lambda x: ((sample.query @ x.T)[:, None] * key).sum(dim=-1),
        lambda left: (left[..., None] * key).sum(dim=1).T @ sample.query,
        sample.target,
        _ridge(curvature),
    )


def _fit_key(
    key_map: torch.Tensor, query_maps: torch.Tensor, samples: list[_Sample]
) -> torch.Tensor:
    queries, keys, targets = [], [], []
    for query_map, sample in zip(query_maps, samples, strict=True):
        query = _turn((sample.query @ query_map.T)[:, None], *sample.query_rotary)
        cos, sin = sample.key_rotary
        queries.append(_turn(query, cos, -sin))
        keys.append(sample.key)
        targets.append(sample.target)
    query, key, target = torch.cat(queries), torch.cat(keys), torch.cat(targets)
    curvature = query.square().sum() * key.square().mean() / key_map.numel() ** 0.5
    return _least_squares(
        key_map,
        lambda x: _centred((query * (key @ x.T)).sum(dim=-1)),
        lambda left: (_centred(left)[..., None] * query).flatten(0, 1).T @ key.flatten(0, 1),
        target,
        _ridge(curvature),
    )


def _ridge(curvature: torch.Tensor) -> torch.Tensor:
    """A single number, which stays on the device: to read it is to wait for what made it."""
    return (RIDGE * in_float64(curvature)).float()


def _least_squares(
    start: torch.Tensor,
    forward: Callable[[torch.Tensor], torch.Tensor],
    adjoint: Callable[[torch.Tensor], torch.Tensor],
    target: torch.Tensor,
    ridge: torch.Tensor,
) -> torch.Tensor:
    """Minimises `|forward(x) − target|² + ridge |x − start|²` by conjugate gradients from `start`.

    It is stopped early, which shrinks the solution towards `start` as a ridge does.
    """
    change = torch.zeros_like(start)
    left = target - forward(start)
    gradient = adjoint(left)
    direction, energy = gradient.clone(), gradient.square().sum()
    enough = CONVERGED**2 * energy
    for _ in range(ITERATIONS):
        if not energy > enough:
            break
        moved = forward(direction)
        curvature = moved.square().sum() + ridge * direction.square().sum()
        step = energy / curvature
        change = change + step * direction
        left = left - step * moved
        gradient = adjoint(left) - ridge * change
        before, energy = energy, gradient.square().sum()
        direction = gradient + energy / before * direction
    return start + change


# --- values ----------------------------------------------------------------------------------


def _dense_values(
    dense: nn.Module, pruned: nn.Module, normed: torch.Tensor, rotary: Rotary
) -> torch.Tensor:
    """Outputs of heads as wide as before, under the attention of the narrow queries and keys.

    Shape (windows, sequence_length, num_attention_heads × head_dim).
    """
    query, key, value = (
        projection(normed).unflatten(-1, (-1, width)).transpose(1, 2)
        for projection, width in (
            (pruned.q_proj, pruned.head_dim),
            (pruned.k_proj, pruned.head_dim),
            (dense.v_proj, dense.head_dim),
        )
    )
    return attend(*apply_rotary_pos_emb(query, key, *rotary), value, pruned.scaling)


def _fit_values(
    dense: nn.Module, pruned: nn.Module, seen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Fits the value basis of each group and sets the value and output projections of `pruned`.

    `seen` holds the outputs of heads of the dense width, shape (windows, sequence_length,
    num_attention_heads × head_dim). Gives these outputs in the new bases, head_dim' for each head.
    """
    queries, dim = dense.num_key_value_groups, dense.head_dim
    heads = seen.unflatten(-1, (-1, dim))
    output = dense.o_proj.weight.unflatten(1, (-1, dim))
    moments = in_float64(output.new_zeros(heads.shape[2], dim, dim))
    for window, weight in zip(heads, weights, strict=True):
        rows = window.float() * weight.sqrt()[:, None, None]
        moments += torch.einsum("thd,the->hde", rows, rows).to(moments.device)
    floor = moments.diagonal(dim1=1, dim2=2).mean().clamp_min(torch.finfo(torch.float64).tiny)
    value_maps, columns = [], []
    for group in torch.arange(len(moments)).split(queries):
        moment = moments[group].sum(dim=0) + 1e-6 * floor * torch.eye(dim).to(moments)
        root, inverse_root = _roots(moment)
        written = in_float64(output[:, group])
        # Right singular vectors of what the group writes, from its small Gram matrix.
        gram = torch.einsum("ohd,ohe->de", written, written)
        directions = torch.linalg.eigh(root @ gram @ root).eigenvectors
        basis = directions[:, -pruned.head_dim :].T.flip(0)
        value_maps.append(basis @ inverse_root)
        columns.append(written @ (root @ basis.T))
    maps = torch.stack(value_maps)
    _map_rows(dense.v_proj, pruned.v_proj, maps.float().to(seen.device))
    weight = torch.cat(columns, dim=1).flatten(1).to(dense.o_proj.weight.dtype)
    pruned.o_proj.weight = nn.Parameter(weight.to(seen.device), requires_grad=False)
    per_head = maps.repeat_interleave(queries, dim=0).to(seen.dtype).to(seen.device)
    return torch.einsum("wthd,hnd->wthn", heads, per_head).flatten(2)


def _roots(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The square root of a symmetric positive matrix, and the inverse of that root."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp_min(torch.finfo(values.dtype).tiny)
    return (vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T
