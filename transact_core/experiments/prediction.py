"""Predicted perplexity at every position of the two sliders, with an interval, and its score.

    bench.damage(choices, progress)              # once for an importance; over a second, so a job
    points = [Point.of(measurement, choices), ...]
    predict_grid(bench, choices, points)         # {(mha width, mlp width): Ratio(low, mid, high)}
    next_points(bench, choices, points, count=5) # where to measure next, the most telling first
    keep_score(bench, points)                    # what was said of each point before it came

`predict_grid` takes milliseconds once `bench.damage_known(choices)`. A `Ratio` is of perplexity
over the dense model's on the bench's evaluation text; the interval is meant to hold what would be
*measured* there nine times in ten. What another text would give, it does not say.

The law itself, from damage to loss, is `planning.law`.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from transact_core.experiments.bench import Bench, Choices, Measurement
from transact_core.planning.damage import Damage
from transact_core.planning.law import MOST, Fit, Ratio, _far

SIDE = 96
"""Positions along each side of the largest grid."""
USEFUL = 2.0
"""Perplexity over the dense model's up to which points are worth measuring."""
FAIR_CHANCE = 0.2
"""Of being useful, which a point must have to be named as the next."""
CANDIDATES = 24
"""Positions along each side among which the next points are chosen."""


@dataclass(frozen=True)
class Point:
    """One measured point: where it is, and what was measured."""

    choices: Choices
    mha_width: int
    mlp_width: int
    delta_nll: float
    """Mean per-token difference of NLL from the dense model, in nats."""
    delta_nll_se: float = math.nan
    """Its standard error, NaN where it is not known."""

    @classmethod
    def of(cls, measurement: Measurement, choices: Choices) -> "Point":
        cost = measurement.footprint
        return cls(
            choices,
            cost.mha_width,
            cost.mlp_width,
            measurement.delta_nll,
            measurement.delta_nll_se,
        )


@dataclass(frozen=True)
class Scored:
    """What was said of a point before it was measured, and how it came out."""

    point: Point
    said: Ratio
    measured: float
    """Perplexity over the dense model's."""

    @property
    def relative_error(self) -> float:
        """Of the predicted perplexity, positive where it was too high."""
        return self.said.mid / self.measured - 1

    @property
    def inside(self) -> bool:
        return self.said.low <= self.measured <= self.said.high


def predict_grid(
    bench: Bench,
    choices: Choices,
    points: Iterable[Point],
    mha_widths: Sequence[int] | None = None,
    mlp_widths: Sequence[int] | None = None,
) -> dict[tuple[int, int], Ratio]:
    """The ratio at every pair of these widths; by default all attention widths and 96 MLP widths.

    Measures the damage where it is not known; widths that it does not cover are left out. `points`
    may hold other choices of the same bench; those whose damage is not known are left out. `mid`
    and `high` never fall where a width does; at the dense widths all three are 1.
    """
    damage = bench.damage(choices)
    mha, mlp = (
        sorted(filter(curve.covers, widths), reverse=True)
        for curve, widths in (
            (damage.mha, mha_widths or _mha_widths(bench, choices, SIDE)),
            (damage.mlp, mlp_widths or _evenly(damage.mlp.widths.tolist(), SIDE)),
        )
    )
    low, mid, high = fitted(bench, points).predict(
        _group(choices), damage.mha.at(mha)[:, None], damage.mlp.at(mlp)[None]
    )
    # Of neighbours the smooth departure may leave the narrower one a little lower.
    mid, high = (_rising(_rising(each, 0), 1) for each in (mid, high))
    low, mid, high = (np.exp(np.minimum(each, MOST)).tolist() for each in (low, mid, high))
    return {
        (mha_width, mlp_width): Ratio(low[row][column], mid[row][column], high[row][column])
        for row, mha_width in enumerate(mha)
        for column, mlp_width in enumerate(mlp)
    }


def keep_score(bench: Bench, points: Sequence[Point]) -> list[Scored]:
    """What the predictor, fitted on the points before each, said of it; in the order measured.

    Points whose damage is not known are left out.
    """
    known = with_known_damage(bench, points)
    scored = []
    for number, (point, damage) in enumerate(known):
        said = _fit(known[:number]).predict(
            _group(point.choices),
            damage.mha.at([point.mha_width]),
            damage.mlp.at([point.mlp_width]),
        )
        ratio = Ratio(*(math.exp(min(each.item(), MOST)) for each in said))
        scored.append(Scored(point, ratio, math.exp(min(point.delta_nll, MOST))))
    return scored


def with_known_damage(bench: Bench, points: Iterable[Point]) -> list[tuple[Point, Damage]]:
    """The points that can be learnt from without measuring what layers lose at their widths."""
    points = list(points)
    damages = {
        choices: bench.damage(choices)
        for choices in {point.choices for point in points}
        if bench.damage_known(choices)
    }
    return [
        (point, damage)
        for point in points
        if (damage := damages.get(point.choices))
        and damage.mha.covers(point.mha_width)
        and damage.mlp.covers(point.mlp_width)
    ]


def next_points(
    bench: Bench,
    choices: Choices,
    points: Iterable[Point],
    count: int = 1,
    limit: float = USEFUL,
) -> list[tuple[int, int]]:
    """Where measuring would tell most: (mha width, mlp width), the most telling first.

    One after the other, the position whose measurement takes most off the variance of Δ summed over
    all positions, each counted as far as it is likely to cost at most `limit` times the dense
    perplexity. Only such are named as have a fair chance of that: fewer than `count` where there
    are no more of them.
    """
    damage, points = bench.damage(choices), list(points)
    mha = _mha_widths(bench, choices, CANDIDATES)
    mlp = _evenly(damage.mlp.widths.tolist(), CANDIDATES)
    m, p = (each.ravel() for each in np.meshgrid(damage.mha.at(mha), damage.mlp.at(mlp)))
    places = [(mha_width, mlp_width) for mlp_width in mlp for mha_width in mha]
    fit, group = fitted(bench, points), _group(choices)
    cut = (m > 0) | (p > 0)
    m, p = m[cut], p[cut]
    places = [place for place, taken in zip(places, cut, strict=True) if taken]
    _, mid, _ = fit.predict(group, m, p)
    covariance = fit.covariance(group, m, p)
    chance = _chance_below(limit, mid, np.sqrt(np.maximum(covariance.diagonal(), 0)))
    # In nats, where 5 % of perplexity are the same everywhere.
    weight = chance * np.minimum(mid, math.log(limit))
    covariance = covariance * np.outer(weight, weight)
    noise = (weight * np.hypot(fit.noise(group, mid) / mid, _far(mid))) ** 2
    measured = {(point.mha_width, point.mlp_width) for point in points if point.choices == choices}
    free = (chance >= FAIR_CHANCE) & np.array([place not in measured for place in places])
    chosen = []
    while len(chosen) < count and free.any():
        total = np.maximum(covariance.diagonal() + noise, np.finfo(float).tiny)
        gain = (covariance**2).sum(axis=0) / total
        best = int(np.where(free, gain, -1).argmax())
        chosen.append(places[best])
        free[best] = False
        column = covariance[:, best]
        covariance = covariance - np.outer(column, column) / total[best]
    return chosen


def _chance_below(limit: float, mid: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Of perplexity at most `limit` times the dense one, Δ being log-normal about `mid`."""
    if limit <= 1:
        return np.zeros(len(mid))
    away = (math.log(math.log(limit)) - np.log(mid)) / np.maximum(spread, 1e-9)
    return np.array([(1 + math.erf(each / math.sqrt(2))) / 2 for each in away])


def fitted(bench: Bench, points: Iterable[Point]) -> "Fit":
    """The predictor that has seen these points, as far as their damage is known."""
    return _fit(with_known_damage(bench, points))


def _fit(known: Iterable[tuple[Point, Damage]]) -> "Fit":
    rows = [
        (_group(point.choices), point, damage)
        for point, damage in known
        if math.isfinite(point.delta_nll)
    ]
    return Fit(
        [group for group, _, _ in rows],
        np.array([damage.mha.at([point.mha_width])[0] for _, point, damage in rows]),
        np.array([damage.mlp.at([point.mlp_width])[0] for _, point, damage in rows]),
        np.array([point.delta_nll for _, point, _ in rows]),
        np.array([point.delta_nll_se for _, point, _ in rows]),
    )


def _group(choices: Choices) -> Choices:
    """Choices whose points obey one law: which widths are offered is not among them."""
    return replace(choices, multiple_of=1, head_dim_multiple_of=1)


def _mha_widths(bench: Bench, choices: Choices, most: int) -> list[int]:
    shape, known = bench.loaded.architecture, bench.damage(choices).mha.widths.tolist()
    if choices.granularity == "head-dims":
        step = 2 * shape.num_attention_heads
        known = list(range(math.ceil(known[0] / step) * step, known[-1] + 1, step))
    return _evenly(known, most)


def _evenly(values: list[int], most: int) -> list[int]:
    """At most so many of the values, the first and the last among them."""
    places = np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(int)
    return [values[place] for place in places]


def _rising(values: np.ndarray, axis: int) -> np.ndarray:
    return np.maximum.accumulate(values, axis=axis)
