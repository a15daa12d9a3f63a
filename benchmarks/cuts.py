"""The rows of the table: cuts, and the methods that make them.

The engine's methods come from its registries, so a new importance or recovery gets its rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.baselines import BASELINES
from transact_core.experiments.bench import Choices
from transact_core.importance.scores import IMPORTANCES
from transact_core.models.architecture import Architecture
from transact_core.pruning.closed_form import RECOVERIES
from transact_core.pruning.plan import GRANULARITIES, Widths, widths

PUBLISHED = "TransAct as published"
DENSE = "dense"
KEEPS_KV_CACHE = ("query-heads",)
"""Granularities that do not change the KV cache under grouped-query attention."""
STEPS = 4
"""Steps of the rows that prune in several."""


@dataclass(frozen=True)
class Cut:
    name: str
    mha_ratio: float
    mlp_ratio: float
    narrows_kv_cache: bool = False

    @property
    def granularity(self) -> str:
        """The granularity that the baselines and the published method are compared at."""
        return "kv-groups" if self.narrows_kv_cache else "query-heads"

    def target(self, architecture: Architecture) -> Widths:
        """The widths that every method prunes to."""
        return widths(architecture, self.mha_ratio, self.mlp_ratio, self.granularity)


THIRD = 1 / 3
UNCUT = Cut("nothing", 0, 0)
CUTS = (
    Cut("20 % of the MLP", 0, 0.2),
    Cut("30 % of the MLP", 0, 0.3),
    Cut("50 % of the MLP", 0, 0.5),
    Cut("a third of the query heads", THIRD, 0),
    Cut("two thirds of the query heads", 2 * THIRD, 0),
    Cut("a third of the KV cache", THIRD, 0, narrows_kv_cache=True),
    Cut("a third of the query heads and 30 % of the MLP", THIRD, 0.3),
)
QUICK_CUTS = ("30 % of the MLP", "a third of the query heads", "a third of the KV cache")
QUICK_IMPORTANCES = ("activation", "reconstruction")


@dataclass(frozen=True)
class Row:
    """One cut by one method; `choices` is None if the method is not the engine's."""

    cut: Cut
    method: str
    choices: Choices | None = None

    @property
    def key(self) -> tuple[str, str]:
        return self.cut.name, self.method

    @property
    def name(self) -> str:
        return f"{self.cut.name}: {self.method}"


def rows(quick: bool = False) -> list[Row]:
    """Every row of the table, the dense model first; `quick` keeps a representative few."""
    found = [Row(UNCUT, DENSE)]
    for cut in CUTS:
        if quick and cut.name not in QUICK_CUTS:
            continue
        found.append(Row(cut, PUBLISHED))
        found += [Row(cut, name) for name, other in BASELINES.items() if other.offers(cut)]
        found += [
            Row(cut, _method(choices, cut), choices)
            for choices in _engine_choices(cut)
            if not quick or choices.importance in QUICK_IMPORTANCES
        ]
    return found


def _engine_choices(cut: Cut) -> Iterator[Choices]:
    """Each importance with each recovery, in each granularity that makes the cut.

    After them, with the best importance and recovery: sequential choices, `auto` and several steps.
    With least squares, `head-dims` does not depend on the importance and has one row.
    """
    for granularity in _granularities(cut):
        for importance in IMPORTANCES:
            for recovery in RECOVERIES:
                fitted = granularity == "head-dims" and recovery == "least-squares"
                if fitted and importance != "reconstruction":
                    continue
                yield Choices(granularity=granularity, importance=importance, recovery=recovery)
    best = Choices(cut.granularity, "reconstruction", "least-squares")
    yield replace(best, sequential=True)
    if cut.mha_ratio and not cut.narrows_kv_cache:
        yield replace(best, granularity="auto")
    if cut.mlp_ratio:
        yield replace(best, steps=STEPS)


def _granularities(cut: Cut) -> list[str]:
    if cut.narrows_kv_cache:
        return [name for name in GRANULARITIES if name not in KEEPS_KV_CACHE]
    return [cut.granularity]


def _method(choices: Choices, cut: Cut) -> str:
    words = [choices.importance, choices.recovery]
    if choices.granularity != "query-heads" and cut.mha_ratio:
        words.insert(0, choices.granularity)
    if choices.sequential:
        words.append("sequential")
    if choices.steps > 1:
        words.append(f"{choices.steps} steps")
    return f"ours: {', '.join(words)}"
