"""Ridge regression across folds: the change to an output projection that makes up for a cut.

With x a token's features, y what the module fails to write there and w the token's weight, the
change C is the least `Σ w ‖y − Cᵀx‖²` plus a ridge on C. The windows are dealt into folds, and what
a ridge is worth is judged on each fold by the change that was fitted on all others.

Second moments are all that is needed: those of all folds but one are the sum less that fold's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from transact_core.base.linalg import factored_in_place

KEPT_BYTES = 1 << 29
"""Of all folds' moments; where there would be more, each is gathered anew whenever it is needed."""
FLOOR = 1e-3
"""Of the mean energy: what holds features that have none of their own."""
ROWS_AT_ONCE = 1024
"""Of moments that are multiplied out at a time, and outputs that are solved for at a time."""


def energy(values: torch.Tensor, weights: torch.Tensor) -> float:
    """Sum of squares over (windows, sequence_length, width), each token times its weight."""
    total = 0.0
    for window, weight in zip(values, weights, strict=True):
        total += (window.float().square().sum(dim=-1) * weight).double().sum().item()
    return total


@dataclass(frozen=True)
class Moments:
    """Weighted second moments of features and of what is missing.

    `gram` has shape (features, features), `cross` (features, outputs).
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
        """Those of weighted rows, float32, shape (tokens, features) and (tokens, outputs).

        They are multiplied out some rows at a time: no third matrix of that size is made. A `sign`
        of -1 takes them away.
        """
        for start in range(0, len(self.gram), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            self.gram[rows].add_(x[:, rows].T @ x, alpha=sign)
            self.cross[rows].add_(x[:, rows].T @ y, alpha=sign)


def solve(gram: torch.Tensor, cross: torch.Tensor, ridge: float) -> torch.Tensor:
    """The change, shape (features, outputs), that leaves least missing under this ridge.

    Takes a float64 `gram` and any `cross`, and overwrites both: the change is made where `cross`
    was. The ridge pulls towards no change, relative to each feature's own energy: without data
    nothing changes. NaN where it cannot be solved.
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
        half = torch.linalg.solve_triangular(factor, outputs.double(), upper=False)
        outputs.copy_(torch.linalg.solve_triangular(factor.mT, half, upper=True))
    return cross


@dataclass(frozen=True)
class Chosen:
    """A ridge, and the energy that is missing with it, each fold by what the others taught."""

    ridge: float
    error: float
    changes: Sequence[torch.Tensor] | None
    """Of each fold, where the folds' moments are kept."""


class FoldedRidge:
    """The regression on all windows, and on all but each fold.

    Args:
        features: shape (windows, sequence_length, features).
        missing: shape (windows, sequence_length, outputs).
        weights: of the tokens, shape (windows, sequence_length).
        folds: the windows of each, two folds or more.
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
        """Of what is missing before any change."""

    def solve(self, ridge: float) -> torch.Tensor:
        """The change that all windows ask for, float32."""
        return solve(self._total.gram.double(), self._total.cross.clone(), ridge)

    def choose(self, ridges: Sequence[float], start: int) -> Chosen:
        """The best of the ridges by cross-validation, downhill from the one at `start`."""
        best, position = self._tried(ridges[start]), start
        for step in (1, -1):
            while 0 <= position + step < len(ridges):
                neighbour = self._tried(ridges[position + step])
                if not neighbour.error < best.error:
                    break
                best, position = neighbour, position + step
        return best

    def corrections(self, chosen: Chosen) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each fold's windows, and what is added there by the change that the others ask for.

        In float32, shape (windows, sequence_length, outputs).
        """
        for number, fold in enumerate(self.folds):
            if chosen.changes is None:
                yield fold, self._correction(fold, self._change(number, chosen.ridge))
            else:
                yield fold, self._correction(fold, chosen.changes[number])

    def _correction(self, fold: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        return self.features[fold].float() @ change

    def _tried(self, ridge: float) -> Chosen:
        error, changes = 0.0, []
        for number, fold in enumerate(self.folds):
            change = self._change(number, ridge)
            error += energy(
                self.missing[fold].float() - self._correction(fold, change), self.weights[fold]
            )
            changes += [change] if self.keeps else []
            # Where none is kept, none is to stand beside the next.
            del change
        return Chosen(ridge, error, changes if self.keeps else None)

    def _change(self, number: int, ridge: float) -> torch.Tensor:
        """What all folds but this one ask for, float32."""
        others = Moments(self._total.gram.double(), self._total.cross.clone())
        if self.keeps:
            others.gram.sub_(self._kept[number].gram)
            others.cross.sub_(self._kept[number].cross)
        else:
            others.add(*self._rows(self.folds[number]), sign=-1)
        return solve(others.gram, others.cross, ridge)

    def _rows(self, fold: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and what is missing, a row a token, times the root of its weight; float32."""
        root = self.weights[fold].flatten().sqrt()[:, None]
        x, y = self.features[fold].flatten(0, 1), self.missing[fold].flatten(0, 1)
        return x.float() * root, y.float() * root
