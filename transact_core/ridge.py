"""Ridge regression across folds: the change to an output projection that makes up for a cut.

With x a token's features, y what the module fails to write there and w the token's weight, the
change C is the least `Σ w ‖y − Cᵀx‖²` plus a ridge on C. The windows are dealt into folds, and what
a ridge is worth is judged on each fold by the change that was fitted on all others.

Second moments are all that is needed: those of all folds but one are the sum less that fold's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

KEPT_BYTES = 1 << 30
"""Of all folds' moments; where there would be more, each is gathered anew whenever it is needed."""
ROWS_AT_ONCE = 1024
"""Of a fold's moments that are converted to float64 at a time."""


def energy(values: torch.Tensor, weights: torch.Tensor) -> float:
    """Sum of squares over (windows, sequence_length, width), each token times its weight."""
    return (values.float().square().sum(dim=-1) * weights).double().sum().item()


@dataclass(frozen=True)
class Moments:
    """Weighted second moments of features and of what is missing, in the float32 of their making.

    `gram` has shape (features, features), `cross` (features, outputs).
    """

    gram: torch.Tensor
    cross: torch.Tensor
    energy: float
    """Of what is missing."""

    @classmethod
    def of(cls, features: torch.Tensor, missing: torch.Tensor, weights: torch.Tensor) -> "Moments":
        """From (windows, sequence_length, width) each, and a weight for each token."""
        root = weights.flatten().sqrt()[:, None]
        x, y = (each.flatten(0, 1).float() * root for each in (features, missing))
        return cls(x.T @ x, x.T @ y, energy(missing, weights))

    def error(self, change: torch.Tensor) -> float:
        """Energy of what is still missing once the float64 change is made."""
        explained = 2 * (change * self.cross).sum()
        for start in range(0, len(change), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            explained -= (change[part] * (self.gram[part].double() @ change)).sum()
        return self.energy - explained.item()


def solve(gram: torch.Tensor, cross: torch.Tensor, ridge: float) -> torch.Tensor:
    """The change, shape (features, outputs), that leaves least missing under this ridge.

    Takes float64 moments, and overwrites `gram`. The ridge pulls towards no change, relative to
    each feature's own energy: without data nothing changes. NaN where it cannot be solved.
    """
    diagonal = gram.diagonal()
    floor = diagonal.mean().clamp_min(torch.finfo(torch.float64).tiny)
    diagonal += ridge * (diagonal + 1e-3 * floor)
    # Factored in place: as its own transpose, a symmetric matrix lies as LAPACK wants it.
    failed = torch.empty((), dtype=torch.int32, device=gram.device)
    factor, _ = torch.linalg.cholesky_ex(gram.mT, out=(gram.mT, failed))
    if failed.item():
        return torch.full_like(cross, torch.nan)
    half = torch.linalg.solve_triangular(factor, cross, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


@dataclass(frozen=True)
class Chosen:
    """A ridge, and the energy that is missing with it, each fold by what the others taught."""

    ridge: float
    error: float
    changes: Sequence[torch.Tensor] | None
    """Of each fold in float32, where the folds' moments are kept."""


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
        self._kept = list(self._gathered()) if self.keeps else []
        self._gram = torch.zeros(width, width, dtype=torch.float64, device=features.device)
        self._cross = torch.zeros(width, outputs, dtype=torch.float64, device=features.device)
        self.energy = 0.0
        """Of what is missing before any change."""
        for fold in self._moments():
            self._gram += fold.gram
            self._cross += fold.cross
            self.energy += fold.energy

    def solve(self, ridge: float) -> torch.Tensor:
        """The float64 change that all windows ask for."""
        return solve(self._gram.clone(), self._cross, ridge)

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
        if chosen.changes is None:
            changes = (change.float() for _, change in self._changes(chosen.ridge))
        else:
            changes = iter(chosen.changes)
        for fold, change in zip(self.folds, changes, strict=True):
            yield fold, self.features[fold].float() @ change

    def _tried(self, ridge: float) -> Chosen:
        error, changes = 0.0, []
        for fold, change in self._changes(ridge):
            error += fold.error(change)
            if self.keeps:
                changes.append(change.float())
        return Chosen(ridge, error, changes if self.keeps else None)

    def _changes(self, ridge: float) -> Iterator[tuple[Moments, torch.Tensor]]:
        """Each fold's moments, and the float64 change that all others ask for."""
        for fold in self._moments():
            yield fold, solve(self._gram - fold.gram, self._cross - fold.cross, ridge)

    def _moments(self) -> Iterator[Moments]:
        return iter(self._kept) if self.keeps else self._gathered()

    def _gathered(self) -> Iterator[Moments]:
        for fold in self.folds:
            yield Moments.of(self.features[fold], self.missing[fold], self.weights[fold])
