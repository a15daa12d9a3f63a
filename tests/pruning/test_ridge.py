import math

import pytest
import torch

from transact_core.pruning import ridge as ridge_module
from transact_core.pruning.ridge import Chosen, FoldedRidge, Moments, solve

WINDOWS, INPUTS, OUTPUTS = 6, 12, 5
FOLDS = torch.arange(WINDOWS).tensor_split(3)
RIDGES = (1e-9, 10.0)


@pytest.fixture
def data():
    """Features, what is missing, and the tokens' weights."""
    torch.manual_seed(0)
    x, y = torch.randn(WINDOWS, 50, INPUTS), torch.randn(WINDOWS, 50, OUTPUTS)
    return x, y, torch.rand(WINDOWS, 50) + 0.5


def rows(data, windows=slice(None)):
    """A row a token, its weight multiplied in, in float64."""
    x, y, weights = (each[windows].double() for each in data)
    root = weights.sqrt()[..., None]
    return (x * root).flatten(0, 1), (y * root).flatten(0, 1)


def reference(x, y, ridge):
    energy = x.square().sum(dim=0)
    damped = x.T @ x + ridge * torch.diag(energy + 1e-3 * energy.mean())
    return torch.linalg.solve(damped, x.T @ y)


def test_the_solution_is_that_of_weighted_least_squares(data):
    x, y = rows(data)
    change = FoldedRidge(*data, FOLDS).solve(1e-9).double()
    torch.testing.assert_close(change, torch.linalg.lstsq(x, y).solution, rtol=1e-4, atol=1e-5)


def test_a_ridge_counts_relative_to_each_features_energy(data):
    data = (data[0] * torch.logspace(-2, 2, INPUTS), *data[1:])
    expected = reference(*rows(data), 0.5).float()
    torch.testing.assert_close(FoldedRidge(*data, FOLDS).solve(0.5), expected, rtol=1e-4, atol=1e-9)


def test_a_strong_ridge_changes_nothing(data):
    assert FoldedRidge(*data, FOLDS).solve(1e12).abs().max() < 1e-9


def test_what_cannot_be_solved_is_nan():
    indefinite = torch.diag(torch.tensor([1.0, -3.0], dtype=torch.float64))
    assert solve(indefinite, torch.ones(2, 3, dtype=torch.float64), 0.0).isnan().all()


def test_moments_are_those_of_weighted_rows(data):
    x, y = rows(data)
    moments = Moments.none(INPUTS, OUTPUTS, x.device)
    moments.add(x.float(), y.float())
    torch.testing.assert_close(moments.gram.double(), x.T @ x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moments.cross.double(), x.T @ y, rtol=1e-4, atol=1e-4)
    moments.add(x.float(), y.float(), sign=-1)
    assert not moments.gram.any()
    assert not moments.cross.any()


def test_a_solution_is_the_same_however_many_outputs_are_solved_for_at_once(data, monkeypatch):
    fitted = FoldedRidge(*data, FOLDS)
    whole = fitted.solve(0.1), fitted.choose(RIDGES, 0).error
    monkeypatch.setattr("transact_core.pruning.ridge.ROWS_AT_ONCE", 2)
    torch.testing.assert_close(fitted.solve(0.1), whole[0], rtol=1e-6, atol=1e-9)
    assert fitted.choose(RIDGES, 0).error == pytest.approx(whole[1], rel=1e-6)


@pytest.mark.parametrize("kept_bytes", [0, 1 << 30])
def test_every_fold_is_judged_by_what_the_others_taught(data, kept_bytes):
    fitted = FoldedRidge(*data, FOLDS, kept_bytes)
    assert fitted.keeps == bool(kept_bytes)
    chosen = fitted.choose(RIDGES, 0)
    errors = dict.fromkeys(RIDGES, 0.0)
    corrections = list(fitted.corrections(chosen))
    for (fold, correction), expected_fold in zip(corrections, FOLDS, strict=True):
        assert fold is expected_fold
        others = [window for window in range(WINDOWS) if window not in fold]
        x, y = rows(data, fold)
        for ridge in RIDGES:
            change = reference(*rows(data, others), ridge)
            errors[ridge] += (y - x @ change).square().sum().item()
        torch.testing.assert_close(
            correction.double(), data[0][fold].double() @ change, rtol=1e-4, atol=1e-5
        )
    assert chosen.ridge == min(errors, key=errors.get) == RIDGES[-1]
    assert chosen.error == pytest.approx(errors[chosen.ridge], rel=1e-5)


def test_moments_that_are_gathered_anew_give_the_same_bits(data):
    kept, gathered = (FoldedRidge(*data, FOLDS, kept_bytes) for kept_bytes in (1 << 30, 0))
    assert torch.equal(kept.solve(0.1), gathered.solve(0.1))
    ours, others = (each.choose(RIDGES, 1) for each in (kept, gathered))
    assert (ours.ridge, ours.error) == (others.ridge, others.error)
    for (_, one), (_, other) in zip(
        kept.corrections(ours), gathered.corrections(others), strict=True
    ):
        assert torch.equal(one, other)


class Tried(FoldedRidge):
    """A search over errors that are given, in place of solved ones."""

    def __init__(self, errors):
        self.errors, self.solved, self.folds, self.keeps = errors, [], [None], False
        self.weights = self.missing = [torch.ones(1, 1, 1)]

    def _tried(self, ridge):
        self.solved.append(ridge)
        return Chosen(ridge, self.errors[ridge], None)


@pytest.mark.parametrize(
    ("errors", "start", "best"),
    [
        ([5.0, 4.0, 3.0, 2.0, 6.0], 1, 3),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 2, 0),
        ([math.inf, math.inf, math.inf, 7.0, 8.0], 1, 3),
        ([math.inf, 6.0, math.inf, math.inf, math.inf], 3, 1),
        ([math.inf] * 5, 2, 2),
    ],
)
def test_the_search_passes_over_what_cannot_be_solved_and_solves_nothing_twice(errors, start, best):
    search = Tried(errors)
    assert search.choose(range(5), start).ridge == best
    assert len(search.solved) == len(set(search.solved))


def test_a_ridge_that_cannot_be_solved_is_followed_by_one_that_can(data, monkeypatch):
    """The search begins at the one that cannot."""
    original = ridge_module.solve
    monkeypatch.setattr(
        ridge_module,
        "solve",
        lambda gram, cross, ridge: (
            cross.fill_(torch.nan) if ridge < 1 else original(gram, cross, ridge)
        ),
    )
    chosen = FoldedRidge(*data, FOLDS).choose((0.1, 10.0), 0)
    assert chosen.ridge == 10.0
    assert math.isfinite(chosen.error)
