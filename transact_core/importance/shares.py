"""Scores as shares of a layer's best, which is how charts show them. NumPy alone: no model."""

import numpy as np


def relative(scores: np.ndarray) -> np.ndarray:
    """Scores of shape (layers, units) as shares of their layer's best, clipped to [0, 1].

    A layer without a score above 0 has shares of 0.
    """
    best = scores.max(axis=1, keepdims=True)
    return np.clip(np.divide(scores, best, out=np.zeros_like(scores), where=best > 0), 0, 1)


def are_positions(scores: np.ndarray) -> bool:
    """Whether the scores of each layer, shape (layers, units), are an order and no sizes.

    An order is the numbers 0 to units - 1, each once.
    """
    return np.array_equal(
        np.sort(scores, axis=1), np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    )
