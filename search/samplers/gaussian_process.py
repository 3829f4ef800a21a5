"""A Gaussian process over plans, small and quick: it is fitted anew hundreds of times while trials run.

Kernel: Matern 5/2 with a length per axis, plus Bayesian regressions on families of features (see
:mod:`search.samplers.features`), each family with a variance of its own. What a convolution costs is a product of two
widths and what its removal loses is a sum over layers in the first place: the regressions learn that from few trials,
and the Matern part takes what is left. Hyperparameters are the most probable ones under the priors below.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize

Array = NDArray[np.float64]

_JITTER = 1e-8
# Lengths grow with the number of axes, or a space of 30 axes would look like noise (Hvarfner et al., "Vanilla Bayesian
# optimization performs great in high dimensions", ICML 2024: log-normal with these parameters).
_LENGTH_MEAN, _LENGTH_SD = math.sqrt(2.0), math.sqrt(3.0)
# Of the logarithm of a variance, where the values' own is 1: mean, standard deviation.
_MATERN, _FAMILY, _NOISE = (0.0, 1.0), (-1.0, 2.0), (math.log(0.02), 1.5)
_BOUNDS = {"length": (-3.0, 6.0), "variance": (-8.0, 4.0), "noise": (math.log(1e-5), 0.0)}


@dataclass(frozen=True)
class FeatureMatrix:
    """n plans as a surrogate sees them: ``points`` (n, d) in [0, 1], ``families`` of features (n, k), each scaled so
    that a sum of its columns with unit-variance weights has a variance of about 1."""

    points: Array
    families: tuple[Array, ...]

    def without_losses(self) -> FeatureMatrix:
        """Without the first family, that of estimated losses."""
        return FeatureMatrix(self.points, self.families[1:])

    def joined(self, other: FeatureMatrix) -> FeatureMatrix:
        """These plans, then the others."""
        families = tuple(np.vstack(pair) for pair in zip(self.families, other.families, strict=True))
        return FeatureMatrix(np.vstack([self.points, other.points]), families)


class Surrogate:
    """Posterior over one objective, given n plans, values (n,) and extra noise variances (n,).

    ``hyper``: from :func:`fit_hyperparameters`. Values are standardised inside; predictions come back in their unit.
    NaN is not allowed anywhere.
    """

    def __init__(self, design: FeatureMatrix, values: Array, extra: Array, hyper: Array) -> None:
        self._design = design
        self._mean = float(np.mean(values))
        self._scale = float(np.std(values)) or 1.0
        self._hyper = hyper
        kernel, _, _ = _kernel(design, design, hyper)
        noise = math.exp(hyper[-1]) + _JITTER + extra / self._scale**2
        self._lower = cholesky(kernel + np.diag(noise), lower=True)
        self._weights = cho_solve((self._lower, True), (values - self._mean) / self._scale)

    def predict(self, design: FeatureMatrix) -> tuple[Array, Array]:
        """Mean (m,) and standard deviation (m,) of the noiseless value of m plans."""
        cross, _, _ = _kernel(design, self._design, self._hyper)
        mean = cross @ self._weights
        solved = solve_triangular(self._lower, cross.T, lower=True, check_finite=False)
        axes = design.points.shape[1]
        prior = np.full(len(mean), math.exp(self._hyper[axes]))
        for family, log_variance in zip(design.families, self._hyper[axes + 1 :], strict=False):
            prior += math.exp(log_variance) * np.einsum("ij,ij->i", family, family)
        variance = np.maximum(prior - np.einsum("ij,ij->j", solved, solved), 1e-12)
        return self._mean + self._scale * mean, self._scale * np.sqrt(variance)


def fit_hyperparameters(
    design: FeatureMatrix, values: Array, extra: Array, start: Array | None = None, steps: int = 40
) -> Array:
    """The most probable logarithms of: a length per axis, variances of the Matern part and of every family, the noise.

    ``start``: where to begin, for instance an earlier fit.
    """
    scale = float(np.std(values)) or 1.0
    target = (values - np.mean(values)) / scale
    means, spreads, bounds = _priors(design)
    first = start if start is not None else np.concatenate([means[: design.points.shape[1]] - 1.0, _first(design)])
    result = minimize(
        _objective, first, args=(design, target, extra / scale**2, means, spreads), jac=True, method="L-BFGS-B",
        bounds=bounds, options={"maxiter": steps},
    )  # fmt: skip
    return np.asarray(result.x if np.isfinite(result.fun) else first)


def _first(design: FeatureMatrix) -> Array:
    return np.array([_MATERN[0] - 1.0, *[_FAMILY[0]] * len(design.families), _NOISE[0]])


def _priors(design: FeatureMatrix) -> tuple[Array, Array, list[tuple[float, float]]]:
    """Means, standard deviations and bounds of all hyperparameters."""
    axes, families = design.points.shape[1], len(design.families)
    length = _LENGTH_MEAN + 0.5 * math.log(axes)
    pairs = [(length, _LENGTH_SD)] * axes + [_MATERN] + [_FAMILY] * families + [_NOISE]
    bounds = [_BOUNDS["length"]] * axes + [_BOUNDS["variance"]] * (1 + families) + [_BOUNDS["noise"]]
    return np.array([pair[0] for pair in pairs]), np.array([pair[1] for pair in pairs]), bounds


def _objective(
    hyper: Array, design: FeatureMatrix, target: Array, relative: Array, means: Array, spreads: Array
) -> tuple[float, Array]:
    """Negative log posterior of the hyperparameters and its gradient (Rasmussen and Williams, equations 5.8, 5.9)."""
    kernel, matern, slope = _kernel(design, design, hyper)
    noise = math.exp(hyper[-1]) + _JITTER + relative
    try:
        lower = cholesky(kernel + np.diag(noise), lower=True)
    except np.linalg.LinAlgError:
        return 1e10, np.zeros_like(hyper)
    weights = cho_solve((lower, True), target)
    outer = cho_solve((lower, True), np.eye(len(target))) - np.outer(weights, weights)
    value = 0.5 * float(target @ weights) + float(np.log(np.diag(lower)).sum())
    # Half the trace of `outer` with each derivative of the kernel
    points, axes = design.points, design.points.shape[1]
    weighted = outer * slope
    squares = 2.0 * (weighted.sum(axis=1) @ points**2 - np.einsum("ij,ij->j", points, weighted @ points))
    parts = [float((outer * matern).sum())]
    parts += [
        math.exp(hyper[axes + 1 + index]) * float(np.einsum("ij,ij->", family, outer @ family))
        for index, family in enumerate(design.families)
    ]
    parts.append(math.exp(hyper[-1]) * float(np.trace(outer)))
    gradient = 0.5 * np.concatenate([squares * np.exp(-2.0 * hyper[:axes]), parts])
    away = (hyper - means) / spreads
    return value + 0.5 * float(away @ away), gradient + away / spreads


def _kernel(left: FeatureMatrix, right: FeatureMatrix, hyper: Array) -> tuple[Array, Array, Array]:
    """The whole kernel, its Matern part, and the latter's slope: its derivative by a log length is slope * squared
    scaled difference along that axis."""
    axes = left.points.shape[1]
    scales = np.exp(-hyper[:axes])
    a, b = left.points * scales, right.points * scales
    squares = np.maximum((a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None, :] - 2.0 * a @ b.T, 0.0)
    distances = np.sqrt(5.0 * squares)
    decay = math.exp(hyper[axes]) * np.exp(-distances)
    matern = decay * (1.0 + distances + distances**2 / 3.0)
    kernel = matern.copy()
    for index, (mine, theirs) in enumerate(zip(left.families, right.families, strict=True)):
        kernel += math.exp(hyper[axes + 1 + index]) * (mine @ theirs.T)
    return kernel, matern, decay * (1.0 + distances) * (5.0 / 3.0)
