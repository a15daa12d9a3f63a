"""Sizes and perplexities of a cut in words, the same on every page and in the report."""

import math
from typing import Protocol

SIZES = (
    ("Parameters (M)", "parameters", 1e6, 1),
    ("Weights (MB)", "weight_bytes", 1e6, 1),
    ("KV cache per token (kB)", "kv_bytes_per_token", 1e3, 1),
    ("FLOPs per token (M)", "flops_per_token", 1e6, 0),
    ("MHA width", "mha_width", 1, 0),
    ("MLP width", "mlp_width", 1, 0),
)
"""Label, field of `Footprint`, what its value is divided by, and decimals."""


class Compared(Protocol):
    """A measurement as far as its loss is compared with the dense model's, in nats a token."""

    delta_nll: float
    delta_nll_se: float


def times_dense(point: Compared) -> str:
    """The perplexity over the dense model's, with its 95 % interval where it has one."""
    times = f"{math.exp(point.delta_nll):.3f} ×"
    if math.isnan(point.delta_nll_se):
        return times
    low, high = (math.exp(point.delta_nll + side * 1.96 * point.delta_nll_se) for side in (-1, 1))
    return f"{times} (95 % interval {low:.3f} to {high:.3f})"
