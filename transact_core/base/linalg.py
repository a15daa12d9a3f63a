"""Linear algebra that several rooms share: float64, token weights, second moments, Cholesky."""

import math
from collections.abc import Iterable
from itertools import pairwise

import torch

GRAM_BLOCKS = 6
"""Blocks in which the columns of a Gram matrix are multiplied out; more of them save more of the
lower triangle, and make smaller and less efficient products."""
GRAM_BLOCK = 1024
"""Columns of a block where there would be more than that: products of this size are efficient."""
SOLVED_AT_ONCE = 256
"""Rows of a triangular matrix that are factorised or solved for before the rest is updated."""
FLOAT64_DEVICES = ("cpu", "cuda")
"""Device types that compute in float64. Apple's GPUs ("mps") do not, and others may not."""


def in_float64(values: torch.Tensor) -> torch.Tensor:
    """The values in float64: on their own device where it has float64, on the CPU otherwise.

    What is computed from them is then where they are; `.to(device)` brings it back once it is in
    float32. Values that are float64 already are given as they are, not copied.
    """
    if values.device.type not in FLOAT64_DEVICES:
        # Moved first: the device could not even convert them.
        values = values.cpu()
    return values.double()


def inverse_rms(residual: torch.Tensor, eps: float) -> torch.Tensor:
    """One over the root mean square of the residual stream, shape (…, 1), float32.

    `residual` has shape (…, hidden_size), and `eps` is the RMSNorm's. Tokens are weighted by it, so
    that a few of enormous norm do not decide alone: in an elimination it multiplies their rows, in
    a repair their squared errors.
    """
    return (residual.float().square().mean(dim=-1, keepdim=True) + eps).rsqrt()


@torch.no_grad()
def second_moments(rows: Iterable[torch.Tensor], width: int) -> torch.Tensor:
    """`XᵀX` of all the rows, shape (width, width), float32, on the device of the rows.

    `rows` gives matrices of shape (tokens, width) one after the other. Only the upper block
    triangle is multiplied out, which saves nearly half of the work; the rest is its mirror.
    """
    gram: torch.Tensor | None = None
    blocks = _blocks(width)
    for batch in rows:
        x = batch.float()
        if gram is None:
            gram = torch.zeros(width, width, device=x.device)
        for start, end in blocks:
            gram[start:end, start:].addmm_(x[:, start:end].T, x[:, start:])
    if gram is None:
        return torch.zeros(width, width)
    for start, end in blocks:
        gram[end:, start:end] = gram[start:end, end:].T
    return gram


def _blocks(width: int) -> list[tuple[int, int]]:
    """Where the blocks of a Gram matrix's columns begin and end."""
    count = max(GRAM_BLOCKS, math.ceil(width / GRAM_BLOCK))
    edges = [width * block // count for block in range(count + 1)]
    return [(start, end) for start, end in pairwise(edges) if start < end]


def factored_in_place(symmetric: torch.Tensor) -> torch.Tensor:
    """The lower Cholesky factor, in the memory of the matrix; its upper triangle is not cleared.

    A block of columns at a time, so that nearly all of the work is in matrix products, which do
    more in a second than factorisations and triangular solves.

    Raises:
        LinAlgError: the matrix is not positive definite.
    """
    for start in range(0, len(symmetric), SOLVED_AT_ONCE):
        end = start + SOLVED_AT_ONCE
        block, below = symmetric[start:end, start:end], symmetric[end:, start:end]
        before = symmetric[start:end, :start]
        block.addmm_(before, before.T, alpha=-1)
        block.copy_(torch.linalg.cholesky(block))
        if len(below):
            below.addmm_(symmetric[end:, :start], before.T, alpha=-1)
            below.copy_(below @ _inverse(block).T)
    return symmetric


def solve_lower(factor: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`L⁻¹ right` for a lower triangular L, shape (width, outputs), in the memory of `right`.

    Only the lower triangle of `factor` is looked at. In blocks, as `factored_in_place`.
    """
    for start in range(0, len(right), SOLVED_AT_ONCE):
        end = start + SOLVED_AT_ONCE
        block = right[start:end]
        block.addmm_(factor[start:end, :start], right[:start], alpha=-1)
        block.copy_(_inverse(factor[start:end, start:end]) @ block)
    return right


def solve_factored(factor: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Solves a positive definite system whose lower Cholesky factor is given.

    `right` has shape (width, outputs) and is overwritten by the solution.
    """
    solve_lower(factor, right)
    for start in reversed(range(0, len(right), SOLVED_AT_ONCE)):
        end = start + SOLVED_AT_ONCE
        block = right[start:end]
        block.addmm_(factor[end:, start:end].T, right[end:], alpha=-1)
        block.copy_(_inverse(factor[start:end, start:end]).T @ block)
    return right


def _inverse(triangle: torch.Tensor) -> torch.Tensor:
    """The inverse of a small lower triangular matrix."""
    one = torch.eye(len(triangle), dtype=triangle.dtype, device=triangle.device)
    return torch.linalg.solve_triangular(triangle, one, upper=False)
