"""What each layer's modules can be left with, what that costs and what it loses; and the choice.

Numbers only: errors come from `planning.damage`, losses from `planning.prices`, and the choice is
made by `planning.allocation`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from types import MappingProxyType

import numpy as np

from transact_core.base.errors import TransActError
from transact_core.models.architecture import Architecture, LayerWidths
from transact_core.planning.allocation import (
    Item,
    LossLaw,
    allocate,
    loss_law,
    together,
)
from transact_core.planning.damage import Curve, Damage
from transact_core.pruning.plan import (
    Granularity,
    Widths,
    head_counts,
    layer_channel_counts,
    widths_of_layer,
)

LEVELS = (0.3, 0.65)
"""Removed shares of a module's width at which its effect on the predictions is measured."""
FLOOR = 0.25
"""The least that a layer keeps of a module, as a share of what a uniform cut of the same ratio
keeps of every layer. Losses far beyond the measured levels are extrapolations."""
TRUST = 0.5
"""How far the loss of a module moves from what its cut does alone to its part in a cut of all
modules, on a logarithmic scale: 0 not at all, 1 all the way. The parts are the noisier ones."""
NONE_FIXED: Mapping[str, Mapping[int, int]] = MappingProxyType({})
LEAST_PART = 0.1
"""Least part in a cut of all modules, as a share of what the cut of that module alone leads to."""


@dataclass(frozen=True)
class Module:
    """One kind of module in all layers: what a layer can keep of it, and what that loses."""

    units: np.ndarray
    """Numbers of heads or channels that a layer can keep, ascending up to the dense one."""
    waist: np.ndarray
    """The width of the transitional activation for each of these numbers."""
    costs: np.ndarray
    """The parameters of one layer's module for each of these numbers."""
    errors: np.ndarray = field(repr=False)
    """Relative errors, shape (layers, numbers), as `damage.Curve` has them."""
    uniform: int
    """The number that a uniform cut of the same ratio keeps in every layer."""
    laws: tuple[LossLaw, ...] = ()
    """From the error of each layer to its loss."""

    @property
    def budget(self) -> float:
        """Parameters of this module that a uniform cut keeps in all layers."""
        return float(len(self.errors) * self.costs[self.place_of(self.uniform)])

    def place_of(self, units: int) -> int:
        """The index of a number among `units`."""
        return int(np.searchsorted(self.units, units))

    def levels(self) -> list[int]:
        """The places nearest to `LEVELS`, without the dense number."""
        wanted = [self.units[-1] * (1 - level) for level in LEVELS]
        cut = self.units[:-1]
        return list(dict.fromkeys(int(np.argmin(abs(cut - units))) for units in wanted))

    def items(self, fixed: Mapping[int, int]) -> list[Item]:
        """What each layer's width is chosen from; `fixed` are the numbers of single layers."""
        items = []
        for layer_index, (errors, law) in enumerate(zip(self.errors, self.laws, strict=True)):
            item = Item(self.units, self.costs, law.at(errors))
            kept = fixed.get(layer_index)
            items.append(item.from_width(FLOOR * self.uniform) if kept is None else item.only(kept))
        return items


@dataclass(frozen=True)
class WidthTable:
    """All modules that are cut. Without prices, the loss of a module is its error."""

    modules: Mapping[str, Module]
    """By "mha" and "mlp"; a module whose ratio is 0 is not among them."""
    architecture: Architecture
    granularity: Granularity
    traded: bool
    """Whether heads and channels share one budget."""
    fixed: Mapping[str, Mapping[int, int]]
    """The numbers of heads or channels of layers that are not to be chosen, by module and layer."""

    @classmethod
    def of(
        cls,
        architecture: Architecture,
        uniform: Widths,
        ratios: Mapping[str, float],
        granularity: Granularity,
        multiple_of: int,
        damage: Damage,
        traded: bool,
        kept_whole: Sequence[int] = (),
        fixed: Mapping[str, Mapping[int, int]] = NONE_FIXED,
    ) -> "WidthTable":
        """The table of a model; `uniform` is what the same ratios leave of every layer.

        `kept_whole` are layers that keep all they have, and `fixed` is as the field, for others.
        """
        channels = np.array(layer_channel_counts(architecture, multiple_of))
        heads = np.array(head_counts(architecture, granularity))

        def module(
            name: str, units: np.ndarray, of_unit: int, curve: Curve, uniform_units: int
        ) -> Module:
            known = np.searchsorted(curve.widths.numpy(), units * of_unit)
            return Module(
                units,
                units * of_unit,
                _costs(architecture, granularity, name, units),
                curve.errors.numpy()[:, known],
                uniform_units,
                (LossLaw(1.0, 1.0),) * architecture.num_hidden_layers,
            )

        head_dim = architecture.head_dim
        modules = {
            "mha": module("mha", heads, head_dim, damage.mha, uniform.num_attention_heads),
            "mlp": module("mlp", channels, 1, damage.mlp, uniform.intermediate_size),
        }
        cut = {name: each for name, each in modules.items() if ratios[name] and len(each.units) > 1}
        known = {
            name: {layer: int(each.units[-1]) for layer in kept_whole} | dict(fixed.get(name, {}))
            for name, each in modules.items()
        }
        return cls(cut, architecture, granularity, traded, known)

    def layer_widths(self) -> tuple[LayerWidths, ...]:
        """The widths of least loss within the budget.

        Raises:
            TransActError: the layers that are fixed leave too little to be cut elsewhere.
        """
        items = {name: module.items(self.fixed[name]) for name, module in self.modules.items()}
        names = [tuple(items)] if self.traded else [(name,) for name in items]
        chosen: dict[str, list[int]] = {}
        for together_chosen in names:
            pool = list(chain.from_iterable(items[name] for name in together_chosen))
            budget = sum(self.modules[name].budget for name in together_chosen)
            try:
                units = allocate(pool, budget).widths(pool)
            except ValueError:
                raise TransActError(
                    "The layers that are kept whole or set by hand leave too little to be cut in "
                    "the others; keep fewer layers, set bars lower, or choose smaller ratios."
                ) from None
            layers = self.architecture.num_hidden_layers
            for place, name in enumerate(together_chosen):
                chosen[name] = units[place * layers : (place + 1) * layers]
        dense = self.architecture
        return tuple(
            widths_of_layer(
                dense,
                self.granularity,
                _chosen_or_fixed("mha", layer, chosen, self.fixed, dense.num_attention_heads),
                _chosen_or_fixed("mlp", layer, chosen, self.fixed, dense.intermediate_size),
            )
            for layer in range(dense.num_hidden_layers)
        )

    def with_laws(self, laws: Mapping[str, Sequence[LossLaw]]) -> "WidthTable":
        """With laws that were found before, from the error of each layer to its loss."""
        known = {
            name: replace(module, laws=tuple(laws[name])) for name, module in self.modules.items()
        }
        return replace(self, modules=known)

    def priced(self, losses: Mapping[str, np.ndarray], weights: np.ndarray) -> "WidthTable":
        """With the losses of each module cut alone at its `levels`: (layers, levels, kinds).

        `weights` are those of the kinds of text, (kinds,).
        """
        flat = [losses[name].reshape(-1, losses[name].shape[-1]) for name in self.modules]
        single = together(np.concatenate(flat), weights)
        ends = np.cumsum([len(part) for part in flat])[:-1]
        priced = {}
        for (name, module), part in zip(self.modules.items(), np.split(single, ends), strict=True):
            of_layers = part.reshape(losses[name].shape[:-1])
            laws = tuple(
                loss_law(errors[module.levels()], of_layer)
                for errors, of_layer in zip(module.errors, of_layers, strict=True)
            )
            priced[name] = replace(module, laws=laws)
        return replace(self, modules=priced)

    def repriced(
        self,
        parts: Mapping[str, np.ndarray],
        layers: Sequence[LayerWidths],
        weights: np.ndarray,
    ) -> "WidthTable":
        """With the parts, (layers, kinds), that the modules have in the divergence of a cut to
        these widths; `weights` as for `priced`."""
        whole = together(np.concatenate([parts[name] for name in self.modules]), weights)
        of_module = dict(zip(self.modules, np.split(whole, len(self.modules)), strict=True))
        errors, alone = {}, {}
        for name, module in self.modules.items():
            units = [_units_of(name, each) for each in layers]
            errors[name] = [
                of_layer[module.place_of(kept)]
                for of_layer, kept in zip(module.errors, units, strict=True)
            ]
            alone[name] = [
                float(law.at(error)) for law, error in zip(module.laws, errors[name], strict=True)
            ]
        total = sum(map(sum, alone.values()))
        ratio = whole.sum() / total if total > 0 and whole.sum() > 0 else 1.0
        repriced = {}
        for name, module in self.modules.items():
            laws = []
            for law, error, part, single in zip(
                module.laws, errors[name], of_module[name], alone[name], strict=True
            ):
                scaled = replace(law, scale=law.scale * ratio)
                if error > 0:
                    part = max(part, LEAST_PART * ratio * single)
                    mixed = math.exp(
                        TRUST * math.log(part) + (1 - TRUST) * math.log(ratio * single)
                    )
                    scaled = scaled.through(error, mixed)
                laws.append(scaled)
            repriced[name] = replace(module, laws=tuple(laws))
        return replace(self, modules=repriced)


def equal_uniform_errors(
    damage: Damage,
    laws: Mapping[str, Sequence[LossLaw]],
    widths: Mapping[str, Sequence[int]],
) -> dict[str, float]:
    """The mean error over layers of the uniform cut that loses as much as these widths.

    Both are by "mha" and "mlp"; `widths` are those of the transitional activations, one for each
    layer. What they lose is the sum over layers by `laws`, from the errors of `damage` to nats.
    Between two uniform widths the error is interpolated linearly in the loss.
    """
    found = {}
    for name, curve in (("mha", damage.mha), ("mlp", damage.mlp)):
        known, errors = curve.widths.numpy(), curve.errors.numpy()
        losses = np.stack([law.at(row) for law, row in zip(laws[name], errors, strict=True)])
        lost = sum(
            np.interp(width, known, row) for width, row in zip(widths[name], losses, strict=True)
        )
        # Losses fall with the width, and np.interp wants them ascending.
        uniform, mean = losses.sum(axis=0)[::-1], errors.mean(axis=0)[::-1]
        found[name] = float(np.interp(lost, uniform, mean))
    return found


def _chosen_or_fixed(
    module: str,
    layer: int,
    chosen: Mapping[str, Sequence[int]],
    fixed: Mapping[str, Mapping[int, int]],
    dense: int,
) -> int:
    """What a layer keeps; a module whose ratio is 0 is chosen for no layer, and may be fixed."""
    return chosen[module][layer] if module in chosen else fixed[module].get(layer, dense)


def _units_of(module: str, widths: LayerWidths) -> int:
    return widths.num_attention_heads if module == "mha" else widths.intermediate_size


def _costs(
    architecture: Architecture, granularity: Granularity, module: str, units: np.ndarray
) -> np.ndarray:
    """The parameters of one layer's module at each number of heads or channels."""
    prefix = {"mha": "self_attn.", "mlp": "mlp."}[module]

    def parameters(kept: int) -> int:
        heads = kept if module == "mha" else architecture.num_attention_heads
        channels = kept if module == "mlp" else architecture.intermediate_size
        left = architecture.with_layers(
            [widths_of_layer(architecture, granularity, heads, channels)]
            * architecture.num_hidden_layers
        )
        shapes = left.layer_tensors(0).items()
        return sum(math.prod(shape) for name, shape in shapes if name.startswith(prefix))

    # Parameters grow evenly with the units.
    first, last = parameters(int(units[0])), parameters(int(units[-1]))
    span = max(1, int(units[-1] - units[0]))
    return first + (last - first) * (units - units[0]) / span
