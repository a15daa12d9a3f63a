"""Statistics to a score for each attention head and each MLP channel; low scores are cut first.

An importance is a function of the statistics, registered by one decorator line:

    @register("name")
    def name(statistics: ActivationStatistics, architecture: Architecture) -> Scores: ...
"""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch

from transact_core.activations import ActivationStatistics
from transact_core.architecture import Architecture
from transact_core.errors import TransActError


@dataclass(frozen=True)
class Scores:
    """Float64 on the CPU; comparable inside a layer and module, not across them."""

    heads: torch.Tensor
    """Shape (layers, num_attention_heads)."""
    head_channels: torch.Tensor
    """Of the attention's channels, shape (layers, num_attention_heads × head_dim)."""
    channels: torch.Tensor
    """Of the MLP's channels, shape (layers, intermediate_size)."""

    def to_frame(self, importance: str) -> pd.DataFrame:
        """One row a unit: layer, module, unit (head or channel), index, importance, score."""
        blocks = (
            ("mha", "head", self.heads),
            ("mha", "channel", self.head_channels),
            ("mlp", "channel", self.channels),
        )
        frames = []
        for module, unit, scores in blocks:
            layers, width = scores.shape
            frames.append(
                pd.DataFrame(
                    {
                        "layer": torch.arange(layers).repeat_interleave(width).numpy(),
                        "module": module,
                        "unit": unit,
                        "index": torch.arange(width).repeat(layers).numpy(),
                        "importance": importance,
                        "score": scores.flatten().numpy(),
                    }
                )
            )
        return pd.concat(frames, ignore_index=True)


Importance = Callable[[ActivationStatistics, Architecture], Scores]
IMPORTANCES: dict[str, Importance] = {}


def register(name: str) -> Callable[[Importance], Importance]:
    def add(function: Importance) -> Importance:
        IMPORTANCES[name] = function
        return function

    return add


def score(importance: str, statistics: ActivationStatistics, architecture: Architecture) -> Scores:
    """Scores by the registered importance of that name.

    Raises:
        TransActError: no importance has that name.
    """
    if importance not in IMPORTANCES:
        raise TransActError(
            f"The importance {importance!r} is not known; choose {', '.join(IMPORTANCES)}."
        )
    return IMPORTANCES[importance](statistics, architecture)


def head_scores(channel_scores: torch.Tensor, head_dim: int) -> torch.Tensor:
    """`mean(s) + (10 / head_dim) · max(s)` over each head's channels.

    Takes (layers, heads × head_dim), gives (layers, heads). Source: TransAct, head importance.
    """
    per_head = channel_scores.unflatten(-1, (-1, head_dim))
    return per_head.mean(dim=-1) + 10 / head_dim * per_head.amax(dim=-1)


@register("activation")
def activation(statistics: ActivationStatistics, architecture: Architecture) -> Scores:
    """TransAct's score: `s_j = sqrt(Σ_tokens a_j²)` of the transitional activation.

    Source: Shen et al. 2024 (arXiv 2407.05690), transitional activation magnitude.
    """
    norms = statistics.mha.norm
    return Scores(
        heads=head_scores(norms, architecture.head_dim),
        head_channels=norms,
        channels=statistics.mlp.norm,
    )
