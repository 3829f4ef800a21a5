"""Expected hypervolume improvement of points whose losses are known as independent normal distributions."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from paretoprune.results.selection.pareto import non_dominated

Array = NDArray[np.float64]


def free_cells(front: Array, reference: Array) -> tuple[Array, Array]:
    """The part of the box below ``reference`` (m,) that no row of ``front`` (n, m; losses) dominates, as boxes.

    Returns the lower and upper corners, each (cells, m), of disjoint boxes; lower ones may be -inf. Any m >= 1;
    about n cells for two objectives, n squared for three.
    """
    inside = front[(front < reference).all(axis=1)] if len(front) else front.reshape(0, len(reference))
    if len(inside):
        inside = np.unique(inside[non_dominated(inside)], axis=0)
    lower, upper = _cells(inside, reference)
    return np.array(lower, dtype=float), np.array(upper, dtype=float)


def expected_improvement(
    means: Array, spreads: Array, floors: Array, lower: Array, upper: Array, weights: Array
) -> Array:
    """Expected hypervolume that each of p points (means and standard deviations, both (p, m)) adds to the cells, times
    the cells' ``weights``. No loss is below its ``floors`` (p, m), which may be -inf.

    Within a cell the volume won is a product over objectives of ``upper - max(lower, loss)``, cut at 0; with
    independent objectives its expectation is the product of the expectations, so the result is exact (compare Yang et
    al., "Efficient computation of expected hypervolume improvement", J. Global Optimization 2019).
    """
    total = np.ones((len(means), len(lower)))
    for objective in range(means.shape[1]):
        mean, spread, floor = (values[:, objective, None] for values in (means, spreads, floors))
        # E[max(0, bound - max(loss, floor))] is what lies below the bound less what lies below the floor
        high, low = (np.maximum(bounds[None, :, objective], floor) for bounds in (upper, lower))
        total *= _expected_below(high, mean, spread) - _expected_below(low, mean, spread)
    return np.asarray(total @ weights)


def _expected_below(bound: Array, mean: Array, spread: Array) -> Array:
    """E[max(0, bound - loss)] of a normal loss; 0 where the bound is -inf."""
    finite = np.isfinite(bound)
    scaled = (np.where(finite, bound, 0.0) - mean) / spread
    density = np.exp(-0.5 * scaled**2) / np.sqrt(2.0 * np.pi)
    return np.where(finite, spread * (scaled * ndtr(scaled) + density), 0.0)


def _cells(front: Array, reference: Array) -> tuple[list[Array], list[Array]]:
    """Slices along the last objective; within one, the front of the points that reach it, one objective less."""
    if front.shape[1] == 1:
        best = front.min() if len(front) else reference[0]
        return [np.array([-np.inf])], [np.array([min(best, reference[0])])]
    levels = np.concatenate([[-np.inf], np.unique(front[:, -1]), [reference[-1]]])
    lower: list[Array] = []
    upper: list[Array] = []
    for low, high in pairwise(levels):
        below = front[front[:, -1] <= low][:, :-1]
        if len(below):
            below = np.unique(below[non_dominated(below)], axis=0)
        for start, end in zip(*_cells(below, reference[:-1]), strict=True):
            lower.append(np.append(start, low))
            upper.append(np.append(end, high))
    return lower, upper
