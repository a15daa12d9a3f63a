"""Cross-fitted ridge regression: the change to an output projection that compensates for a cut.

With x a token's features, y the part of the module's output that the cut removed and w the token's
weight, the change C minimises `Σ w ‖y − Cᵀx‖²` plus a ridge penalty on C. The windows are divided
into folds, and a ridge is judged on each fold by the change that was fitted on all other folds.

The penalty of a feature is the ridge times its own energy on the windows of the fit. In units in
which every feature has energy 1 on all windows, the penalty of a fit on all of them is the ridge
times the identity, and float32 is accurate enough: rounding errors are far below the ridge.

With G the second moments of all windows' features, B those of features and outputs, X and Y the
weighted rows of one fold and R the penalty of the fit on all others, what the fold is left with by
that fit follows in two ways:

- `Y − X (G + R − XᵀX)⁻¹ (B − XᵀY)`, a factorisation for each fold;
- `(1 − X (G + R)⁻¹ Xᵀ)⁻¹ (Y − X (G + R)⁻¹ B)`, one factorisation for all folds and a matrix as
  large as a fold has tokens for each: the formula of leaving one out (Allen 1974, PRESS), for a
  fold in place of a token. R is the same for all fits here, that on all windows included: energies
  on all folds but one are taken to be their average.

The first is cheaper where a fold has more tokens than there are features, and there its error is a
trace of second moments, which needs no rows. The second is cheaper everywhere else.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add

import torch

from transact_core.base.linalg import (
    factored_in_place,
    in_float64,
    second_moments,
    solve_factored,
    solve_lower,
)

FLOOR = 1e-3
"""The least damping of dead features, as a share of the mean energy."""
JUDGED_OUTPUTS = 512
"""Ridges are compared on this many random combinations of the outputs, where there are at least
twice as many outputs. The chosen ridge's error is that of all outputs."""
COMPARED_TOKENS = 4096
"""Ridges are compared on as many folds as have this many tokens together, two at least. The chosen
ridge's error, and what the windows are left with, are those of all folds."""


def energy(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sum of squares, a single number in float64, where `in_float64` puts it.

    `values` has shape (windows, sequence_length, width), the tokens' `weights` (windows,
    sequence_length). To make a Python number of it is to wait for the device.
    """
    parts = [
        in_float64(window.float().square().sum(dim=-1) * weight).sum()
        for window, weight in zip(values, weights, strict=True)
    ]
    return reduce(add, parts)


@dataclass(frozen=True)
class Chosen:
    """A ridge and its cross-validated error."""

    ridge: float
    error: float
    """Weighted squared error summed over the compared folds, each by the change fitted on all
    others, estimated where there are more outputs than `JUDGED_OUTPUTS`; infinite where a fold
    cannot be solved."""
    factors: Mapping[int, torch.Tensor] = field(repr=False, default_factory=dict)
    """Of each compared fold, by its number, what its solution needs again."""


@dataclass(frozen=True)
class Fitted:
    """What the regression gives under one ridge."""

    change: torch.Tensor
    """The change fitted on all windows, shape (features, outputs), float32."""
    left: torch.Tensor
    """What each window's missing output is left with by the change fitted on all other folds:
    shape (windows, sequence_length, outputs), float32."""
    error: float
    """Weighted sum of squares of `left`; NaN where it cannot be solved."""


class FoldedRidge:
    """The regression on all windows, and for each fold on all windows outside it.

    Args:
        features: shape (windows, sequence_length, features).
        missing: the outputs to be fitted, shape (windows, sequence_length, outputs).
        weights: the tokens' weights, positive, shape (windows, sequence_length).
        folds: indices of the windows of each fold, two folds or more.
        gains: shape (outputs,); by what each output's error is multiplied where ridges are
            compared. None is 1.
        by_folds: whether each fold is factorised by itself; the cheaper way if not given.
    """

    def __init__(
        self,
        features: torch.Tensor,
        missing: torch.Tensor,
        weights: torch.Tensor,
        folds: Sequence[torch.Tensor],
        by_folds: bool | None = None,
        gains: torch.Tensor | None = None,
    ) -> None:
        self.features, self.missing, self.weights, self.folds = features, missing, weights, folds
        self.gains = gains
        width, outputs = features.shape[-1], missing.shape[-1]
        if by_folds is None:
            by_folds = width <= min(len(fold) for fold in folds) * features.shape[1]
        self.by_folds = by_folds
        self.compared = _spread(folds, math.ceil(COMPARED_TOKENS / features.shape[1]))
        """Numbers of the folds that ridges are compared on."""
        self._share = 1 - 1 / len(folds)
        self.energy = energy(missing, weights).item()
        """Weighted sum of squares of `missing`: the error without any change."""
        self._units = _units(features, weights)
        self._mixed = combinations(outputs).to(features.device)
        if by_folds:
            # Together no larger than the features and the missing outputs.
            self._of_folds = [self._moments([fold]) for fold in folds]
            self._gram, self._cross = (sum(parts) for parts in zip(*self._of_folds, strict=True))
        else:
            self._gram, self._cross = self._moments(folds)

    def choose(self, ridges: Sequence[float], start: int) -> Chosen:
        """The best of the ascending ridges by cross-validation, downhill from the one at `start`.

        Larger ridges are tried first, then smaller ones, each direction for as long as the error
        falls. Ridges that cannot be solved are passed over until one can be. No ridge is solved
        twice.
        """
        best, tried = self._tried(ridges[start]), {start}
        for step in (1, -1):
            position = ridges.index(best.ridge) + step
            while 0 <= position < len(ridges) and position not in tried:
                candidate = self._tried(ridges[position])
                tried.add(position)
                if candidate.error < best.error:
                    best = candidate
                elif best.error < math.inf:
                    break
                position += step
        return best

    def fit(self, chosen: Chosen) -> Fitted:
        """The regression under the chosen ridge, on all outputs.

        It overwrites the second moments: nothing else can be asked for afterwards.
        """
        left = torch.empty(self.missing.shape, device=self.missing.device)
        try:
            if chosen.error == math.inf:
                raise torch.linalg.LinAlgError
            change, error = (self._fit_by_folds if self.by_folds else self._fit_at_once)(
                chosen, left
            )
        except torch.linalg.LinAlgError:
            return Fitted(self._cross.fill_(torch.nan), left.fill_(torch.nan), math.nan)
        return Fitted(change / self._units[:, None], left, error)

    def _fit_by_folds(self, chosen: Chosen, left: torch.Tensor) -> tuple[torch.Tensor, float]:
        """The change, in units, and the error; fills in what each window is left with."""
        error = 0.0
        for number, fold in enumerate(self.folds):
            factor = chosen.factors.get(number)
            if factor is None:
                factor = self._factor_without(number, chosen.ridge)
            change = solve_factored(factor, self._cross - self._of_folds[number][1])
            x, y = self._rows(fold)
            error += self._leave(left, fold, y.addmm_(x, change, alpha=-1))
        change = solve_factored(self._factored(self._gram, chosen.ridge), self._cross)
        return change, float(error)

    def _fit_at_once(self, chosen: Chosen, left: torch.Tensor) -> tuple[torch.Tensor, float]:
        """As `_fit_by_folds`, by the factor of all windows."""
        error = 0.0
        whole = self._factored(self._gram, chosen.ridge * self._share)
        change = solve_factored(whole, self._cross)
        for number, fold in enumerate(self.folds):
            x, y = self._rows(fold)
            y.addmm_(x, change, alpha=-1)
            factor = chosen.factors.get(number)
            if factor is None:
                factor = _unexplained(whole, x)
            del x
            error += self._leave(left, fold, solve_factored(factor, y))
        return change, float(error)

    def _leave(self, left: torch.Tensor, fold: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Fills in what the windows of a fold are left with, from weighted rows; their energy."""
        left[fold] = (rows / self._roots(fold)).unflatten(0, (len(fold), -1))
        return _sum_of_squares(rows)

    def _tried(self, ridge: float) -> Chosen:
        try:
            error, factors = (self._by_folds if self.by_folds else self._at_once)(ridge)
        except torch.linalg.LinAlgError:
            return Chosen(ridge, math.inf)
        return Chosen(ridge, math.inf if math.isnan(error) else error, factors)

    def _by_folds(self, ridge: float) -> tuple[float, dict[int, torch.Tensor]]:
        """The error under a ridge, and the factor of each compared fold."""
        error, factors = 0.0, {}
        total = self._judged(self._cross)
        for number in self.compared:
            gram, cross = self._of_folds[number]
            factors[number] = self._factor_without(number, ridge)
            cross = self._judged(cross)
            change = solve_factored(factors[number], total - cross)
            # |Y − XC|² by second moments alone.
            products = ((gram @ change - 2 * cross) * change).sum(dim=0)
            error += _sum_of_squares(self._judged(self._rows(self.folds[number])[1]))
            error += in_float64(products).sum()
        # Rounding could make the error of a perfect fit negative.
        return max(float(error), 0.0), factors

    def _at_once(self, ridge: float) -> tuple[float, dict[int, torch.Tensor]]:
        """The error under a ridge, and for each compared fold the factor of `_unexplained`."""
        error, factors = 0.0, {}
        whole = self._factored(self._gram.clone(), ridge * self._share)
        change = solve_factored(whole, self._judged(self._cross).clone())
        for number in self.compared:
            x, y = self._rows(self.folds[number])
            y = torch.addmm(self._judged(y), x, change, alpha=-1)
            factors[number] = _unexplained(whole, x)
            error += _sum_of_squares(solve_factored(factors[number], y))
        return float(error), factors

    def _factor_without(self, number: int, ridge: float) -> torch.Tensor:
        """The factor of the penalised second moments of all folds but this one."""
        others = self._gram - self._of_folds[number][0]
        energies = others.diagonal() * self._units.square()
        return self._factored(others, ridge * _with_floor(energies) / self._units.square())

    def _factored(self, gram: torch.Tensor, penalty: torch.Tensor | float) -> torch.Tensor:
        """The Cholesky factor of the penalised second moments, in the memory of `gram`."""
        gram.diagonal().add_(penalty)
        return factored_in_place(gram)

    def _moments(self, folds: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The second moments of some folds' features, and those of features and outputs."""
        width, outputs = self.features.shape[-1], self.missing.shape[-1]
        cross = torch.zeros(width, outputs, device=self.features.device)

        def passing() -> Iterator[torch.Tensor]:
            for fold in folds:
                x, y = self._rows(fold)
                cross.addmm_(x.T, y)
                yield x

        return second_moments(passing(), width), cross

    def _judged(self, outputs: torch.Tensor) -> torch.Tensor:
        """The outputs, or their combinations, by which ridges are compared; (…, outputs)."""
        if self.gains is not None:
            outputs = outputs * self.gains
        return outputs @ self._mixed if self._mixed.numel() else outputs

    def _roots(self, fold: torch.Tensor) -> torch.Tensor:
        return self.weights[fold].flatten().sqrt()[:, None]

    def _rows(self, fold: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and missing outputs, one row for each token, times the root of its weight.

        In float32, the features in units of `_units`.
        """
        root = self._roots(fold)
        x, y = self.features[fold].flatten(0, 1), self.missing[fold].flatten(0, 1)
        return (x.float() / self._units).mul_(root), y.float() * root


def _unexplained(whole: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The factor of `1 − X (G + R)⁻¹ Xᵀ` for the rows of one fold, which it overwrites.

    `whole` is the factor of G + R.
    """
    unexplained = second_moments([solve_lower(whole, x.T)], len(x)).neg_()
    unexplained.diagonal().add_(1)
    return factored_in_place(unexplained)


def _spread(folds: Sequence[torch.Tensor], windows: int) -> list[int]:
    """Numbers of folds that have at least so many windows together, two or more, spread evenly."""
    count = math.ceil(windows / min(len(fold) for fold in folds))
    count = min(max(2, count), len(folds))
    return [len(folds) * turn // count for turn in range(count)]


def _units(features: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The root of each feature's energy and of the floor, so that no unit is 0; float32."""
    energies = torch.zeros(features.shape[-1], device=features.device)
    for window, weight in zip(features, weights, strict=True):
        energies += weight @ window.float().square()
    return _with_floor(energies).sqrt()


def _with_floor(energies: torch.Tensor) -> torch.Tensor:
    return energies + (FLOOR * energies.mean()).clamp_min(torch.finfo(energies.dtype).tiny)


def compared(outputs: int) -> int:
    """How many outputs, or combinations of them, are looked at to compare ridges."""
    return outputs if outputs < 2 * JUDGED_OUTPUTS else JUDGED_OUTPUTS


def combinations(outputs: int) -> torch.Tensor:
    """Random combinations of outputs, which keep the sum of squares on average: (outputs, …).

    Empty where all outputs are looked at themselves.
    """
    if compared(outputs) == outputs:
        return torch.empty(0)
    return random_signs(outputs, JUDGED_OUTPUTS) / JUDGED_OUTPUTS**0.5


def random_signs(*shape: int) -> torch.Tensor:
    """1 and -1, the same ones at every call; float32 on the CPU."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    return 2.0 * torch.randint(0, 2, shape, generator=generator) - 1


def _sum_of_squares(values: torch.Tensor) -> torch.Tensor:
    """A single number in float64, where `in_float64` puts it."""
    return in_float64(values.square().sum(dim=-1)).sum()
