"""A law that maps the errors of the modules to the loss of the whole model, with an interval.

`damage` gives, before any cut is measured, the mean over layers of the relative error m of the
attention's output and p of the MLP's at given widths. The law maps them to Δ, the mean NLL in nats
above the dense model's:

    Δ = (u^g + v^g)^(1/g),    u = A (m / 0.1)^α,    v = B (p / 0.1)^β.

Its five parameters are positive and fitted as logarithms, so Δ is zero where nothing is cut and
rises with both errors. Around the law, log Δ deviates by a smooth Gaussian process in (√m, √p), and
each measurement has independent noise. The parameters have Gaussian priors. Linearised at the most
likely parameters (Gauss-Newton), all of this is one Gaussian process: without points it gives the
prior's estimate, a few points suffice to fit it, and with many points it follows them. Each group
of choices has its own parameters, which deviate from shared ones, so that points with other choices
count as far as their parameters are alike.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

REFERENCE_ERROR = 0.1
"""Relative squared error at which A and B are the losses in nats; within the usual range, so that
the scale and the exponent of a module are nearly independent."""
PRIOR_MEAN = np.array([-0.7, 0.26, -1.05, 0.22, 0.0])
"""Prior mean of (log A, log α, log B, log β, log g), A and B in nats. Fitted to 21 measured points
of the built-in model and text with `activation` and `query-heads`, with least squares and without
recovery (docs/prediction.md)."""
SHARED_SD = np.array([0.8, 0.2, 0.8, 0.2, 0.15])
"""Prior standard deviations of the part of the parameters that all groups share. A judgement:
another model or text may lose several times as much at the same error."""
OWN_SD = np.array([0.6, 0.15, 0.3, 0.1, 0.1])
"""Prior standard deviations of the part that belongs to one group alone; a judgement too."""
DEPARTURE_SD = 0.06
"""Standard deviation of log Δ about the law: the smooth part of what the law does not explain."""
LENGTH_SCALE = 0.1
"""Length scale of that part, in units of √m and √p: cuts that are further apart deviate from the
law independently."""
FAR_SD = 0.05
"""Standard deviation of log Δ at Δ = 1 nat that is added far from the dense model; it grows with
Δ². There the law is an extrapolation."""
MAX_FAR_SD = 0.5
"""Upper limit of that standard deviation."""
UNSHARED_NOISE = 0.5
"""Noise of a point as a fraction of its standard error. All points are measured on the same text,
so neighbouring points share the rest of it, and it is no noise between them."""
TYPICAL_ERROR = 0.04
"""Standard error of Δ divided by √Δ, in √nats, for groups without a measured standard error."""
MIN_NOISE = 0.001
"""Least noise of a point, in nats; it keeps the covariance matrix well conditioned."""
PRIOR_POINTS = 6
"""Degrees of freedom of the prior of the process's scale: the number of points as which the
standard deviations above count when the scale is estimated."""
Z_90 = 1.645
"""Standard deviations on each side of the mean that contain 90 % of a normal distribution."""
MAX_ITERATIONS = 30
"""Gauss-Newton steps at most; a handful is usual."""
CONVERGED = 1e-4
"""Largest step of a log parameter at which the fit ends; far below every standard deviation."""
MAX_DELTA = 30.0
"""Largest Δ in nats that is computed with (a ratio of 10^13), so that no exponential overflows."""


@dataclass(frozen=True)
class Ratio:
    """Perplexity divided by the dense model's: the most likely value and a 90 % interval."""

    low: float
    mid: float
    high: float


# --- the law, and the process about it -------------------------------------------------------


def law(parameters: np.ndarray, m: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log Δ, shape (n,), and its derivatives by the five log parameters, shape (n, 5).

    `parameters` has shape (5,) or (n, 5); m and p have shape (n,). Where both are 0, log Δ is minus
    infinity and the derivatives are 0.
    """
    log_a, log_alpha, log_b, log_beta, log_g = np.moveaxis(parameters, -1, 0)
    alpha, beta, g = np.exp(log_alpha), np.exp(log_beta), np.exp(log_g)
    tiny = np.finfo(float).tiny
    m_size, p_size = (np.log(np.maximum(errors, tiny) / REFERENCE_ERROR) for errors in (m, p))
    u, v = log_a + alpha * m_size, log_b + beta * p_size
    u, v = np.where(m > 0, u, -np.inf), np.where(p > 0, v, -np.inf)
    total = np.logaddexp(g * u, g * v)
    nothing = np.isneginf(total)
    with np.errstate(invalid="ignore"):
        u_share, v_share = (np.where(nothing, 0, np.exp(g * term - total)) for term in (u, v))
        by_g = np.where(u_share > 0, u_share * u, 0) + np.where(v_share > 0, v_share * v, 0)
        by_g = np.where(nothing, 0, by_g - total / g)
    derivatives = [u_share, u_share * alpha * m_size, v_share, v_share * beta * p_size, by_g]
    return total / g, np.stack(np.broadcast_arrays(*derivatives), axis=-1)


class Fit:
    """The law and the process about it, fitted to measured points of any groups.

    Takes for each point its group (anything hashable), the errors m and p, Δ in nats and its
    standard error in nats or NaN; the last four are arrays of shape (points,).
    """

    def __init__(
        self,
        groups: Sequence[Hashable],
        m: np.ndarray,
        p: np.ndarray,
        delta: np.ndarray,
        errors: np.ndarray,
    ) -> None:
        # A point that cuts nothing has Δ = 0 by definition and carries no information.
        kept = (m > 0) | (p > 0)
        self._groups = [group for group, taken in zip(groups, kept, strict=True) if taken]
        self._m, self._p, delta, errors = (values[kept] for values in (m, p, delta, errors))
        self._same = _equal(self._groups, self._groups)
        self._spreads = np.where(
            np.isfinite(errors) & (delta > 0), errors / np.sqrt(np.maximum(delta, 1e-9)), np.nan
        )
        typical = TYPICAL_ERROR * np.sqrt(np.maximum(delta, 0))
        noise = np.maximum(
            UNSHARED_NOISE * np.where(np.isfinite(errors), errors, typical), MIN_NOISE
        )
        # Δ at or below zero has no logarithm; such a point says that Δ is no larger than its noise.
        positive = np.maximum(delta, noise)
        self._noise = np.diag((noise / positive) ** 2 + far_sd(positive) ** 2)
        self._observed = np.log(positive)
        self._fit()

    def _fit(self) -> None:
        parameters = np.tile(PRIOR_MEAN, (len(self._m), 1))
        for _ in range(MAX_ITERATIONS):
            value, self._slopes = law(parameters, self._m, self._p)
            residual = (
                self._observed - value - (self._slopes * (PRIOR_MEAN - parameters)).sum(axis=-1)
            )
            covariance = self._kernel(self._slopes, self._m, self._p, self._same) + self._noise
            self._inverse = np.linalg.inv(covariance)
            self._weighted_residual = self._inverse @ residual
            target = self._posterior(self._same)
            # The first steps can be far too long, as the law is not linear in its parameters.
            step = np.clip(target - parameters, -0.5, 0.5)
            parameters = parameters + step
            if not np.abs(step).max(initial=0) > CONVERGED:
                break
        chi_squared = residual @ self._weighted_residual if len(self._m) else 0.0
        spread = (PRIOR_POINTS + chi_squared) / (PRIOR_POINTS + len(self._m))
        # A few points that happen to fit well do not narrow the interval.
        self._scale = math.sqrt(max(1.0, spread))
        # Quantile of Student's t, as the scale is estimated: the first term of its Cornish-Fisher
        # expansion about the normal quantile.
        self._quantile = Z_90 + (Z_90**3 + Z_90) / (4 * (PRIOR_POINTS + len(self._m)))

    def parameters(self, group: Hashable) -> np.ndarray:
        """The most likely log parameters of a group, shape (5,)."""
        return self._posterior(_equal([group], self._groups))[0]

    def _posterior(self, same: np.ndarray) -> np.ndarray:
        variances = SHARED_SD**2 + OWN_SD**2 * same[..., None]
        return PRIOR_MEAN + np.einsum(
            "gnk,nk,n->gk", variances, self._slopes, self._weighted_residual
        )

    def _kernel(
        self, slopes: np.ndarray, m: np.ndarray, p: np.ndarray, same: np.ndarray
    ) -> np.ndarray:
        """Covariance of log Δ between places and the points, shape (places, points)."""
        return _covariance((slopes, m, p), (self._slopes, self._m, self._p), same)

    def predict(
        self, group: Hashable, m: np.ndarray, p: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Low, most likely and high Δ in nats; m and p are broadcast, and give the shape."""
        m, p = np.broadcast_arrays(m, p)
        shape, m, p = m.shape, m.ravel(), p.ravel()
        cut = (m > 0) | (p > 0)
        mid, spread = np.zeros(len(m)), np.zeros(len(m))
        value, weights, slopes = self._mean(group, m[cut], p[cut])
        variance = _variance(slopes) - np.einsum("pn,pn->p", weights @ self._inverse, weights)
        mid[cut] = np.exp(np.minimum(value, math.log(MAX_DELTA)))
        spread[cut] = (
            self._quantile * self._scale * np.sqrt(np.maximum(variance, 0) + far_sd(mid[cut]) ** 2)
        )
        noise = self._quantile * self.noise(group, mid)
        low = mid - np.hypot(mid * -np.expm1(-spread), noise)
        high = mid + np.hypot(mid * np.expm1(np.minimum(spread, MAX_DELTA)), noise)
        return tuple(values.reshape(shape) for values in (low, mid, high))

    def _mean(
        self, group: Hashable, m: np.ndarray, p: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        parameters = self.parameters(group)
        value, slopes = law(parameters, m, p)
        weights = self._kernel(slopes, m, p, _equal([group], self._groups))
        return (
            value + slopes @ (PRIOR_MEAN - parameters) + weights @ self._weighted_residual,
            weights,
            slopes,
        )

    def covariance(self, group: Hashable, m: np.ndarray, p: np.ndarray) -> np.ndarray:
        """Posterior covariance of log Δ between places with m or p above 0, (places, places)."""
        _, weights, slopes = self._mean(group, m, p)
        places = (slopes, m, p)
        prior = _covariance(places, places, np.ones((1, 1)))
        return self._scale**2 * (prior - weights @ self._inverse @ weights.T)

    def noise(self, group: Hashable, delta: np.ndarray) -> np.ndarray:
        """Standard deviation, in nats, of the noise that neighbouring measurements do not share.

        Its square is proportional to Δ, with the factor that the group's measured standard errors
        give.
        """
        spreads = self._spreads[_equal([group], self._groups)[0] & np.isfinite(self._spreads)]
        spread = np.median(spreads) if len(spreads) else TYPICAL_ERROR
        return np.where(
            delta > 0, np.maximum(UNSHARED_NOISE * spread * np.sqrt(delta), MIN_NOISE), 0
        )


def far_sd(delta: np.ndarray) -> np.ndarray:
    """Standard deviation of log Δ that is added far from the dense model, at Δ in nats."""
    return np.minimum(FAR_SD * delta**2, MAX_FAR_SD)


Places = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Derivatives of the law, shape (n, 5), and the errors m and p, each of shape (n,)."""


def _covariance(here: Places, there: Places, same: np.ndarray) -> np.ndarray:
    slopes, m, p = here
    other_slopes, other_m, other_p = there
    shared = (slopes * SHARED_SD**2) @ other_slopes.T
    own = (slopes * OWN_SD**2) @ other_slopes.T
    similarity = _similarity(m, other_m) * _similarity(p, other_p)
    return shared + same * (own + DEPARTURE_SD**2 * similarity)


def _similarity(errors: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Squared-exponential kernel of the square roots, shape (errors, others)."""
    # A grid has each error many times: the exponentials are computed once for each value.
    values, places = np.unique(errors, return_inverse=True)
    distance = np.subtract.outer(np.sqrt(values), np.sqrt(others))
    return np.exp(-(distance**2) / (2 * LENGTH_SCALE**2))[places]


def _variance(slopes: np.ndarray) -> np.ndarray:
    """Prior variance of log Δ at each place, shape (places,)."""
    return (slopes**2) @ (SHARED_SD**2 + OWN_SD**2) + DEPARTURE_SD**2


def _equal(groups: Sequence[Hashable], others: Sequence[Hashable]) -> np.ndarray:
    """Which groups are equal, shape (groups, others), bool."""
    return np.array([[group == other for other in others] for group in groups], dtype=bool).reshape(
        len(groups), len(others)
    )
