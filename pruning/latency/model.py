"""A plan's latency, predicted from its widths, branches, size and precision: fitted on measured plans, with its error.

The latency of a network is the sum of its layers' latencies, and each of those is nearly linear in what the layer does.
So the model is linear in physical features (`pruning.latency.features`), with Gaussian priors on its coefficients in
two tiers: coefficients of the whole network, by kind of work, and deviations of single layers from their kind, which
only many measurements can tell. How far coefficients and deviations reach, and how much noise there is beyond the
measurements' own, is found by marginal likelihood; this is Gaussian-process regression with a linear kernel
(Rasmussen and Williams 2006, sections 2.1 and 5.4). The posterior gives an interval, and leaving every measured plan
out once gives the error in closed form (their section 5.4.2).

Nothing is assumed about the device: where latency hardly follows the widths (a big GPU bound by its launches), the
constant takes it all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize
from scipy.special import stdtrit

from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.graph.geometry import FloatArray, NetworkGeometry
from paretoprune.pruning.latency.features import LatencyFeatures, latency_features
from paretoprune.pruning.plan import Plan

FEWEST_PLANS = 6
"""Measured plans below which no model is fitted."""

_BASELINE_NOISE = 1e-3  # the unpruned network beside itself: known, but a zero would make the equations singular
_LEAST_NOISE = 2e-3
_Z95 = 1.96
# Prior of the logarithms of: reach of the coefficients, of the layers' deviations in multiply-adds and in activations,
# noise. A factor of e^2 either way is one standard deviation: the prior only keeps few plans from extremes.
_CENTRE = np.log([1.0, 1.0, 1.0, 0.01])
_WIDTH = 2.0


@dataclass(frozen=True)
class MeasuredPlan:
    """`plan`: realised ratios by layer, size and precision. `latency_ratio`: its network / the unpruned one at the
    geometry's own size and in the reference precision, both measured.

    `halfwidth`: of the ratio's 95 % interval, as a fraction of the ratio; 0 where it is not known.
    """

    plan: Plan
    latency_ratio: float
    halfwidth: float = 0.0


@dataclass(frozen=True)
class PlanLatency:
    """Latency ratios (a plan's network / the unpruned one), and the intervals that hold what a measurement would say in
    95 % of cases.

    `halfwidth`: of the interval that holds the latency itself in 95 % of cases, as a fraction of `ratio`; narrower,
    since a measurement's own noise is not in it. Shapes (plans,).
    """

    ratio: FloatArray
    low: FloatArray
    high: FloatArray
    halfwidth: FloatArray


@dataclass(frozen=True)
class PredictionError:
    """Relative error when each of `plans` measured plans was left out and predicted from the others (0.02: 2 %)."""

    plans: int
    median: float
    p95: float

    def __str__(self) -> str:
        return f"{self.median:.1%} median, {self.p95:.1%} 95th percentile, over {self.plans} plans, each left out once"


class LatencyModel:
    """Fitted once, immutable; made by `fit_latency_model`."""

    def __init__(self, geometry: NetworkGeometry, measured: Sequence[MeasuredPlan], scales: FloatArray | None) -> None:
        self._geometry = geometry
        self._features = self._features_of(
            [Plan({}), *(known.plan for known in measured)]
        )  # the unpruned network is known
        self._ratios = np.array([1.0, *(plan.latency_ratio for plan in measured)])
        self._own_noise = np.array([_BASELINE_NOISE, *(plan.halfwidth / _Z95 for plan in measured)])
        self.scales = self._likeliest_scales() if scales is None else scales
        matrix = _kernel(self._features, self._features, self.scales)
        noise = np.square(self._noise(self.scales) * self._ratios)
        self._factor = cho_factor(matrix + np.diag(noise), lower=True)
        self._weights = cho_solve(self._factor, self._ratios)
        noise_of_one = float(np.hypot(np.exp(self.scales[-1]), np.median(self._own_noise[1:])))
        self._typical_noise = max(noise_of_one, _LEAST_NOISE)
        self.error, self._widen = self._left_out()

    def predict(self, plans: Sequence[Plan]) -> PlanLatency:
        """Latency of plans of realised ratios, thousands at a time.

        Raises:
            PlanError: a layer that the model does not have.
        """
        features = self._features_of(plans)
        shared = _kernel(features, self._features, self.scales)
        ratio = shared @ self._weights
        variance = _own_variance(features, self.scales) - np.einsum(
            "ij,ji->i", shared, cho_solve(self._factor, shared.T)
        )
        unexplained = max(float(np.exp(self.scales[-1])), _LEAST_NOISE)
        reach, own_reach = (
            self._widen * np.sqrt(np.maximum(variance, 0) + (noise * ratio) ** 2)
            for noise in (self._typical_noise, unexplained)
        )
        ratio = np.maximum(ratio, 1e-3)  # far outside of what was measured, a linear model may fall below zero
        return PlanLatency(ratio, np.maximum(ratio - reach, 1e-3), ratio + reach, own_reach / ratio)

    def _left_out(self) -> tuple[PredictionError, float]:
        """The error over the measured plans, and how many standard deviations hold 95 % of them.

        The model's own standard deviations are believed only as far as the plans left out bear them out.
        """
        inverse = cho_solve(self._factor, np.eye(len(self._ratios)))
        variance = 1 / np.diag(inverse)[1:]
        deviation = self._weights[1:] * variance
        foretold = self._ratios[1:] - deviation
        error = np.abs(foretold / self._ratios[1:] - 1)
        plans = len(error)
        surprise = np.abs(deviation) / np.sqrt(variance)
        freedom = plans / 2  # about half of it goes into the coefficients
        normal = float(stdtrit(freedom, 0.975)) * max(1.0, float(np.sqrt(np.mean(surprise**2))))
        # Split-conformal's rank (Vovk et al. 2005), for tails heavier than normal; the largest where plans are few.
        ranked = float(np.quantile(surprise, min(1.0, 0.95 * (1 + 1 / plans)), method="higher"))
        widen = max(normal, ranked)
        return PredictionError(plans, float(np.median(error)), float(np.quantile(error, 0.95))), widen

    def _features_of(self, plans: Sequence[Plan]) -> LatencyFeatures:
        return latency_features(self._geometry, plans)

    def _noise(self, scales: FloatArray) -> FloatArray:
        """Standard deviation of each measurement as a fraction of it: its own, and what no feature explains."""
        return np.asarray(
            np.sqrt(self._own_noise**2 + np.r_[0.0, np.full(len(self._ratios) - 1, np.exp(scales[-1]))] ** 2)
        )

    def _likeliest_scales(self) -> FloatArray:
        grams = [x @ x.T for x in _tiers(self._features)]

        def cost(scales: FloatArray) -> float:
            matrix = sum(np.exp(2 * s) * gram for s, gram in zip(scales, grams, strict=False))
            noise = np.square(np.maximum(self._noise(scales), _BASELINE_NOISE) * self._ratios)
            try:
                factor = cho_factor(matrix + np.diag(noise), lower=True)
            except np.linalg.LinAlgError:
                return 1e10
            fit = float(self._ratios @ cho_solve(factor, self._ratios)) / 2 + float(np.log(np.diag(factor[0])).sum())
            return fit + float(np.square((scales - _CENTRE) / _WIDTH).sum()) / 2

        bounds = [(c - 4 * _WIDTH, c + 2 * _WIDTH) for c in _CENTRE]
        return np.asarray(minimize(cost, _CENTRE, method="L-BFGS-B", bounds=bounds).x)


def fit_latency_model(
    geometry: NetworkGeometry, measured: Sequence[MeasuredPlan], scales: FloatArray | None = None
) -> LatencyModel:
    """Fit on measured plans; the unpruned network counts as one more whose ratio is 1.

    `scales`: of an earlier model of nearly the same plans, so that only the coefficients are fitted anew (milliseconds
    for hundreds of plans); None finds them by marginal likelihood.

    Raises:
        PruningError: fewer than FEWEST_PLANS plans, or a ratio that is no positive number.
    """
    if len(measured) < FEWEST_PLANS:
        raise PruningError(f"a latency model needs at least {FEWEST_PLANS} measured plans, but got {len(measured)}.")
    for plan in measured:
        if not (np.isfinite(plan.latency_ratio) and plan.latency_ratio > 0 and np.isfinite(plan.halfwidth)):
            raise PruningError(f"a measured latency ratio must be a positive number, but got {plan.latency_ratio}.")
    return LatencyModel(geometry, measured, scales)


def _tiers(features: LatencyFeatures) -> tuple[FloatArray, FloatArray, FloatArray]:
    return features.whole, features.macs, features.written


def _kernel(left: LatencyFeatures, right: LatencyFeatures, scales: FloatArray) -> FloatArray:
    """Covariance of the latencies of two sets of plans, shape (left, right)."""
    tiers = zip(scales, _tiers(left), _tiers(right), strict=False)  # the last scale is the noise's
    return np.asarray(sum(np.exp(2 * s) * a @ b.T for s, a, b in tiers))


def _own_variance(features: LatencyFeatures, scales: FloatArray) -> FloatArray:
    tiers = zip(scales, _tiers(features), strict=False)
    return np.asarray(sum(np.exp(2 * s) * np.square(x).sum(axis=1) for s, x in tiers))
