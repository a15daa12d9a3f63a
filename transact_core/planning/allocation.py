"""Widths of its own for each layer: the least sum of losses that a number of parameters allows.

Each module of each layer can be left with one of several widths, each of which keeps some
parameters and loses some nats. One number, the multiplier, is the price of a parameter in nats:
under it, every module takes by itself the width at which its loss and the price of its parameters
are least together. It is set so that the parameters of all modules fit into the budget; what is
then left of the budget goes, step by step, to where it lowers the loss most for a parameter.

How much a module loses at a width is taken to follow a power of the error that it makes there
(`planning.damage`), through losses that were measured at one or two widths.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

EXPONENTS = (1.0, 1.5)
"""Limits of the exponent of a loss as a power of the error. The loss of a small error is
proportional to it. Measured exponents are often smaller, since on text of another kind than the
calibration's a repair does harm at any width; but a loss that is steep at an error of 0 would keep
some layers whole and empty others."""
LEAST_LOSS = 1e-7
"""Nats under which measured losses are noise; their logarithms are taken."""
CALIBRATION_SHARE = 0.6
"""How much losses on the calibration's kind of text count among those on all kinds. The model is
calibrated for the texts that it will be used on; the others keep the widths from being fitted to
one kind. docs/engine.md compares other weights."""
HALVINGS = 100
"""Of the interval in which the multiplier is looked for, on a logarithmic scale."""


@dataclass(frozen=True)
class Item:
    """One module of one layer, and what it can be left with."""

    widths: np.ndarray
    """Ascending, shape (widths,)."""
    costs: np.ndarray
    """Parameters kept at each width, ascending, shape (widths,)."""
    losses: np.ndarray
    """Nats lost at each width, shape (widths,), never smaller at a smaller width."""

    def from_width(self, least: float) -> "Item":
        """Without the widths under `least`, but for the dense one, which always stays."""
        stay = (self.widths >= least) | (self.widths == self.widths[-1])
        return Item(self.widths[stay], self.costs[stay], self.losses[stay])

    def only(self, width: float) -> "Item":
        """With this width alone."""
        stay = self.widths == width
        return Item(self.widths[stay], self.costs[stay], self.losses[stay])


@dataclass(frozen=True)
class Allocation:
    """The width that each item was given."""

    places: tuple[int, ...]
    """The index into each item's widths."""
    multiplier: float
    """Nats that one more parameter would have saved; 0 where all of them fit."""

    def widths(self, items: Sequence[Item]) -> list[int]:
        """The widths themselves."""
        return [int(item.widths[place]) for item, place in zip(items, self.places, strict=True)]


def cost_of(items: Sequence[Item], places: Sequence[int]) -> float:
    """Parameters of all items at these widths."""
    return float(sum(item.costs[place] for item, place in zip(items, places, strict=True)))


def loss_of(items: Sequence[Item], places: Sequence[int]) -> float:
    """Nats that all items lose at these widths, taken to add up."""
    return float(sum(item.losses[place] for item, place in zip(items, places, strict=True)))


def allocate(items: Sequence[Item], budget: float) -> Allocation:
    """The widths of least loss within the budget, in parameters.

    The loss is the least possible where losses are convex and parameters come in equal steps. In
    general it is above the least possible by no more than the multiplier times what was left of the
    budget before it was filled up.

    Raises:
        ValueError: even the smallest widths are over the budget.
    """
    smallest = [0] * len(items)
    # A parameter is a whole number; sums of shares of them may be off by rounding.
    room = budget + 1e-6
    if cost_of(items, smallest) > room:
        raise ValueError("the smallest widths are over the budget")
    largest = _best(items, 0.0)
    if cost_of(items, largest) <= room:
        return Allocation(_filled(items, largest, room), 0.0)
    low, high = _limits(items)
    for _ in range(HALVINGS):
        middle = math.sqrt(low * high)
        if cost_of(items, _best(items, middle)) > room:
            low = middle
        else:
            high = middle
    return Allocation(_filled(items, _best(items, high), room), high)


def _best(items: Sequence[Item], multiplier: float) -> list[int]:
    """The width that each item takes at this price of a parameter; the smaller one on a tie."""
    return [int(np.argmin(item.losses + multiplier * item.costs)) for item in items]


def _limits(items: Sequence[Item]) -> tuple[float, float]:
    """Multipliers under and over all that change any item's width."""
    slopes = [
        (item.losses[place] - item.losses[place + 1 :])
        / (item.costs[place + 1 :] - item.costs[place])
        for item in items
        for place in range(len(item.widths) - 1)
    ]
    positive = np.concatenate([slope[slope > 0] for slope in slopes] or [np.ones(1)])
    return float(positive.min()) / 2, float(positive.max()) * 2


def _filled(items: Sequence[Item], places: Sequence[int], room: float) -> tuple[int, ...]:
    """The places after what is left of the budget was spent where it saves most a parameter."""
    taken = list(places)
    left = room - cost_of(items, taken)
    while True:
        best, step = -1.0, None
        for number, (item, place) in enumerate(zip(items, taken, strict=True)):
            more = item.costs[place + 1 :] - item.costs[place]
            fitting = int(np.searchsorted(more, left, side="right"))
            if not fitting:
                continue
            saved = (item.losses[place] - item.losses[place + 1 : place + 1 + fitting]) / more[
                :fitting
            ]
            # Of equal ones the largest step, which leaves least behind.
            at = fitting - 1 - int(np.argmax(saved[::-1]))
            if saved[at] > best:
                best, step = float(saved[at]), (number, place + 1 + at)
        if step is None:
            return tuple(taken)
        number, place = step
        left -= items[number].costs[place] - items[number].costs[taken[number]]
        taken[number] = place


# --- losses at all widths --------------------------------------------------------------------


@dataclass(frozen=True)
class LossLaw:
    """The loss of one module as a power of its error: `scale × error ** exponent`, in nats."""

    scale: float
    exponent: float

    def at(self, errors: np.ndarray) -> np.ndarray:
        """The loss at each error; 0 where the error is 0."""
        return self.scale * np.asarray(errors, dtype=float) ** self.exponent

    def through(self, error: float, loss: float) -> "LossLaw":
        """The same power, scaled to this loss at this error."""
        return replace(self, scale=max(loss, LEAST_LOSS) / error**self.exponent)


def loss_law(errors: Sequence[float], losses: Sequence[float]) -> LossLaw:
    """The power of the error that goes through measured losses, or between them where its exponent
    would be outside `EXPONENTS`.

    Errors of 0, where nothing was cut, are left out; with a single error the loss is proportional.
    """
    x = np.log([error for error in errors if error > 0])
    kept = [loss for error, loss in zip(errors, losses, strict=True) if error > 0]
    y = np.log(np.maximum(kept, LEAST_LOSS))
    if not len(x):
        return LossLaw(LEAST_LOSS, 1.0)
    exponent = 1.0
    if np.ptp(x) > 0:
        centred = x - x.mean()
        exponent = float(np.clip(centred @ y / (centred @ centred), *EXPONENTS))
    return LossLaw(math.exp(float(np.mean(y - exponent * x))), exponent)


def weights_of_kinds(kinds: Sequence[str], calibration: str) -> np.ndarray:
    """How much each kind of text counts, (kinds,), in all 1; `calibration` is the one of that text,
    which may be missing."""
    own = np.array([kind == calibration for kind in kinds])
    if own.all() or not own.any():
        return np.full(len(own), 1 / len(own))
    return np.where(own, CALIBRATION_SHARE, (1 - CALIBRATION_SHARE) / (len(own) - 1))


def together(by_kind: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """One loss of each cut from its losses on several kinds of text, by `weights_of_kinds`.

    `by_kind` has shape (cuts, kinds), in nats. Losses of a kind are taken as shares of their sum,
    since a text on which all cuts lose much would otherwise decide alone; the result, (cuts,), is
    in nats again, with the weighted mean of the sums.
    """
    losses = np.maximum(by_kind, 0)
    sums = np.maximum(losses.sum(axis=0), LEAST_LOSS)
    return (losses / sums) @ weights * (sums @ weights)
