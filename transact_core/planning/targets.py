"""From a target size or perplexity to the pair of slider positions that meets it best."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Literal

from transact_core.base.errors import TransActError
from transact_core.models.footprint import CONTEXT_LENGTH
from transact_core.planning.law import Ratio
from transact_core.planning.preview import EnergyKept, Structure

Goal = Literal["parameters", "flops", "kv-cache", "file", "perplexity"]

Prediction = Mapping[tuple[int, int], Ratio]
"""By the transitional widths (MHA, MLP)."""


@dataclass(frozen=True)
class Target:
    goal: Goal
    at_most: float
    """Parameters, FLOPs a token and bytes of a file as numbers; the KV cache and perplexity as
    multiples of the dense model's."""
    context: int = CONTEXT_LENGTH
    """Tokens of context that FLOPs are counted at."""


@dataclass(frozen=True)
class Found:
    mha_position: int
    """Both in per cent of the width removed."""
    mlp_position: int
    meeting: int
    """Number of pairs of widths that meet the target."""
    of: int
    """Number of pairs of widths in all."""
    why: str
    """Why this pair was taken among those that meet the target, in words."""


def find(
    target: Target,
    table: Structure,
    prediction: Prediction | None = None,
    energy: EnergyKept | None = None,
    file_bytes: Mapping[tuple[int, int], int] | None = None,
) -> Found:
    """Searches all pairs of widths that the sliders can take.

    For the goal "file", `file_bytes` is what a file weighs by the transitional widths (MHA, MLP),
    as `export.gguf_points.bytes_by_widths` has it; a pair that it lacks cannot be written.

    Among the pairs that meet a size, the one with the lowest predicted perplexity is taken; without
    a prediction the one that keeps the most activation energy, and without scores the one with the
    most parameters. Among the pairs that meet a perplexity, the one with the fewest parameters is.

    Raises:
        TransActError: no pair meets the target, or there is no prediction to look for one by.
    """
    if target.goal == "perplexity" and not prediction:
        raise TransActError("No perplexity is predicted yet: measure a point, then ask again.")
    pairs = list(product(range(len(table.mha.options)), range(len(table.mlp.options))))
    if target.goal == "file":
        pairs = [pair for pair in pairs if _widths(table, pair) in (file_bytes or {})]
        if not pairs:
            raise TransActError("No cut of this model can be written as such a file.")
        sizes = {pair: float(file_bytes[_widths(table, pair)]) for pair in pairs}
    else:
        sizes = {pair: _size(target, table, pair, prediction) for pair in pairs}
    meeting = [pair for pair in pairs if sizes[pair] <= target.at_most]
    if not meeting:
        least = min(sizes.values())
        raise TransActError(
            f"No position of the sliders comes down to {_in_words(target.goal, target.at_most)}; "
            f"the least there is {_in_words(target.goal, least)}."
        )

    def predicted(pair: tuple[int, int]) -> float:
        interval = prediction.get(_widths(table, pair))
        return interval.mid if interval else float("inf")

    def parameters(pair: tuple[int, int]) -> int:
        return table.cost(*pair).parameters

    if target.goal == "perplexity":
        best = min(meeting, key=lambda pair: (parameters(pair), predicted(pair)))
        why = "it has the fewest parameters"
    elif prediction:
        best = min(meeting, key=lambda pair: (predicted(pair), parameters(pair)))
        why = "its predicted perplexity is the lowest"
    elif energy is not None:
        best = max(meeting, key=lambda pair: (energy.mean(*pair), parameters(pair)))
        why = "it keeps the most activation energy, on the mean over layers, MHA and MLP"
    else:
        best = max(meeting, key=parameters)
        why = "it keeps the most parameters"
    mha, mlp = best
    return Found(
        table.mha.position_of(mha), table.mlp.position_of(mlp), len(meeting), len(pairs), why
    )


def _widths(table: Structure, pair: tuple[int, int]) -> tuple[int, int]:
    return table.mha.options[pair[0]].width, table.mlp.options[pair[1]].width


def _size(
    target: Target, table: Structure, pair: tuple[int, int], prediction: Prediction | None
) -> float:
    cost = table.cost(*pair)
    if target.goal == "parameters":
        return cost.parameters
    if target.goal == "flops":
        return cost.flops + cost.flops_per_context * target.context
    if target.goal == "kv-cache":
        return cost.kv_values / table.dense.kv_values
    interval = prediction.get(_widths(table, pair))
    return interval.mid if interval else float("inf")


def _in_words(goal: Goal, size: float) -> str:
    if goal == "parameters":
        return f"{size / 1e6:,.1f} M parameters"
    if goal == "flops":
        return f"{size / 1e6:,.1f} million FLOPs a token"
    if goal == "kv-cache":
        return f"{size:.0%} of the KV cache"
    if goal == "file":
        return f"a file of {size / 1e6:,.1f} MB"
    return f"{size:.2f} times the dense model's perplexity"
