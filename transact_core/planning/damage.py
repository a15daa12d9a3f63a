"""The error that each layer's modules make at every width, estimated before anything is cut.

One pass over the calibration windows, on the dense model's residual stream, gives the second
moments of each module's waist in each fold. For one order of its channels, those kept longest
first, they give the error of the module's output at *all* widths at once. It is the error of
`closed_form.LayerFit`: squared, relative to the dense module's output, each token weighted by
`linalg.inverse_rms`, and held out from the repair. The difference is that the stream is the dense
model's, and not that of the model pruned up to this layer; and where a norm stands behind the
module, errors count as it passes them on to first order (`stream.gains` and `stream.slopes`), while
a fit is judged by the norm itself.

With X the weighted rows of a fold, H = XᵀX and W the output projection, all in that order, the
error of the bare cut to width k is the sum over the trailing block of `H ∘ WᵀW` from k on, and that
of a bias is the same with H taken about the mean of the other folds. Least squares towards the bare
cut with a ridge needs one Cholesky factor L of the other folds' damped second moments: the repaired
weight of width k differs from W by `(L⁻ᵀ P_k Z)ᵀ` with `Z = Lᵀ Wᵀ`, where P_k sets the first k rows
to zero. So the fold's error is `‖V_kᵀ Z_k‖²` with `V = L⁻¹ Xᵀ` and the rows from k on, and one
factorisation serves every width. X may be any matrix with the same second moments, and X and Z may
be taken to random combinations of the tokens and of the outputs, where there are many: those keep
the sum of squares on average.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np
import torch
from transformers import LlamaForCausalLM

from transact_core.base.errors import Progress, silent
from transact_core.base.linalg import (
    FLOAT64_DEVICES,
    factored_in_place,
    inverse_rms,
    second_moments,
    solve_lower,
)
from transact_core.data.windows import Windows
from transact_core.forward.layers import layers_of
from transact_core.forward.stream import Stream, gains, output_weight
from transact_core.forward.waists import output_projections
from transact_core.importance.scores import Scores
from transact_core.models.architecture import Architecture
from transact_core.pruning.closed_form import RECOVERIES, recover_by_layers
from transact_core.pruning.plan import PruningPlan, best_first, head_counts
from transact_core.pruning.ridge import FLOOR, combinations, random_signs
from transact_core.pruning.surgery import Cut

RIDGES = (0.1, 0.3, 1.0)
"""Those of `closed_form.RIDGES` that are chosen in practice; each width takes the best of them."""
FOLDS = 4
"""Half of `closed_form.FOLDS`: each fold costs a factorisation for every ridge and order."""
HEAD_CUTS = ("query-heads", "kv-groups")
"""Granularities that remove whole heads and leave the rest of the waist unchanged."""
NARROW_RATIOS = (0.1, 0.25, 0.4, 0.6)
"""Removed shares of head_dim at which narrower heads are measured; errors between are
interpolated."""
JUDGED_ROWS = 2048
"""A fold of more rows than this is judged by as many random combinations of them."""
ROWS_AT_ONCE = 256
"""Channels whose errors are found at a time: enough to keep the matrix products efficient."""
REPORTS_A_LAYER = 100
"""Parts of a layer that progress is reported in: a layer of a large model takes minutes."""


@dataclass(frozen=True)
class Curve:
    """The error of one kind of module at each width it can be cut to."""

    widths: torch.Tensor
    """Channels kept, ascending up to the dense width, shape (widths,), int64."""
    errors: torch.Tensor
    """Relative squared error of each layer, shape (layers, widths), float64; 0 at the dense width
    and never smaller at a smaller width."""

    def covers(self, width: float) -> bool:
        """Whether the error at this width is known: the narrowest heads are not measured."""
        return bool(self.widths[0] <= width <= self.widths[-1])

    def at(self, widths: Sequence[float] | np.ndarray) -> np.ndarray:
        """Mean error over layers at these widths, interpolated linearly between known widths.

        Raises:
            ValueError: a width under the smallest or over the dense one.
        """
        known, asked = self.widths.numpy(), np.asarray(widths)
        if ((asked < known[0]) | (asked > known[-1])).any():
            raise ValueError(f"not all of the widths {asked} are from {known[0]} to {known[-1]}")
        return np.interp(asked, known, self.errors.mean(dim=0).numpy())


@dataclass(frozen=True)
class Damage:
    """The curves of both modules, for one importance, granularity and recovery."""

    mha: Curve
    mlp: Curve


def curves(
    tensors: Mapping[str, torch.Tensor],
    architecture: Architecture,
    granularity: str,
    recovery: str,
) -> Damage:
    """Damage from the results of `measure_curves` and, for `head-dims`, of `narrow_heads` too."""
    errors = tensors[f"mlp.{recovery}"]
    mlp = Curve(torch.arange(1, errors.shape[1]), errors[:, 1:])
    if granularity in HEAD_CUTS:
        widths = architecture.head_dim * torch.tensor(head_counts(architecture, granularity))
        mha = Curve(widths, tensors[f"{granularity}.{recovery}"][:, widths])
    else:
        mha = Curve(tensors["widths"], tensors["errors"])
    return Damage(mha, mlp)


def kept_first(scores: Scores, architecture: Architecture) -> dict[str, dict[str, torch.Tensor]]:
    """Orders of channels of which every cut keeps the first ones: (layers, width), int64.

    By module and name: "mha" has one for each of `HEAD_CUTS`, "mlp" one named "mlp".
    """
    grouped = scores.heads.unflatten(1, (architecture.num_key_value_heads, -1))
    head_indices = torch.arange(architecture.num_attention_heads).view(grouped.shape[1:])
    groups = best_first(grouped.mean(dim=2))
    whole_groups = head_indices[groups].flatten(1)
    by_rank = best_first(grouped) + head_indices[:, :1]
    rounds = by_rank.mT.flatten(1) if architecture.queries_per_group > 1 else whole_groups
    dims = torch.arange(architecture.head_dim)
    return {
        "mha": {
            name: (heads[..., None] * architecture.head_dim + dims).flatten(1)
            for name, heads in zip(HEAD_CUTS, (rounds, whole_groups), strict=True)
        },
        "mlp": {"mlp": best_first(scores.channels)},
    }


@torch.no_grad()
def measure_curves(
    model: LlamaForCausalLM,
    windows: Windows,
    orders: Mapping[str, Mapping[str, torch.Tensor]],
    progress: Progress = silent,
) -> dict[str, torch.Tensor]:
    """Errors at all widths of all layers, for orders as `kept_first` gives them.

    Gives `NAME.RECOVERY` for every order and recovery, shape (layers, width + 1), float64 on the
    CPU; entry k is the error with k channels kept. Costs one pass without the LM head, the second
    moments, and for each fold and ridge a factorisation and a triangular solve of its rows. Memory
    beside the hidden states of all windows is one module's: its waist on all windows, the second
    moments of each fold, and a few matrices of that size.

    Raises:
        TransActError: a transitional activation is NaN or infinite.
    """
    found: dict[str, list[torch.Tensor]] = {}
    stream = Stream(model, windows)
    layers = len(stream.layers)
    folds = torch.arange(len(windows)).tensor_split(min(FOLDS, len(windows)))
    # Factorising takes most of the time, which grows with the cube of the width.
    work = {
        name: order.shape[1] ** 3 for by_name in orders.values() for name, order in by_name.items()
    }
    done = 0.0

    def report(more: float = 0.0) -> None:
        parts = REPORTS_A_LAYER * (done + more)
        progress("Estimating what each width loses", int(parts), REPORTS_A_LAYER * layers)

    for layer_index in range(layers):
        done = float(layer_index)
        report()
        with stream.layers.borrow(layer_index) as layer:
            for module, projection in output_projections(layer).items():
                eps = model.config.rms_norm_eps
                bias, factors = projection.bias, gains(layer, module)
                if bias is not None and factors is not None:
                    bias = bias.float() * factors
                rows = _rows_of_folds(stream, layer_index, module, eps, folds)
                measured: list[tuple[torch.Tensor, dict[str, torch.Tensor]]] = []
                for name, order in orders[module].items():
                    share = work[name] / sum(work.values())
                    # Without grouped queries, both orders of heads are the same.
                    errors = next(
                        (found for known, found in measured if known.equal(order[layer_index])),
                        None,
                    ) or errors_at_all_widths(
                        rows,
                        output_weight(layer, module),
                        bias,
                        order[layer_index],
                        lambda part, share=share: report(part * share),
                    )
                    measured.append((order[layer_index], errors))
                    done += share
                    for recovery, error in errors.items():
                        found.setdefault(f"{name}.{recovery}", []).append(error)
    progress("Estimating what each width loses", REPORTS_A_LAYER * layers, REPORTS_A_LAYER * layers)
    return {name: torch.stack(errors) for name, errors in found.items()}


@torch.no_grad()
def narrow_heads(
    model: LlamaForCausalLM,
    windows: Windows,
    plans: Sequence[PruningPlan],
    recovery: str,
    progress: Progress = silent,
) -> dict[str, torch.Tensor]:
    """The error of the attention with narrower heads, measured by narrowing them.

    Removing rotary pairs changes the attention weights themselves, so the error is no sum over
    channels. Instead each of `plans`, which cut nothing else, is carried out and repaired, and the
    errors of its fits are taken. Gives `widths`, (plans + 1,), and `errors`, (layers, plans + 1),
    as in `Curve`.

    Raises:
        TransActError: a transitional activation is NaN or infinite.
    """
    dense = Architecture.from_config(model.config).mha_width
    # Without a recovery there are no fits to take errors from, and a bias costs next to nothing.
    carried_out = "bias" if recovery == "none" else recovery
    found = {dense: torch.zeros(len(layers_of(model)), dtype=torch.float64)}
    for plan_number, plan in enumerate(plans, start=1):

        def report(stage: str, done: int, total: int, plan_number: int = plan_number) -> None:
            progress(f"Narrowing heads, {plan_number} of {len(plans)}", done, total)

        cut = Cut(model, plan)
        # Only the errors are used, and not every class has the biases that a repair would write.
        fits = recover_by_layers(cut, windows, carried_out, report, judge_only=True).fits
        errors = [fit.bare_error if recovery == "none" else fit.recovered_error for fit in fits]
        found[plan.num_attention_heads * plan.head_dim] = torch.tensor(errors, dtype=torch.float64)
    widths = sorted(found)
    errors = _rising(torch.stack([found[width] for width in widths], dim=1))
    return {"widths": torch.tensor(widths), "errors": errors}


def _rows_of_folds(
    stream: Stream, layer_index: int, module: str, eps: float, folds: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """The weighted rows of each fold, with a constant 1 as the last channel, float32.

    A fold of more rows than channels is given as many rows as channels, with the same second
    moments. Moves the stream past the module.
    """
    rows, start = torch.empty(0), 0
    for transitional, residual, slopes in stream.advance(layer_index, module):
        root = inverse_rms(residual, eps).sqrt()
        if slopes is not None:
            root *= slopes
        if not start:
            shape = (*stream.hidden.shape[:2], transitional.shape[-1] + 1)
            rows = torch.empty(shape, device=root.device)
        batch = rows[start : start + len(root)]
        batch[..., :-1], batch[..., -1:] = transitional * root, root
        start += len(root)
    width = rows.shape[-1]
    of_folds = [rows[fold[0] : fold[-1] + 1].flatten(0, 1) for fold in folds]
    return [_compressed(fold) if len(fold) > width else fold for fold in of_folds]


def _compressed(rows: torch.Tensor) -> torch.Tensor:
    """As many rows as channels, with the same second moments."""
    # Devices without float64 have no QR decomposition either.
    where = rows if rows.device.type in FLOAT64_DEVICES else rows.cpu()
    return torch.linalg.qr(where, mode="r").R.to(rows.device)


def _combined(rows: torch.Tensor) -> torch.Tensor:
    """`JUDGED_ROWS` random combinations of the rows where there are more, with the same sum of
    squares of every product on average: rows that far apart are added, each with a random sign."""
    if len(rows) <= JUDGED_ROWS:
        return rows
    signs = random_signs(len(rows), 1).to(rows)
    combined = rows.new_zeros(JUDGED_ROWS, rows.shape[1])
    for part, sign in zip(rows.split(JUDGED_ROWS), signs.split(JUDGED_ROWS), strict=True):
        combined[: len(part)].addcmul_(part, sign)
    return combined


def errors_at_all_widths(
    rows: Sequence[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    order: torch.Tensor,
    report: Callable[[float], None] = lambda part: None,
) -> dict[str, torch.Tensor]:
    """Relative held-out error of one module by recovery, shape (width + 1,), float64 on the CPU.

    `rows` are those of each fold, shape (tokens, width + 1) with the constant last; `weight` and
    `bias` the output projection's; `order` its channels, kept longest first. As in `closed_form`, a
    repair that does no better than the bare cut is not made, and with one fold alone nothing can be
    held out and no repair is made. `report` is called after each fit with the part of the work that
    is done, from 0 to 1.
    """
    order = order.to(weight.device)
    place = torch.cat([order, order.new_tensor([len(order)])])
    energies = sum(fold.square().sum(dim=0) for fold in rows)[place]
    # Every channel is divided by its own RMS; with the ridge, float32 then suffices.
    scale = energies[:-1].sqrt()
    scale = scale.clamp_min(scale.amax() * 1e-6 if scale.any() else 1.0)
    columns = weight.float()[:, order] * scale
    units = torch.cat([scale, scale.new_ones(1)])
    moments = [second_moments([fold[:, place] / units], len(place)) for fold in rows]
    total = reduce(add, moments)
    products = second_moments([columns], len(order))
    bare = _trailing(total, products)
    energy = bare[0].clone()
    if bias is not None:
        mean_output = columns @ total[:-1, -1]
        energy += (
            2 * mean_output @ bias.float() + total[-1, -1] * bias.float().square().sum()
        ).cpu()
    energy = energy.clamp_min(torch.finfo(torch.float64).tiny)
    errors = {recovery: bare.clone() for recovery in RECOVERIES}
    if len(rows) > 1:
        of_bias = torch.zeros_like(bare)
        for unseen in moments:
            sums = total[:, -1] - unseen[:, -1]
            of_bias += _trailing(unseen, products, mean=sums[:-1] / sums[-1])
        errors["bias"] = torch.minimum(bare, of_bias)
        del products
        mixed = combinations(len(columns)).to(columns.device)
        outputs = columns.T @ mixed if mixed.numel() else columns.T
        fitted = torch.zeros(len(RIDGES), len(bare), dtype=torch.float64)
        for number, (fold, unseen) in enumerate(zip(rows, moments, strict=True)):
            seen, judged = total - unseen, _combined(fold[:, order]) / scale
            for ridge_number, ridge in enumerate(RIDGES):
                fitted[ridge_number] += _repaired(seen, judged, outputs, scale, ridge)
                report((number + (ridge_number + 1) / len(RIDGES)) / len(rows))
        errors["least-squares"] = torch.minimum(bare, fitted.amin(dim=0))
    return {recovery: _rising(error / energy) for recovery, error in errors.items()}


def _repaired(
    seen: torch.Tensor,
    unseen: torch.Tensor,
    outputs: torch.Tensor,
    scale: torch.Tensor,
    ridge: float,
) -> torch.Tensor:
    """Errors on unseen rows after least squares on the seen moments, (width + 1,), float64.

    In units of `scale`, one for each channel; `outputs` has shape (width, outputs).
    """
    damped = seen[:-1, :-1].clone()
    energy = damped.diagonal().clone()
    floor = FLOOR * (energy * scale.square()).mean() / scale.square()
    floor = floor.clamp_min(torch.finfo(energy.dtype).eps)
    damped.diagonal().add_(ridge * (energy + floor))
    factor = factored_in_place(damped)
    z = torch.empty_like(outputs)
    for start in range(0, len(z), ROWS_AT_ONCE):
        block = slice(start, start + ROWS_AT_ONCE)
        factor[block, block].tril_()
        torch.mm(factor[start:, block].T, outputs[start:], out=z[block])
    v = solve_lower(factor, unseen.T.clone())
    del factor, damped
    return _trailing_products(v, z)


def _trailing_products(v: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """`‖vᵀz‖²` over the rows from each one on: (rows + 1,), float64 on the CPU.

    Blocks of rows are added to the product from the last to the first. What each row adds follows
    from the product of the blocks behind its own, and from the inner products within its block.
    """
    product = v.new_zeros(v.shape[1], z.shape[1])
    added = v.new_empty(len(v))
    for end in range(len(v), 0, -ROWS_AT_ONCE):
        block = slice(max(0, end - ROWS_AT_ONCE), end)
        one, other = v[block], z[block]
        inside = (one @ one.T).mul_(other @ other.T)
        behind = (one @ product).mul_(other).sum(dim=1)
        added[block] = inside.diagonal() + 2 * (inside.triu(1).sum(dim=1) + behind)
        product.addmm_(one.T, other)
    return _sums_from_each_on(added)


def _trailing(
    moments: torch.Tensor, products: torch.Tensor, mean: torch.Tensor | None = None
) -> torch.Tensor:
    """Sums over the trailing blocks of `H ∘ WᵀW`: (width + 1,), float64 on the CPU.

    `moments` are H with the constant last, `products` is WᵀW; with `mean`, H is taken about it.
    """
    added = products.new_empty(len(products))
    tokens = 0.0 if mean is None else moments[-1, -1].item()
    for start in range(0, len(products), ROWS_AT_ONCE):
        block = slice(start, start + ROWS_AT_ONCE)
        h = moments[:-1, :-1][block, start:].clone()
        if mean is not None:
            sums = moments[:-1, -1]
            h.addr_(sums[block], mean[start:], alpha=-1).addr_(mean[block], sums[start:], alpha=-1)
            h.addr_(mean[block], mean[start:], alpha=tokens)
        h.mul_(products[block, start:])
        diagonal = h.diagonal().clone()
        added[block] = diagonal + 2 * h.triu_(1).sum(dim=1)
    return _sums_from_each_on(added)


def _sums_from_each_on(added: torch.Tensor) -> torch.Tensor:
    """Sums of all entries from each one on, and 0 at the end; float64 on the CPU."""
    sums = added.cpu().double().flip(0).cumsum(0).flip(0)
    return torch.cat([sums, sums.new_zeros(1)])


def _rising(errors: torch.Tensor) -> torch.Tensor:
    """Errors by width, each raised to the largest error of all larger widths."""
    return errors.clamp_min(0).flip(-1).cummax(-1).values.flip(-1)
