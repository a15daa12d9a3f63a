"""Rotary frequencies of narrower heads, in the notation that stock transformers reads exactly."""

import torch
from transformers import LlamaConfig

from transact_core.base.errors import TransActError

EXACT_KINDS = ("default", "llama3", "linear", "yarn")
"""Kinds of rotary frequencies that do not depend on the length of the text, so that a subset of
them can be written out exactly."""


def require_exact_rope(config: LlamaConfig) -> None:
    """Refuses rotary embeddings whose frequencies a narrower stock model cannot keep exactly.

    Raises:
        TransActError: frequencies that change with the length of the text.
    """
    parameters = config.rope_parameters
    kind = parameters.get("rope_type", "default")
    same = kind == "longrope" and parameters["short_factor"] == parameters["long_factor"]
    if kind not in EXACT_KINDS and not same:
        raise TransActError(
            f"The granularity head-dims needs rotary frequencies that do not depend on the length "
            f"of the text, and this model's are of the kind {kind!r}; choose query-heads or "
            "kv-groups."
        )


def narrowed_rope(
    config: LlamaConfig, inv_freq: torch.Tensor, attention_scaling: float
) -> dict[str, object]:
    """`rope_parameters` that give a stock model these frequencies, exactly.

    `inv_freq` has shape (pairs,), the frequencies to keep in radians for each token, and
    `attention_scaling` is the dense model's. The kind `longrope` divides the default frequencies by
    factors that can be chosen freely; with the same factors for short and long texts nothing
    depends on the length.
    """
    theta = config.rope_parameters["rope_theta"]
    pairs = len(inv_freq)
    default = theta ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    factors = (default / inv_freq.cpu().double()).tolist()
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "short_factor": factors,
        "long_factor": factors,
        "attention_factor": float(attention_scaling),
        "factor": 1.0,
        "original_max_position_embeddings": config.max_position_embeddings,
    }
