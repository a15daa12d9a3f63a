"""Cross-fitted ridge regression: the change to an output projection that compensates for a cut.

With x a token's features, y the part of the module's output that the cut removed and w the token's
weight, the change C minimises `Σ w ‖y − Cᵀx‖²` plus a ridge penalty on C. The windows are divided
into folds, and a ridge is judged on each fold by the change that was fitted on all other folds.

Only second moments are needed: those of all folds but one are the sum of all minus that fold's.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from transact_core.base.linalg import factored_in_place, in_float64

KEPT_BYTES = 1 << 29
"""Most bytes of second moments kept for all folds together; where they would take more, each
fold's moments are computed again whenever they are needed."""
FLOOR = 1e-3
"""The least damping of dead features, as a share of the mean energy."""
ROWS_AT_ONCE = 1024
"""Rows of the moments that are multiplied out at a time, and outputs that are solved for at a
time: both bound the memory of intermediate results."""


def energy(values: torch.Tensor, weights: torch.Tensor) -> float:
    """Weighted sum of squares, a number.

    `values` has shape (windows, sequence_length, width), the tokens' `weights` (windows,
    sequence_length).
    """
    total = 0.0
    for window, weight in zip(values, weights, strict=True):
        total += in_float64(window.float().square().sum(dim=-1) * weight).sum().item()
    return total


@dataclass(frozen=True)
class Moments:
    """Weighted second moments of the features, and of the features with the missing outputs.

    `gram` has shape (features, features), `cross` (features, outputs). The two may be on different
    devices, where one is in float64.
    """

    gram: torch.Tensor
    cross: torch.Tensor

    @classmethod
    def none(cls, features: int, outputs: int, device: torch.device) -> "Moments":
        """Of no tokens, float32."""
        return cls(
            torch.zeros(features, features, device=device),
            torch.zeros(features, outputs, device=device),
        )

    def add(self, x: torch.Tensor, y: torch.Tensor, sign: float = 1.0) -> None:
        """Adds the moments of weighted rows; a `sign` of -1 subtracts them.

        `x` has shape (tokens, features), `y` (tokens, outputs), both float32. Only some rows of the
        moments are multiplied out at a time, so no third matrix of that size is made.
        """
        for start in range(0, len(self.gram), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            self.gram[rows].add_((x[:, rows].T @ x).to(self.gram.device), alpha=sign)
            self.cross[rows].add_((x[:, rows].T @ y).to(self.cross.device), alpha=sign)

    def subtract(self, other: "Moments") -> None:
        """Subtracts other moments, in place."""
        self.gram.sub_(other.gram.to(self.gram.device))
        self.cross.sub_(other.cross.to(self.cross.device))


def solve(gram: torch.Tensor, cross: torch.Tensor, ridge: float) -> torch.Tensor:
    """The change, shape (features, outputs), with the least penalised error under this ridge.

    Takes a float64 `gram` and a `cross` of any dtype on any device, and overwrites both: the result
    is in the memory of `cross`. The ridge shrinks the change, relative to each feature's own
    energy; a feature without energy is not used. All NaN where the system cannot be solved.
    """
    diagonal = gram.diagonal()
    floor = FLOOR * diagonal.mean().clamp_min(torch.finfo(torch.float64).tiny)
    diagonal += ridge * (diagonal + floor)
    try:
        factor = factored_in_place(gram)
    except torch.linalg.LinAlgError:
        return cross.fill_(torch.nan)
    for start in range(0, cross.shape[1], ROWS_AT_ONCE):
        outputs = cross[:, start : start + ROWS_AT_ONCE]
        right = in_float64(outputs).to(factor.device)
        half = torch.linalg.solve_triangular(factor, right, upper=False)
        outputs.copy_(torch.linalg.solve_triangular(factor.mT, half, upper=True))
    return cross


@dataclass(frozen=True)
class Chosen:
    """A ridge and its cross-validated error."""

    ridge: float
    error: float
    """Weighted squared error summed over folds, each by the change fitted on all others; infinite
    where a fold cannot be solved."""
    changes: Sequence[torch.Tensor] | None
    """The change that is applied on each fold, where the folds' moments are kept."""


class FoldedRidge:
    """The regression on all windows, and for each fold on all windows outside it.

    Args:
        features: shape (windows, sequence_length, features).
        missing: the outputs to be fitted, shape (windows, sequence_length, outputs).
        weights: the tokens' weights, shape (windows, sequence_length).
        folds: indices of the windows of each fold, two folds or more.
        kept_bytes: most bytes of the folds' second moments that are kept.
    """

    def __init__(
        self,
        features: torch.Tensor,
        missing: torch.Tensor,
        weights: torch.Tensor,
        folds: Sequence[torch.Tensor],
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        self.features, self.missing, self.weights, self.folds = features, missing, weights, folds
        width, outputs = features.shape[-1], missing.shape[-1]
        self.keeps = 4 * len(folds) * width * (width + outputs) <= kept_bytes
        self._total = Moments.none(width, outputs, features.device)
        self._kept = []
        for fold in folds:
            if self.keeps:
                kept = Moments.none(width, outputs, features.device)
                kept.add(*self._rows(fold))
                self._kept.append(kept)
                self._total.gram.add_(kept.gram)
                self._total.cross.add_(kept.cross)
            else:
                self._total.add(*self._rows(fold))
        self.energy = energy(missing, weights)
        """Weighted sum of squares of `missing`: the error without any change."""

    def solve(self, ridge: float) -> torch.Tensor:
        """The change fitted on all windows, float32."""
        return solve(in_float64(self._total.gram), self._total.cross.clone(), ridge)

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

    def corrections(self, chosen: Chosen) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each fold's windows, and the correction there by the change fitted on all other folds.

        In float32, shape (windows, sequence_length, outputs).
        """
        for fold_index, fold in enumerate(self.folds):
            if chosen.changes is None:
                yield fold, self._correction(fold, self._change(fold_index, chosen.ridge))
            else:
                yield fold, self._correction(fold, chosen.changes[fold_index])

    def _correction(self, fold: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        return self.features[fold].float() @ change

    def _tried(self, ridge: float) -> Chosen:
        error, changes = 0.0, []
        for fold_index, fold in enumerate(self.folds):
            change = self._change(fold_index, ridge)
            error += energy(
                self.missing[fold].float() - self._correction(fold, change), self.weights[fold]
            )
            changes += [change] if self.keeps else []
            # Where changes are not kept, this one is freed before the next is solved.
            del change
        return Chosen(
            ridge, math.inf if math.isnan(error) else error, changes if self.keeps else None
        )

    def _change(self, fold_index: int, ridge: float) -> torch.Tensor:
        """The change fitted on all folds but this one, float32."""
        others = Moments(in_float64(self._total.gram), self._total.cross.clone())
        if self.keeps:
            others.subtract(self._kept[fold_index])
        else:
            others.add(*self._rows(self.folds[fold_index]), sign=-1)
        return solve(others.gram, others.cross, ridge)

    def _rows(self, fold: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and missing outputs, one row for each token, times the root of its weight;
        float32."""
        root = self.weights[fold].flatten().sqrt()[:, None]
        x, y = self.features[fold].flatten(0, 1), self.missing[fold].flatten(0, 1)
        return x.float() * root, y.float() * root
