"""Rotary frequencies of narrower heads, in the notation that stock transformers reads exactly."""

import torch
from transformers import PreTrainedConfig

from transact_core.base.errors import TransActError
from transact_core.models.families.description import rotary_parameters, sliding_window
from transact_core.models.families.table import family_of

EXACT_KINDS = ("default", "llama3", "linear", "yarn")
"""Kinds of rotary frequencies that do not depend on the length of the text, so that a subset of
them can be written out exactly."""


def require_narrowable(config: PreTrainedConfig, sequence_length: int = 0) -> None:
    """Refuses the granularity `head-dims` where narrower heads cannot be had or not be fitted.

    `sequence_length` is that of the windows that they are fitted on.

    Raises:
        TransActError: the family's attention depends on head_dim in a way that a cut would change,
            or rotary frequencies change with the length of the text; the sentence says which.
    """
    family, window = family_of(config.model_type), sliding_window(config)
    reason = None
    if family.head_norms:
        reason = (
            f"{family.title} normalises the queries and keys of each head over all of its dims, "
            "and fewer dims would change that norm"
        )
    elif not {"q_proj", "k_proj", "v_proj"} <= family.attention_inputs.keys():
        reason = f"{family.title} keeps queries, keys and values in one matrix"
    elif not all(family.rotates(config, layer) for layer in range(config.num_hidden_layers)):
        reason = (
            f"some layers of this {family.title} model have no rotary embedding, so that there are "
            "no rotary pairs to choose from"
        )
    elif window is not None and window < sequence_length:
        reason = (
            f"narrower heads are fitted on whole windows of {sequence_length} tokens, and this "
            f"model's attention reaches back {window} only"
        )
    elif not all(map(_is_exact, rotary_parameters(config))):
        kind = config.rope_parameters["rope_type"]
        reason = (
            "it needs rotary frequencies that do not depend on the length of the text, and this "
            f"model's are of the kind {kind!r}"
        )
    if reason:
        raise TransActError(
            f"The granularity head-dims cannot be had here: {reason}; choose query-heads or "
            "kv-groups."
        )


def _is_exact(parameters: dict[str, object]) -> bool:
    kind = parameters.get("rope_type", "default")
    same = kind == "longrope" and parameters["short_factor"] == parameters["long_factor"]
    return kind in EXACT_KINDS or same


def narrowed_rope(
    config: PreTrainedConfig, inv_freq: torch.Tensor, attention_scaling: float
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
