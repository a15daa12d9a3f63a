"""Predicted perplexity at every position of the two sliders, with an interval, and its accuracy.

    bench.damage(choices, progress)              # once for each importance; seconds, so in a job
    points = [Point.of(measurement, choices), ...]
    predict_grid(bench, choices, points)         # {(mha width, mlp width): Ratio(low, mid, high)}
    next_points(bench, choices, points, count=5) # where to measure next, most informative first
    keep_score(bench, points)                    # each point beside its earlier prediction

`predict_grid` takes milliseconds once `bench.damage_known(choices)`. A `Ratio` is perplexity on the
bench's evaluation text divided by the dense model's there. The interval should contain 90 % of the
values that would be *measured* on that text; it says nothing about other texts.

The law that maps damage to loss is `planning.law`. A cut with widths of its own for each layer
counts as the uniform cut that would lose as much by the prices of its layers.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from transact_core.experiments.allocate import Laws
from transact_core.experiments.bench import Bench, Choices, Measurement
from transact_core.planning.damage import Damage
from transact_core.planning.law import MAX_DELTA, Fit, Ratio, far_sd
from transact_core.planning.width_table import equal_uniform_errors

GRID_SIDE = 96
"""Most positions along each side of a grid; a grid of this size takes milliseconds to predict."""
USEFUL = 2.0
"""Ratio to the dense perplexity up to which points are worth measuring; beyond it a cut without
training serves no purpose."""
MIN_CHANCE = 0.2
"""Least probability of a useful ratio at which a position is proposed for measuring."""
CANDIDATE_SIDE = 24
"""Positions along each side among which the next points are chosen. The covariance of all pairs of
positions is held in memory: 576² numbers."""


@dataclass(frozen=True)
class Point:
    """A measured point: its choices, its widths in channels, and its loss."""

    choices: Choices
    """Those of a uniform cut, where layers have widths of their own."""
    mha_width: float
    mlp_width: float
    """Means over layers."""
    delta_nll: float
    """Mean per-token difference of NLL from the dense model, in nats."""
    delta_nll_se: float = math.nan
    """Its standard error in nats, or NaN where it is not known."""
    own_errors: tuple[float, float] | None = None
    """Of the MHA and the MLP where layers have widths of their own: the errors of the uniform cut
    that would lose as much."""

    @classmethod
    def of(cls, measurement: Measurement, choices: Choices) -> "Point":
        """The point of a uniform cut."""
        cost = measurement.footprint
        return cls(
            choices,
            cost.mha_width,
            cost.mlp_width,
            measurement.delta_nll,
            measurement.delta_nll_se,
        )

    @classmethod
    def of_own_widths(
        cls, bench: Bench, measurement: Measurement, choices: Choices, laws: Laws
    ) -> "Point":
        """The point of a cut with widths of their own, by the laws of `allocate.loss_laws` for
        these choices."""
        shape, choices = bench.loaded.architecture, choices.of_uniform
        layers = measurement.plan.layer_widths(shape)
        widths = {
            "mha": [layer.num_attention_heads * shape.head_dim for layer in layers],
            "mlp": [layer.intermediate_size for layer in layers],
        }
        errors = equal_uniform_errors(bench.damage(choices), laws, widths)
        return cls(
            choices,
            sum(widths["mha"]) / len(layers),
            sum(widths["mlp"]) / len(layers),
            measurement.delta_nll,
            measurement.delta_nll_se,
            (errors["mha"], errors["mlp"]),
        )

    def errors(self, damage: Damage) -> tuple[float, float]:
        """The errors of its MHA and MLP, by the damage for its choices."""
        if self.own_errors is not None:
            return self.own_errors
        return damage.mha.at([self.mha_width])[0], damage.mlp.at([self.mlp_width])[0]


@dataclass(frozen=True)
class Scored:
    """The prediction for a point, made before it was measured, and the measurement."""

    point: Point
    predicted: Ratio
    measured: float
    """Perplexity divided by the dense model's."""

    @property
    def relative_error(self) -> float:
        """Relative error of the predicted perplexity; positive where it was too high."""
        return self.predicted.mid / self.measured - 1

    @property
    def inside(self) -> bool:
        """Whether the measurement lies in the predicted interval."""
        return self.predicted.low <= self.measured <= self.predicted.high


def predict_grid(
    bench: Bench,
    choices: Choices,
    points: Iterable[Point],
    mha_widths: Sequence[int] | None = None,
    mlp_widths: Sequence[int] | None = None,
) -> dict[tuple[int, int], Ratio]:
    """The ratio at every pair of these widths; by default up to 96 widths of each module.

    Measures the damage if it is not known; widths that it does not cover are left out. `points` may
    have other choices of the same bench; points whose damage is not known are left out. `mid` and
    `high` never fall as a width shrinks; at the dense widths all three values are 1.
    """
    damage = bench.damage(choices)
    mha, mlp = (
        sorted(filter(curve.covers, widths), reverse=True)
        for curve, widths in (
            (damage.mha, mha_widths or _mha_widths(bench, choices, GRID_SIDE)),
            (damage.mlp, mlp_widths or _evenly(damage.mlp.widths.tolist(), GRID_SIDE)),
        )
    )
    low, mid, high = fitted(bench, points).predict(
        _group(choices), damage.mha.at(mha)[:, None], damage.mlp.at(mlp)[None]
    )
    # The smooth deviation from the law may leave the narrower of two neighbours a little lower.
    mid, high = (_rising(_rising(values, 0), 1) for values in (mid, high))
    low, mid, high = (np.exp(np.minimum(values, MAX_DELTA)).tolist() for values in (low, mid, high))
    return {
        (mha_width, mlp_width): Ratio(low[row][column], mid[row][column], high[row][column])
        for row, mha_width in enumerate(mha)
        for column, mlp_width in enumerate(mlp)
    }


def keep_score(bench: Bench, points: Sequence[Point]) -> list[Scored]:
    """Each point beside its prediction from the points before it, in the order measured.

    Points whose damage is not known are left out.
    """
    known = with_known_damage(bench, points)
    scored = []
    for index, (point, damage) in enumerate(known):
        m, p = point.errors(damage)
        predicted = _fit(known[:index]).predict(_group(point.choices), np.array([m]), np.array([p]))
        ratio = Ratio(*(math.exp(min(delta.item(), MAX_DELTA)) for delta in predicted))
        scored.append(Scored(point, ratio, math.exp(min(point.delta_nll, MAX_DELTA))))
    return scored


def with_known_damage(bench: Bench, points: Iterable[Point]) -> list[tuple[Point, Damage]]:
    """The points whose damage is known at their widths, each with it; nothing is measured."""
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
    """Positions (mha width, mlp width) to measure next, the most informative first.

    Greedy: each is the position whose measurement lowers the variance of Δ most, summed over all
    positions and weighted by the probability that their ratio is at most `limit`. Positions where
    that probability is below `MIN_CHANCE` are not proposed, so there may be fewer than `count`.
    """
    damage, points = bench.damage(choices), list(points)
    mha = _mha_widths(bench, choices, CANDIDATE_SIDE)
    mlp = _evenly(damage.mlp.widths.tolist(), CANDIDATE_SIDE)
    m, p = (grid.ravel() for grid in np.meshgrid(damage.mha.at(mha), damage.mlp.at(mlp)))
    places = [(mha_width, mlp_width) for mlp_width in mlp for mha_width in mha]
    fit, group = fitted(bench, points), _group(choices)
    cut = (m > 0) | (p > 0)
    m, p = m[cut], p[cut]
    places = [place for place, taken in zip(places, cut, strict=True) if taken]
    _, mid, _ = fit.predict(group, m, p)
    covariance = fit.covariance(group, m, p)
    chance = _chance_below(limit, mid, np.sqrt(np.maximum(covariance.diagonal(), 0)))
    # From the variance of log Δ to that of Δ in nats, of which 0.05 is 5 % of any perplexity.
    weight = chance * np.minimum(mid, math.log(limit))
    covariance = covariance * np.outer(weight, weight)
    noise = (weight * np.hypot(fit.noise(group, mid) / mid, far_sd(mid))) ** 2
    measured = {
        (point.mha_width, point.mlp_width)
        for point in points
        if point.choices == choices and point.own_errors is None
    }
    free = (chance >= MIN_CHANCE) & np.array([place not in measured for place in places])
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
    """Probability that the ratio is at most `limit`, where Δ is log-normal with median `mid`."""
    if limit <= 1:
        return np.zeros(len(mid))
    z = (math.log(math.log(limit)) - np.log(mid)) / np.maximum(spread, 1e-9)
    return np.array([(1 + math.erf(value / math.sqrt(2))) / 2 for value in z])


def fitted(bench: Bench, points: Iterable[Point]) -> "Fit":
    """The predictor fitted to these points, as far as their damage is known."""
    return _fit(with_known_damage(bench, points))


def _fit(known: Iterable[tuple[Point, Damage]]) -> "Fit":
    rows = [
        (_group(point.choices), point, damage)
        for point, damage in known
        if math.isfinite(point.delta_nll)
    ]
    errors = [point.errors(damage) for _, point, damage in rows]
    return Fit(
        [group for group, _, _ in rows],
        np.array([m for m, _ in errors]),
        np.array([p for _, p in errors]),
        np.array([point.delta_nll for _, point, _ in rows]),
        np.array([point.delta_nll_se for _, point, _ in rows]),
    )


def _group(choices: Choices) -> Choices:
    """The choices that decide which law a point follows: all but the rounding of widths."""
    return replace(choices, multiple_of=1, head_dim_multiple_of=1)


def _mha_widths(bench: Bench, choices: Choices, most: int) -> list[int]:
    shape, known = bench.loaded.architecture, bench.damage(choices).mha.widths.tolist()
    if choices.granularity == "head-dims":
        step = 2 * shape.num_attention_heads
        known = list(range(math.ceil(known[0] / step) * step, known[-1] + 1, step))
    return _evenly(known, most)


def _evenly(values: list[int], most: int) -> list[int]:
    """At most this many of the values, evenly spaced, the first and the last included."""
    places = np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(int)
    return [values[place] for place in places]


def _rising(values: np.ndarray, axis: int) -> np.ndarray:
    return np.maximum.accumulate(values, axis=axis)
