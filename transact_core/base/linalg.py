"""Linear algebra that several rooms share: token weights, second moments, Cholesky in place."""

from collections.abc import Iterable
from itertools import pairwise

import torch

GRAM_BLOCKS = 6


def inverse_rms(residual: torch.Tensor, eps: float) -> torch.Tensor:
    """One over the root mean square of the stream, shape (…, 1), float32; `eps` is the RMSNorm's.

    What tokens are weighted by, so that a few of enormous norm do not decide alone: by an
    elimination their rows, by a repair their squared errors.
    """
    return (residual.float().square().mean(dim=-1, keepdim=True) + eps).rsqrt()


@torch.no_grad()
def second_moments(rows: Iterable[torch.Tensor], width: int) -> torch.Tensor:
    """`XᵀX` of all the rows, shape (width, width), float32, on the device of the rows.

    `rows` gives matrices of shape (tokens, width) one after the other. Only the upper block
    triangle is multiplied out, which saves nearly half of the work; the rest is its mirror.
    """
    gram: torch.Tensor | None = None
    edges = [width * block // GRAM_BLOCKS for block in range(GRAM_BLOCKS + 1)]
    blocks = [(start, end) for start, end in pairwise(edges) if start < end]
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


def factored_in_place(symmetric: torch.Tensor) -> torch.Tensor:
    """The lower Cholesky factor, in the memory of the matrix; what is above it is left over.

    Raises:
        LinAlgError: the matrix is not positive definite.
    """
    # As its own transpose, a symmetric matrix lies as LAPACK wants it.
    failed = torch.empty((), dtype=torch.int32, device=symmetric.device)
    factor, _ = torch.linalg.cholesky_ex(symmetric.mT, out=(symmetric.mT, failed))
    if failed.item():
        raise torch.linalg.LinAlgError("not positive definite")
    return factor
