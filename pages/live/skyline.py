"""The widths of single layers: as the address holds them, and the tables that bars are drawn from.

The text of a module's widths has a part for each run of layers that are alike, as in
`9x4.6h.9x25`: nine heads in four layers, six in the next, which was set by hand, and nine in the
other twenty-five. It says what stays, whatever the sliders say.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from pages.live.packed import text_of_bytes
from transact_core.experiments.allocate import Laws
from transact_core.experiments.bench import Choices
from transact_core.models.architecture import Architecture
from transact_core.planning.damage import Curve, Damage
from transact_core.planning.preview import LayerCosts, layer_costs
from transact_core.planning.width_table import FLOOR
from transact_core.pruning.plan import ByHand, nearest_width

PART = re.compile(r"(\d{1,7})(h?)(?:x(\d{1,4}))?")
"""One run of layers that are alike."""
MOST_LAYERS = 4096
"""Longer texts are nobody's model."""
SAMPLES = 129
"""Widths of the MLP at which losses are sent to the browser, which draws lines between them."""


@dataclass(frozen=True)
class Bar:
    """One layer's width: heads or channels that stay, and whether a hand has set it."""

    units: int
    by_hand: bool = False


def bars_of(text: str) -> tuple[Bar, ...]:
    """The bars that a text stands for; none where it is not such a text."""
    bars: list[Bar] = []
    for part in text.split(".") if text else ():
        found = PART.fullmatch(part)
        if found is None:
            return ()
        units, hand, times = found.groups()
        bars += [Bar(int(units), bool(hand))] * int(times or 1)
        if len(bars) > MOST_LAYERS:
            return ()
    return tuple(bars)


def text_of(bars: Sequence[Bar]) -> str:
    """The text that stands for these bars."""
    parts = []
    for bar, alike in groupby(bars):
        times = len(list(alike))
        hand = "h" if bar.by_hand else ""
        parts.append(f"{bar.units}{hand}" + (f"x{times}" if times > 1 else ""))
    return ".".join(parts)


def texts_of(widths: ByHand) -> tuple[str, str]:
    """The texts of heads and channels, none of them marked as set by hand."""
    heads, channels = zip(*widths, strict=True) if widths else ((), ())
    return text_of([Bar(units) for units in heads]), text_of([Bar(units) for units in channels])


def by_hand_of(heads: str, channels: str) -> ByHand:
    """The widths that two texts stand for; empty where they stand for none."""
    both = bars_of(heads), bars_of(channels)
    if not both[0] or len(both[0]) != len(both[1]):
        return ()
    return tuple((head.units, channel.units) for head, channel in zip(*both, strict=True))


def fixed_of(heads: str, channels: str) -> dict[str, dict[int, int]]:
    """The numbers that a hand has set, by module and layer."""
    return {
        module: {layer: bar.units for layer, bar in enumerate(bars_of(text)) if bar.by_hand}
        for module, text in (("mha", heads), ("mlp", channels))
    }


def fitted(heads: str, channels: str, costs: Mapping[str, LayerCosts], layers: int) -> tuple:
    """The two texts with each width moved to the nearest one that can be; empty where there are
    not as many as layers."""
    both = bars_of(heads), bars_of(channels)
    if any(len(bars) != layers for bars in both):
        return "", ""
    return tuple(
        text_of([Bar(nearest_width(costs[module].units, bar.units), bar.by_hand) for bar in bars])
        for module, bars in zip(("mha", "mlp"), both, strict=True)
    )


def why_fixed(choices: Choices) -> str:
    """Why bars cannot be set by hand with these choices; empty where they can."""
    if choices.granularity == "auto":
        return "Not with auto: what a layer can keep depends on the granularity."
    if choices.granularity == "head-dims":
        return "Not with head-dims: the heads of all layers have the same dimensions."
    if choices.steps > 1:
        return "Not with several steps: widths by hand are cut in one."
    return ""


def bar_tables(architecture: Architecture, choices: Choices) -> dict[str, Any]:
    """What the browser needs to set bars and to work out what they cost; exact.

    Without granularity of whole heads there are no such numbers, and bars only show.
    """
    reason = why_fixed(choices)
    tables: dict[str, Any] = {"fixed": reason, "floor": FLOOR}
    if reason:
        return tables
    costs = layer_costs(
        architecture, choices.granularity, choices.multiple_of, choices.recovery == "bias"
    )
    for module, each in costs.items():
        units = each.units
        tables[module] = {
            # Every multiple is a width of the MLP, which is shorter to say than to list.
            "units": list(units) if module == "mha" else None,
            "least": units[0],
            "most": units[-1],
            "step": choices.multiple_of if module == "mlp" else None,
            "per_unit": dict(each.per_unit),
            "bias_per_unit": each.bias_per_unit,
            "bias_constant": each.bias_constant,
        }
    return tables


def price_tables(
    damage: Damage, laws: Laws, costs: Mapping[str, LayerCosts], head_dim: int
) -> dict[str, Any]:
    """What each layer's module loses at its widths, in nats a token, for the browser."""

    def table(curve: Curve, module: str, units: np.ndarray, width_of_unit: int) -> dict[str, Any]:
        known = np.searchsorted(curve.widths.numpy(), units * width_of_unit)
        errors = curve.errors.numpy()[:, known]
        losses = [law.at(row) for law, row in zip(laws[module], errors, strict=True)]
        return {
            "units": units.tolist(),
            "losses": text_of_bytes(np.array(losses).astype("<f4").tobytes()),
        }

    channels = costs["mlp"].units
    sampled = np.unique(np.linspace(0, len(channels) - 1, min(SAMPLES, len(channels))).round())
    return {
        "mha": table(damage.mha, "mha", np.array(costs["mha"].units), head_dim),
        "mlp": table(damage.mlp, "mlp", np.array([channels[int(at)] for at in sampled]), 1),
    }
