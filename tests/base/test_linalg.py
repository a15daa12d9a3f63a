import pytest
import torch

from transact_core.base import linalg
from transact_core.base.linalg import (
    factored_in_place,
    second_moments,
    solve_factored,
    solve_lower,
)

SIZES = (1, 5, 7, 30)
"""Widths of one block, of several, and of several that do not end where the matrix does."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(linalg, "SOLVED_AT_ONCE", 5)
    monkeypatch.setattr(linalg, "GRAM_BLOCK", 4)


def positive(width: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    rows = torch.randn(2 * width, width, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return rows.T @ rows + 0.1 * torch.eye(width, dtype=dtype)


@pytest.mark.parametrize("width", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_factor_in_place_is_the_cholesky_factor(width, dtype):
    matrix = positive(width, dtype)
    given = matrix.clone()
    factor = factored_in_place(given)
    assert factor.data_ptr() == given.data_ptr()
    torch.testing.assert_close(factor.tril(), torch.linalg.cholesky(matrix))


@pytest.mark.parametrize("wrong", [-1.0, torch.nan])
@pytest.mark.parametrize("place", [0, 29])
def test_what_is_not_positive_definite_is_refused(wrong, place):
    matrix = positive(30)
    matrix[place, place] = wrong
    with pytest.raises(torch.linalg.LinAlgError):
        factored_in_place(matrix)


@pytest.mark.parametrize("width", SIZES)
def test_systems_are_solved_in_the_memory_of_their_right_sides(width):
    matrix = positive(width)
    # The upper triangle must not be looked at.
    factor = torch.linalg.cholesky(matrix) + torch.full((width, width), torch.nan).triu(1)
    right = torch.randn(width, 3, dtype=torch.float64)
    half, whole, columns = right.clone(), right.clone(), right.T.contiguous().T
    assert solve_lower(factor, half).data_ptr() == half.data_ptr()
    torch.testing.assert_close(factor.tril().nan_to_num() @ half, right)
    assert solve_factored(factor, whole).data_ptr() == whole.data_ptr()
    torch.testing.assert_close(matrix @ whole, right)
    torch.testing.assert_close(solve_factored(factor, columns), whole)


@pytest.mark.parametrize("width", SIZES)
def test_second_moments_are_those_of_all_rows(width):
    rows = torch.randn(9, width, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(second_moments([rows[:4], rows[4:]], width), rows.T @ rows)
    assert not second_moments([], width).any()
