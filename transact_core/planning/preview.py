"""What every position of the two sliders leaves, in tables small enough to send to a browser.

A page that follows a slider while it is dragged cannot make a plan for each position. A module has
few distinct widths: these are its *options*, and every position of its slider takes one of them.
Costs add up over the two modules, so each option's own saving is enough to work out any pair.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from transact_core.forward.statistics import ActivationStatistics
from transact_core.importance.scores import Scores
from transact_core.importance.shares import are_positions, relative
from transact_core.models.architecture import DTYPE_BYTES, Architecture
from transact_core.models.footprint import footprint
from transact_core.pruning.plan import (
    Granularity,
    Widths,
    best_first,
    head_counts,
    kept_heads,
    layer_channel_counts,
    value_dim_scores,
    widths,
    widths_of_layer,
)

POSITIONS = tuple(range(96))
"""Where a slider can stand, in per cent of the width removed."""
RANKS = 256
"""At how many ranks a layer's sorted scores are sampled."""
FLOOR = -3.0
"""Power of ten of the layer's best score below which all scores get the same shade."""


@dataclass(frozen=True)
class Cost:
    """What a model costs, in quantities that add up over its modules."""

    parameters: int
    flops: int
    """FLOPs per token without attention over the context."""
    flops_per_context: int
    """FLOPs per token for each token of context."""
    kv_values: int
    """Values that a token adds to the KV cache, all layers."""

    def __sub__(self, other: "Cost") -> "Cost":
        pairs = zip(_values(self), _values(other), strict=True)
        return Cost(*(left - right for left, right in pairs))


def _values(cost: Cost) -> tuple[int, ...]:
    return tuple(vars(cost).values())


def cost_of(architecture: Architecture) -> Cost:
    """The footprint of an architecture, independent of dtype and context length."""
    one, two = (footprint(architecture, "float32", length) for length in (1, 2))
    slope = two.flops_per_token - one.flops_per_token
    return Cost(
        parameters=one.parameters,
        flops=one.flops_per_token - slope,
        flops_per_context=slope,
        kv_values=one.kv_bytes_per_token // DTYPE_BYTES["float32"],
    )


@dataclass(frozen=True)
class Option:
    """One width that a module can be left with."""

    widths: Widths
    """With the other module left whole."""
    width: int
    """Of the module's transitional activation."""
    saving: Cost
    """By how much the model's cost falls; negative for parameters where a repair adds biases."""


@dataclass(frozen=True)
class Side:
    options: tuple[Option, ...]
    """Widest first; the first is the dense model's."""
    option_at: tuple[int, ...]
    """The index into `options` for each position in `POSITIONS`."""

    def position_of(self, option: int) -> int:
        """Of the positions that take this option, the one nearest to the share that it removes."""
        removed = 100 * (1 - self.options[option].width / self.options[0].width)
        positions = [place for place in POSITIONS if self.option_at[place] == option]
        return min(positions, key=lambda place: abs(place - removed))


@dataclass(frozen=True)
class Structure:
    """The widths and costs of all positions for one granularity; exact."""

    granularity: Granularity
    dense: Cost
    mha: Side
    mlp: Side

    def cost(self, mha_option: int, mlp_option: int) -> Cost:
        mha, mlp = self.mha.options[mha_option], self.mlp.options[mlp_option]
        return self.dense - mha.saving - mlp.saving


def structure(
    architecture: Architecture,
    granularity: Granularity,
    multiple_of: int = 1,
    with_biases: bool = False,
    head_dim_multiple_of: int = 1,
) -> Structure:
    """All positions' widths and costs; `with_biases` as `surgery.prune` takes it."""
    dense = cost_of(architecture)

    def side(module: str) -> Side:
        at = [
            widths(
                architecture,
                place / 100 if module == "mha" else 0.0,
                place / 100 if module == "mlp" else 0.0,
                granularity,
                multiple_of,
                head_dim_multiple_of,
            )
            for place in POSITIONS
        ]
        distinct = list(dict.fromkeys(at))
        options = []
        for left in distinct:
            cut = left.applied_to(architecture, with_biases)
            width = cut.mha_width if module == "mha" else cut.intermediate_size
            options.append(Option(left, width, dense - cost_of(cut)))
        return Side(tuple(options), tuple(map(distinct.index, at)))

    return Structure(granularity, dense, side("mha"), side("mlp"))


# --- widths of single layers -----------------------------------------------------------------


@dataclass(frozen=True)
class LayerCosts:
    """What one kind of module costs in a layer for each head or channel that it keeps; exact."""

    units: Sequence[int]
    """Numbers of heads or channels that a layer can keep, ascending up to the dense one."""
    per_unit: Mapping[str, float]
    """By field of `Cost`. A part of a key-value head belongs to each of its query heads, so that a
    single one may be a fraction; sums over layers are whole."""
    bias_per_unit: float
    """Parameters that a repair's biases add in every layer for each unit there, once any layer is
    cut; 0 where it adds none."""
    bias_constant: float
    """And beside those."""

    def saving(self, kept: Sequence[int]) -> Cost:
        """By how much the model's cost falls where the layers keep so many units."""
        removed = sum(self.units[-1] - units for units in kept)
        added = 0
        if removed:
            added = round(len(kept) * self.bias_constant + sum(kept) * self.bias_per_unit)
        saved = {name: round(removed * each) for name, each in self.per_unit.items()}
        return Cost(**saved | {"parameters": saved["parameters"] - added})


def layer_costs(
    architecture: Architecture,
    granularity: Granularity,
    multiple_of: int = 1,
    with_biases: bool = False,
) -> dict[str, LayerCosts]:
    """By "mha" and "mlp"; `granularity` removes heads, `with_biases` as `surgery.prune` takes it.

    Costs grow evenly with the units, so two numbers of units are enough to work them out.
    """
    dense, layers = architecture.intermediate_size, architecture.num_hidden_layers
    units_of = {
        "mha": head_counts(architecture, granularity),
        "mlp": layer_channel_counts(architecture, multiple_of),
    }

    def cost(module: str, kept: int, biased: bool) -> Cost:
        of_layer = widths_of_layer(
            architecture,
            granularity,
            kept if module == "mha" else architecture.num_attention_heads,
            kept if module == "mlp" else dense,
        )
        bias = {"attention_bias": True} if module == "mha" else {"mlp_bias": True}
        left = architecture.with_layers([of_layer] * layers)
        return cost_of(replace(left, **bias) if biased else left)

    found = {}
    for module, units in units_of.items():
        least, most = units[0], units[-1]
        span = max(1, most - least) * layers

        def slope(
            biased: bool, module: str = module, ends: tuple[int, int] = (least, most), n: int = span
        ) -> dict[str, float]:
            low, high = (cost(module, kept, biased) for kept in ends)
            return {name: value / n for name, value in vars(high - low).items()}

        plain, biased = slope(False), slope(with_biases)
        more = (cost(module, most, with_biases) - cost(module, most, False)).parameters / layers
        per_unit = biased["parameters"] - plain["parameters"]
        found[module] = LayerCosts(units, plain, per_unit, more - per_unit * most)
    return found


# --- energy ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class EnergyKept:
    """Share of each layer's activation energy `Σ a²` in what stays: shape (options, layers)."""

    mha: np.ndarray
    mlp: np.ndarray

    def mean(self, mha_option: int, mlp_option: int) -> float:
        """Over all layers and both modules."""
        return float((self.mha[mha_option].mean() + self.mlp[mlp_option].mean()) / 2)


def energy_kept(
    table: Structure,
    scores: Scores,
    statistics: ActivationStatistics,
    architecture: Architecture,
) -> EnergyKept:
    """Energy shares of every option; for narrower heads, of the value dims that the cut keeps."""
    mlp = statistics.mlp.sum_of_squares
    ordered = mlp.gather(1, best_first(scores.channels)).cumsum(dim=1)
    kept_mlp = [ordered[:, option.width - 1] for option in table.mlp.options]

    mha = statistics.mha.sum_of_squares
    if table.granularity == "head-dims":
        groups = (architecture.num_key_value_heads, -1, architecture.head_dim)
        by_dim = mha.unflatten(1, groups).sum(dim=2)
        order = best_first(value_dim_scores(scores, architecture))
        ordered = by_dim.gather(2, order).cumsum(dim=2).sum(dim=1)
        dims = [option.widths.head_dim or architecture.head_dim for option in table.mha.options]
        kept_mha = [ordered[:, count - 1] for count in dims]
    else:
        by_head = mha.unflatten(1, (-1, architecture.head_dim)).sum(dim=2)
        kept_mha = [
            (by_head * kept_heads(scores.heads, option.widths, architecture)).sum(dim=1)
            for option in table.mha.options
        ]
    return EnergyKept(_shares(kept_mha, mha), _shares(kept_mlp, mlp))


def _shares(kept: Sequence[torch.Tensor], energy: torch.Tensor) -> np.ndarray:
    total = energy.sum(dim=1)
    share = torch.where(total > 0, torch.stack(list(kept)) / total, 1.0)
    return share.clamp(0, 1).numpy()


# --- maps ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shades:
    """Scores as shares of the layer's best, from 0 (dark) to 1, on a scale that spreads them.

    On the scale `log`, 0 stands for at most 10^FLOOR of the best. On the scale `order` a shade is
    the unit's rank, as its score is a rank and not a magnitude.
    """

    values: np.ndarray
    scale: str

    def in_bytes(self) -> bytes:
        """One byte a value, row by row."""
        return np.round(self.values * 255).astype(np.uint8).tobytes()


def shades(scores: np.ndarray, logarithmic_below: float) -> Shades:
    """Shades of scores of shape (layers, units).

    The scale is logarithmic where the median share is below `logarithmic_below`.
    """
    share = relative(scores)
    if are_positions(scores):
        return Shades(share, "order")
    if np.median(share) >= logarithmic_below:
        return Shades(share, "linear")
    return Shades(np.clip(np.log10(np.maximum(share, 10**FLOOR)) / -FLOOR + 1, 0, 1), "log")


@dataclass(frozen=True)
class Maps:
    """Which units every option keeps, and the scores that decide it."""

    heads: Shades
    """Shape (layers, num_attention_heads)."""
    stays_until: np.ndarray
    """The index of the last option that keeps a head; shape (layers, num_attention_heads)."""
    ranked_channels: Shades
    """Each layer's channels sorted from best to worst, at evenly spaced ranks: (layers, RANKS)."""


def maps(table: Structure, scores: Scores, architecture: Architecture) -> Maps:
    if table.granularity == "head-dims":
        last = torch.full(scores.heads.shape, len(table.mha.options) - 1)
    else:
        # A wider option keeps all that a narrower one keeps, so a count gives the last option.
        last = -1 + sum(
            kept_heads(scores.heads, option.widths, architecture).long()
            for option in table.mha.options
        )
    channels = shades(scores.channels.numpy(), 0.3)
    width = channels.values.shape[1]
    at = np.unique(np.linspace(0, width - 1, min(RANKS, width)).round().astype(int))
    ranked = -np.sort(-channels.values, axis=1)[:, at]
    return Maps(shades(scores.heads.numpy(), 0.1), last.numpy(), Shades(ranked, channels.scale))
