"""Non-dominated points and exact hypervolume, for losses (lower is better)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from paretoprune.results.errors import ResultsError

Losses = NDArray[np.float64]


def _matrix(losses: ArrayLike) -> Losses:
    points = np.asarray(losses, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] == 0:
        raise ResultsError(f"losses must have the shape (points, objectives), but got {points.shape}")
    if np.isnan(points).any():
        row = int(np.flatnonzero(np.isnan(points).any(axis=1))[0])
        raise ResultsError(f"losses must not be NaN, but row {row} is {points[row].tolist()}")
    return points


def non_dominated(losses: ArrayLike) -> NDArray[np.bool_]:
    """(n, m) losses -> (n,) mask of the rows that no other row dominates.

    A row dominates another one if it is nowhere worse and somewhere better, so equal rows all stay. Infinities are
    allowed, NaN raises ResultsError. Time O(n log n) for the sort plus O(n * front).
    """
    points = _matrix(losses)
    mask = np.zeros(len(points), dtype=bool)
    order = np.lexsort(points.T[::-1])
    # In lexicographic order a row can only be dominated by an earlier one: comparing with the front so far is enough.
    if len(points) and points.shape[1] == 2:  # which the lowest second loss so far stands for; a search asks often
        mask[order] = _descends(points[order])
        return mask
    front = np.empty((0, points.shape[1]))
    for index in order:
        row = points[index]
        dominating = (front <= row).all(axis=1) & (front < row).any(axis=1)
        if not dominating.any():
            mask[index] = True
            front = np.vstack([front, row])
    return mask


def _descends(rows: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Of rows (n, 2) in lexicographic order: whose second value is below all before; of equal rows all or none."""
    lowest = np.minimum.accumulate(rows[:, 1])
    new = np.r_[True, (rows[1:] != rows[:-1]).any(axis=1)]  # differs from the row before
    below = np.r_[True, rows[1:, 1] < lowest[:-1]]
    firsts: NDArray[np.bool_] = (below & new)[np.maximum.accumulate(np.where(new, np.arange(len(rows)), 0))]
    return firsts


def hypervolume(losses: ArrayLike, reference: ArrayLike) -> float:
    """The exact volume between the points (n, m) and the reference (m,), any m >= 1; 0.0 without points.

    Points that are not better than the reference everywhere add nothing. NaN, an infinite reference and a loss of -inf
    raise ResultsError. Slices along the last objective (While et al., "A faster algorithm for calculating hypervolume",
    IEEE TEC 2006, there HSO), with the area of two objectives as the base case.
    """
    corner = np.asarray(reference, dtype=np.float64)
    points = np.asarray(losses, dtype=np.float64)
    if points.size == 0:
        points = points.reshape(0, corner.size)
    points = _matrix(points)
    if corner.shape != (points.shape[1],) or not np.isfinite(corner).all():
        raise ResultsError(f"reference must be {points.shape[1]} finite numbers, but got {corner.tolist()}")
    if np.isneginf(points).any():
        raise ResultsError("losses must be above -inf, or the hypervolume is infinite")
    inside = points[(points < corner).all(axis=1)]
    if len(inside) == 0:
        return 0.0
    return _volume(np.unique(inside[non_dominated(inside)], axis=0), corner)


def _volume(points: Losses, corner: Losses) -> float:
    """Volume dominated by at least one point, all of them better than the corner."""
    if points.shape[1] == 1:
        return float(corner[0] - points.min())
    if points.shape[1] == 2:
        ordered = points[np.argsort(points[:, 0], kind="stable")]
        lowest = np.minimum.accumulate(ordered[:, 1])
        widths = np.diff(np.append(ordered[:, 0], corner[0]))
        return float(np.sum(widths * (corner[1] - lowest)))
    ordered = points[np.argsort(points[:, -1], kind="stable")]
    depths = np.diff(np.append(ordered[:, -1], corner[-1]))
    slices = (
        depth * _volume(ordered[: count + 1, :-1], corner[:-1]) for count, depth in enumerate(depths) if depth > 0
    )
    return float(sum(slices))
