import math

import pytest
import torch

from transact_core.pruning import ridge as ridge_module
from transact_core.pruning.ridge import Chosen, FoldedRidge

WINDOWS, INPUTS, OUTPUTS = 6, 12, 5
FOLDS = torch.arange(WINDOWS).tensor_split(3)
RIDGES = (1e-9, 10.0)
WAYS = {"a factorisation for each fold": True, "one factorisation": False}


@pytest.fixture
def data():
    """Features, what is missing, and the tokens' weights."""
    torch.manual_seed(0)
    x, y = torch.randn(WINDOWS, 50, INPUTS), torch.randn(WINDOWS, 50, OUTPUTS)
    return x, y, torch.rand(WINDOWS, 50) + 0.5


@pytest.fixture(params=WAYS)
def by_folds(request):
    return WAYS[request.param]


def rows(data, windows=slice(None)):
    """A row a token, its weight multiplied in, in float64."""
    x, y, weights = (each[windows].double() for each in data)
    root = weights.sqrt()[..., None]
    return (x * root).flatten(0, 1), (y * root).flatten(0, 1)


def reference(data, ridge, windows=slice(None), by_folds=True):
    """The change that is fitted on these windows.

    If not `by_folds`, they are taken to have the share of the energies that two of three folds have
    on average.
    """
    x, y = rows(data, windows)
    energy = x.square().sum(dim=0)
    if not by_folds:
        energy = rows(data)[0].square().sum(dim=0) * (1 - 1 / len(FOLDS))
    damped = x.T @ x + ridge * torch.diag(energy + 1e-3 * energy.mean())
    return torch.linalg.solve(damped, x.T @ y)


def left_over(data, ridge, by_folds):
    """What each window's missing output is left with, fold by fold; float64, with its energy."""
    left, total = data[1].double(), 0.0
    for fold in FOLDS:
        others = [window for window in range(WINDOWS) if window not in fold]
        change = reference(data, ridge, others, by_folds)
        left[fold] -= data[0][fold].double() @ change
        total += (left[fold].square() * data[2][fold][..., None]).sum().item()
    return left, total


def fitted(data, ridge, by_folds):
    folded = FoldedRidge(*data, FOLDS, by_folds)
    return folded.fit(folded.choose([ridge], 0))


def test_the_solution_is_that_of_weighted_least_squares(data, by_folds):
    expected = torch.linalg.lstsq(*rows(data)).solution.float()
    torch.testing.assert_close(fitted(data, 1e-9, by_folds).change, expected, rtol=1e-4, atol=1e-5)


def test_a_ridge_counts_relative_to_each_features_energy(data, by_folds):
    data = (data[0] * torch.logspace(-2, 2, INPUTS), *data[1:])
    expected = reference(data, 0.5, by_folds=by_folds).float()
    torch.testing.assert_close(fitted(data, 0.5, by_folds).change, expected, rtol=1e-4, atol=1e-7)


def test_a_strong_ridge_changes_nothing(data, by_folds):
    found = fitted(data, 1e12, by_folds)
    assert found.change.abs().max() < 1e-9
    torch.testing.assert_close(found.left, data[1])


def test_a_dead_feature_is_not_used(data, by_folds):
    data[0][..., 3] = 0
    found = fitted(data, 0.1, by_folds)
    assert not found.change[3].any()
    assert found.left.isfinite().all()


def test_features_without_any_energy_change_nothing(data, by_folds):
    found = fitted((torch.zeros_like(data[0]), *data[1:]), 0.1, by_folds)
    assert not found.change.any()
    torch.testing.assert_close(found.left, data[1])


def test_what_cannot_be_solved_is_not_chosen(data, by_folds):
    folded = FoldedRidge(*data, FOLDS, by_folds)
    chosen = folded.choose([-5.0], 0)
    assert chosen.error == math.inf
    found = folded.fit(chosen)
    assert math.isnan(found.error)
    assert found.change.isnan().all()


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 3.0])
def test_every_fold_is_left_with_what_the_others_could_not_teach(data, by_folds, ridge):
    left, total = left_over(data, ridge, by_folds)
    found = fitted(data, ridge, by_folds)
    torch.testing.assert_close(found.left, left.float(), rtol=1e-4, atol=1e-4)
    assert found.error == pytest.approx(total, rel=1e-5)
    torch.testing.assert_close(
        found.change, reference(data, ridge, by_folds=by_folds).float(), rtol=1e-4, atol=1e-5
    )


def test_the_error_that_decides_is_the_one_that_is_told(data, by_folds):
    folded = FoldedRidge(*data, FOLDS, by_folds)
    chosen = folded.choose(RIDGES, 0)
    errors = {ridge: left_over(data, ridge, by_folds)[1] for ridge in RIDGES}
    assert chosen.ridge == min(errors, key=errors.get) == RIDGES[-1]
    assert chosen.error == pytest.approx(errors[chosen.ridge], rel=1e-5)
    assert folded.fit(chosen).error == pytest.approx(chosen.error, rel=1e-5)


def test_ridges_are_compared_on_some_folds_and_told_on_all(data, by_folds, monkeypatch):
    monkeypatch.setattr(ridge_module, "COMPARED_TOKENS", 100)
    folded = FoldedRidge(*data, FOLDS, by_folds)
    assert folded.compared == [0, 1]
    chosen = folded.choose(RIDGES, 0)
    left, total = left_over(data, chosen.ridge, by_folds)
    squares = left.square() * data[2][..., None]
    assert chosen.error == pytest.approx(squares[:4].sum().item(), rel=1e-5)
    found = folded.fit(chosen)
    assert found.error == pytest.approx(total, rel=1e-5)
    torch.testing.assert_close(found.left, left.float(), rtol=1e-4, atol=1e-4)


def test_more_features_than_tokens_of_a_fold_are_fitted_at_once(data):
    assert FoldedRidge(*data, FOLDS).by_folds
    wide = torch.randn(WINDOWS, 50, 101)
    folded = FoldedRidge(wide, *data[1:], FOLDS)
    assert not folded.by_folds
    one, other = (fitted((wide, *data[1:]), 0.3, by_folds) for by_folds in (True, False))
    # They differ by how a feature's energy differs from fold to fold.
    assert one.error == pytest.approx(other.error, rel=5e-3)


def test_folds_of_the_same_energies_are_left_with_the_same_either_way(data):
    """Each fold holds the features of the first, with other signs."""
    signs = torch.tensor([1.0, -1.0, 1.0])[:, None, None, None]
    x = (data[0][:2] * signs).flatten(0, 1)
    weights = data[2][:2].repeat(3, 1)
    one, other = (fitted((x, data[1], weights), 0.3, by_folds) for by_folds in (True, False))
    torch.testing.assert_close(one.left, other.left, rtol=1e-4, atol=1e-4)
    assert one.error == pytest.approx(other.error, rel=1e-5)


def test_many_outputs_are_compared_by_combinations_and_told_as_they_are(
    data, by_folds, monkeypatch
):
    monkeypatch.setattr(ridge_module, "JUDGED_OUTPUTS", 40)
    torch.manual_seed(1)
    x, weights = data[0], data[2]
    y = x @ torch.randn(INPUTS, 160) + 4 * torch.randn(WINDOWS, 50, 160)
    folded = FoldedRidge(x, y, weights, FOLDS, by_folds)
    ridges = [0.01, 0.1, 1.0, 10.0]
    errors = [left_over((x, y, weights), ridge, by_folds)[1] for ridge in ridges]
    chosen = folded.choose(ridges, 2)
    # 0.01 and 0.1 are equal but for a thousandth.
    assert chosen.ridge < 1
    told = errors[ridges.index(chosen.ridge)]
    assert chosen.error == pytest.approx(told, rel=0.05)
    assert folded.fit(chosen).error == pytest.approx(told, rel=1e-5)


class Tried(FoldedRidge):
    """A search over errors that are given, in place of solved ones."""

    def __init__(self, errors):
        self.errors, self.solved = errors, []

    def _tried(self, ridge):
        self.solved.append(ridge)
        return Chosen(ridge, self.errors[ridge])


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


def test_a_ridge_that_cannot_be_solved_is_followed_by_one_that_can(data, by_folds):
    """The search begins at the one that cannot."""
    chosen = FoldedRidge(*data, FOLDS, by_folds).choose((-5.0, 10.0), 0)
    assert chosen.ridge == 10.0
    assert math.isfinite(chosen.error)
