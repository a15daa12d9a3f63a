"""How long work on a model will take, from its FLOPs and from how fast this machine is.

The FLOPs (2 per multiply-add) of a pass, of the damage at every width and of a cut follow from the
architecture and the token counts. How many of them are done in a second is measured on the very
model, on the very device: by timing the dense model's evaluation, or a short pass where that was
kept from an earlier run. Matrix products dominate all of it; what else there is goes into a factor
for each kind of work, measured on SmolLM2-135M's layers on one core. The estimate is an order of
magnitude: it tells seconds from minutes from hours, and no more. On a loaded machine, a
cut took 97 s where about 8 minutes were estimated, and another 196 s where about 10 minutes were.
"""

from dataclasses import dataclass

from transact_core.models.architecture import Architecture
from transact_core.models.footprint import footprint
from transact_core.planning.damage import FOLDS, HEAD_CUTS, RIDGES
from transact_core.planning.prices import SCORED_EVERY
from transact_core.planning.width_table import LEVELS
from transact_core.pruning import closed_form
from transact_core.pruning.ridge import compared

RIDGES_TRIED = 3
"""Of `closed_form.RIDGES` at each module: the last one chosen and its two neighbours."""
DAMAGE_FACTOR = 1.5
"""Time of the damage at every width over that of its matrix products alone: factorisations and
triangular solves do fewer FLOPs in a second than products."""
MARGINAL_TIMES = 5
"""Passes over the held-out windows that dividing a divergence takes as long as: one along the cut
model, and for each module that of both models and one back."""
REPAIR_FACTOR = 1.65
"""Time of a least-squares repair over that of its matrix products alone."""


@dataclass(frozen=True)
class Feed:
    """How much text a pass takes: windows of `sequence_length`, `tokens` in all."""

    tokens: int
    sequence_length: int


def evaluation_flops(architecture: Architecture, feed: Feed) -> float:
    """FLOPs of scoring the windows."""
    # The type that weights are stored in makes no difference to FLOPs.
    cost = footprint(architecture, "float32", feed.sequence_length)
    return float(feed.tokens * cost.flops_per_token)


def pass_flops(architecture: Architecture, feed: Feed) -> float:
    """FLOPs of a pass through all layers, without the LM head."""
    head = 2 * architecture.vocab_size * architecture.hidden_size
    return evaluation_flops(architecture, feed) - float(feed.tokens * head)


def damage_flops(architecture: Architecture, calibration: Feed) -> float:
    """FLOPs that `damage.measure_curves` takes as long as, its other work counted in."""
    hidden, tokens = architecture.hidden_size, calibration.tokens
    flops = pass_flops(architecture, calibration)
    orders = len(HEAD_CUTS) if architecture.queries_per_group > 1 else 1
    for width, measured in ((architecture.mha_width, orders), (architecture.intermediate_size, 1)):
        rows, outputs = min(width, tokens // FOLDS), compared(hidden)
        # A Cholesky factor, its triangular solve and product, and the errors of all widths.
        fit = width**3 / 3 + width**2 * (rows + outputs) + 4 * rows * outputs * width
        moments = width**2 * (tokens + hidden)
        compressed = 2 * tokens * width**2 if rows == width else 0
        of_orders = measured * (moments + FOLDS * len(RIDGES) * fit)
        flops += architecture.num_hidden_layers * (compressed + of_orders)
    return DAMAGE_FACTOR * flops


def pricing_flops(
    architecture: Architecture, recovery: str, calibration: Feed, held_out: Feed
) -> float:
    """FLOPs of pricing both modules of every layer (`prices.single_losses`).

    `calibration` is what the repairs are fitted on.
    """
    layers, hidden = architecture.num_hidden_layers, architecture.hidden_size
    through = pass_flops(architecture, held_out)
    head = evaluation_flops(architecture, held_out) - through
    flops = 0.0
    for width in (architecture.mha_width, architecture.intermediate_size):
        repair = 0.0
        if recovery == "least-squares":
            kept = [width * (1 - level) for level in LEVELS]
            repair = sum(size**3 / 3 + 2 * size * width * hidden for size in kept)
            repair += 2 * calibration.tokens * width**2
        # Behind each layer's cut runs half a pass on average.
        judged = len(LEVELS) * (through / 2 + head / SCORED_EVERY)
        flops += pass_flops(architecture, calibration) + through + layers * (judged + repair)
    return flops


def trial_flops(
    dense: Architecture, cut: Architecture, recovery: str, calibration: Feed, held_out: Feed
) -> float:
    """FLOPs of one trial cut of an allocation, and of dividing its divergence among modules."""
    repaired = cut_flops(dense, cut, recovery, calibration, Feed(0, calibration.sequence_length))
    return repaired + MARGINAL_TIMES * evaluation_flops(dense, held_out)


def cut_flops(
    dense: Architecture,
    cut: Architecture,
    recovery: str,
    calibration: Feed,
    evaluation: Feed,
) -> float:
    """FLOPs that cutting in one step, repairing and measuring takes as long as.

    `cut` is what is left. Of `head-dims` the repair of queries and keys is not counted.
    """
    flops = evaluation_flops(cut, evaluation)
    narrowed = [
        width
        for width, before in (
            (cut.mha_width, dense.mha_width),
            (cut.intermediate_size, dense.intermediate_size),
        )
        if width < before
    ]
    if recovery == "none" or not narrowed:
        return flops
    flops += pass_flops(dense, calibration)
    if recovery != "least-squares":
        return flops
    hidden, tokens = dense.hidden_size, calibration.tokens
    fold, outputs = tokens // closed_form.FOLDS, compared(hidden)
    for width in narrowed:
        factor = width**3 / 3
        if width <= fold:
            held_out = closed_form.FOLDS * (factor + 4 * width**2 * outputs)
            fitted = 2 * (closed_form.FOLDS + 1) * width**2 * hidden
        else:
            held_out = factor + width**2 * (tokens + 2 * outputs) + tokens * fold * width
            held_out += 2 * tokens * (width + fold) * outputs
            fitted = 4 * width**2 * hidden + 2 * tokens * fold * hidden
        moments = tokens * width * (width + 2 * hidden)
        of_module = (
            moments + RIDGES_TRIED * held_out + fitted + factor + 2 * tokens * width * hidden
        )
        flops += REPAIR_FACTOR * dense.num_hidden_layers * of_module
    return flops
