"""A law from the error of each layer's modules to the loss of the whole model, with an interval.

`damage` gives, before any cut is measured, the mean over layers of the relative error m of the
attention's output and p of the MLP's at given widths. The law from there to the mean NLL, in nats
over the dense model's, is

    Δ = (uᵍ + vᵍ)^(1/g),    u = A (m / 0.1)^α,    v = B (p / 0.1)^β,

which is zero where nothing is cut and rises in both errors whatever the five parameters; they are
positive and fitted as logarithms. Around the law, log Δ departs by a smooth Gaussian process in
(√m, √p), and each measurement has its own noise. With Gaussian priors on the parameters all of it
is one Gaussian process, linearised where its parameters are likeliest (Gauss-Newton): a few points
are enough to fit it, with none it still gives an estimate, and with many it follows them. Points
with other choices count too, as far as the parameters of their choices are alike: each choice has
its own parameters about shared ones.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

REFERENCE = 0.1
PRIOR = np.array([-0.7, 0.26, -1.05, 0.22, 0.0])
"""Of log A, log α, log B, log β, log g: as measured on the built-in model and text, `activation`
and `query-heads`, with least squares and without."""
SHARED = np.array([0.8, 0.2, 0.8, 0.2, 0.15])
"""Standard deviations of what all choices have in common: another model or text may well lose
several times as much at the same error."""
OWN = np.array([0.6, 0.15, 0.3, 0.1, 0.1])
"""And of what one of them has for itself."""
DEPARTURE = 0.06
"""Standard deviation of log Δ about the law."""
LENGTH = 0.1
"""In √m and √p, over which a departure lasts."""
FAR = 0.05
MOST_FAR = 0.5
"""Standard deviation of log Δ over Δ², and at most: far from the dense model the law is a guess."""
NOISE = 0.5
"""Share of a point's standard error that its neighbours do not share."""
TYPICAL_ERROR = 0.04
"""Standard error of Δ over √Δ, where nothing measured tells it."""
SMALLEST_NOISE = 0.001
"""In nats."""
DOUBTS = 6
"""Weight, in points, of the belief that points depart from the law as far as said above."""
NORMAL = 1.645
"""Standard deviations to each side that hold 90 %."""
ITERATIONS = 30
SETTLED = 1e-4
MOST = 30.0
"""Nats beyond which nothing is told apart."""


@dataclass(frozen=True)
class Ratio:
    """Of perplexity over the dense model's: the likeliest, and where nine in ten are expected."""

    low: float
    mid: float
    high: float


# --- the law, and the process about it -------------------------------------------------------
def law(parameters: np.ndarray, m: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log Δ, shape (n,), and its derivative by each parameter, shape (n, 5).

    `parameters` has shape (5,) or (n, 5), m and p shape (n,). Minus infinity where both are 0, the
    derivatives there being 0.
    """
    log_a, log_alpha, log_b, log_beta, log_g = np.moveaxis(parameters, -1, 0)
    alpha, beta, g = np.exp(log_alpha), np.exp(log_beta), np.exp(log_g)
    tiny = np.finfo(float).tiny
    m_size, p_size = (np.log(np.maximum(each, tiny) / REFERENCE) for each in (m, p))
    u, v = log_a + alpha * m_size, log_b + beta * p_size
    u, v = np.where(m > 0, u, -np.inf), np.where(p > 0, v, -np.inf)
    total = np.logaddexp(g * u, g * v)
    nothing = np.isneginf(total)
    with np.errstate(invalid="ignore"):
        u_share, v_share = (np.where(nothing, 0, np.exp(g * each - total)) for each in (u, v))
        by_g = np.where(u_share > 0, u_share * u, 0) + np.where(v_share > 0, v_share * v, 0)
        by_g = np.where(nothing, 0, by_g - total / g)
    derivatives = [u_share, u_share * alpha * m_size, v_share, v_share * beta * p_size, by_g]
    return total / g, np.stack(np.broadcast_arrays(*derivatives), axis=-1)


class Fit:
    """The law and the process about it, fitted to points of any groups.

    Takes for each point its group (anything hashable), the errors m and p, Δ and its standard error
    or NaN, the last four as arrays of shape (points,).
    """

    def __init__(
        self,
        groups: Sequence[Hashable],
        m: np.ndarray,
        p: np.ndarray,
        delta: np.ndarray,
        errors: np.ndarray,
    ) -> None:
        # A point that cuts nothing is known to be 0 and tells nothing.
        kept = (m > 0) | (p > 0)
        self._groups = [group for group, taken in zip(groups, kept, strict=True) if taken]
        self._m, self._p, delta, errors = (each[kept] for each in (m, p, delta, errors))
        self._same = _equal(self._groups, self._groups)
        self._spreads = np.where(
            np.isfinite(errors) & (delta > 0), errors / np.sqrt(np.maximum(delta, 1e-9)), np.nan
        )
        typical = TYPICAL_ERROR * np.sqrt(np.maximum(delta, 0))
        noise = np.maximum(NOISE * np.where(np.isfinite(errors), errors, typical), SMALLEST_NOISE)
        # Of a point that came out at nothing or less, all that is known is that it is small.
        seen = np.maximum(delta, noise)
        self._noise = np.diag((noise / seen) ** 2 + _far(seen) ** 2)
        self._observed = np.log(seen)
        self._fit()

    def _fit(self) -> None:
        parameters = np.tile(PRIOR, (len(self._m), 1))
        for _ in range(ITERATIONS):
            value, self._slopes = law(parameters, self._m, self._p)
            surprise = self._observed - value - (self._slopes * (PRIOR - parameters)).sum(axis=-1)
            covariance = self._kernel(self._slopes, self._m, self._p, self._same) + self._noise
            self._inverse = np.linalg.inv(covariance)
            self._pull = self._inverse @ surprise
            wanted = self._towards(self._same)
            # The first steps may be far too long, where the law is anything but a line.
            step = np.clip(wanted - parameters, -0.5, 0.5)
            parameters = parameters + step
            if not np.abs(step).max(initial=0) > SETTLED:
                break
        chi_squared = surprise @ self._pull if len(self._m) else 0.0
        spread = (DOUBTS + chi_squared) / (DOUBTS + len(self._m))
        # A few points that happen to lie well are no reason to be surer than others allowed.
        self._scale = math.sqrt(max(1.0, spread))
        # Student's t, as the scale is itself estimated; the first term of Cornish and Fisher's.
        self._sides = NORMAL + (NORMAL**3 + NORMAL) / (4 * (DOUBTS + len(self._m)))

    def parameters(self, group: Hashable) -> np.ndarray:
        """The likeliest parameters of a group, shape (5,)."""
        return self._towards(_equal([group], self._groups))[0]

    def _towards(self, same: np.ndarray) -> np.ndarray:
        variances = SHARED**2 + OWN**2 * same[..., None]
        return PRIOR + np.einsum("gnk,nk,n->gk", variances, self._slopes, self._pull)

    def _kernel(
        self, slopes: np.ndarray, m: np.ndarray, p: np.ndarray, same: np.ndarray
    ) -> np.ndarray:
        """Covariance of log Δ of some places with the points, shape (places, points)."""
        return _covariance((slopes, m, p), (self._slopes, self._m, self._p), same)

    def predict(
        self, group: Hashable, m: np.ndarray, p: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Δ in nats at every place, m and p being broadcast: low, likeliest and high."""
        m, p = np.broadcast_arrays(m, p)
        shape, m, p = m.shape, m.ravel(), p.ravel()
        cut = (m > 0) | (p > 0)
        mid, spread = np.zeros(len(m)), np.zeros(len(m))
        value, weights, slopes = self._mean(group, m[cut], p[cut])
        variance = _variance(slopes) - np.einsum("pn,pn->p", weights @ self._inverse, weights)
        mid[cut] = np.exp(np.minimum(value, math.log(MOST)))
        spread[cut] = (
            self._sides * self._scale * np.sqrt(np.maximum(variance, 0) + _far(mid[cut]) ** 2)
        )
        noise = self._sides * self.noise(group, mid)
        low = mid - np.hypot(mid * -np.expm1(-spread), noise)
        high = mid + np.hypot(mid * np.expm1(np.minimum(spread, MOST)), noise)
        return tuple(each.reshape(shape) for each in (low, mid, high))

    def _mean(
        self, group: Hashable, m: np.ndarray, p: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        parameters = self.parameters(group)
        value, slopes = law(parameters, m, p)
        weights = self._kernel(slopes, m, p, _equal([group], self._groups))
        return value + slopes @ (PRIOR - parameters) + weights @ self._pull, weights, slopes

    def covariance(self, group: Hashable, m: np.ndarray, p: np.ndarray) -> np.ndarray:
        """Covariance of log Δ between places that cut something, shape (places, places)."""
        _, weights, slopes = self._mean(group, m, p)
        places = (slopes, m, p)
        prior = _covariance(places, places, np.ones((1, 1)))
        return self._scale**2 * (prior - weights @ self._inverse @ weights.T)

    def noise(self, group: Hashable, delta: np.ndarray) -> np.ndarray:
        """Standard deviation, in nats, of what a measurement does not share with its neighbours.

        Its square grows as Δ does; how fast, the group's measured standard errors say.
        """
        spreads = self._spreads[_equal([group], self._groups)[0] & np.isfinite(self._spreads)]
        spread = np.median(spreads) if len(spreads) else TYPICAL_ERROR
        return np.where(delta > 0, np.maximum(NOISE * spread * np.sqrt(delta), SMALLEST_NOISE), 0)


def _far(delta: np.ndarray) -> np.ndarray:
    return np.minimum(FAR * delta**2, MOST_FAR)


Places = tuple[np.ndarray, np.ndarray, np.ndarray]
"""The law's slopes, (n, 5), and the errors m and p, each (n,)."""


def _covariance(here: Places, there: Places, same: np.ndarray) -> np.ndarray:
    slopes, m, p = here
    other_slopes, other_m, other_p = there
    shared = (slopes * SHARED**2) @ other_slopes.T
    own = (slopes * OWN**2) @ other_slopes.T
    alike = _alike(m, other_m) * _alike(p, other_p)
    return shared + same * (own + DEPARTURE**2 * alike)


def _alike(errors: np.ndarray, others: np.ndarray) -> np.ndarray:
    # A grid has each error many times.
    values, places = np.unique(errors, return_inverse=True)
    apart = np.subtract.outer(np.sqrt(values), np.sqrt(others))
    return np.exp(-(apart**2) / (2 * LENGTH**2))[places]


def _variance(slopes: np.ndarray) -> np.ndarray:
    return (slopes**2) @ (SHARED**2 + OWN**2) + DEPARTURE**2


def _equal(groups: Sequence[Hashable], others: Sequence[Hashable]) -> np.ndarray:
    """Which are the same, shape (groups, others), bool."""
    return np.array([[group == other for other in others] for group in groups], dtype=bool).reshape(
        len(groups), len(others)
    )
