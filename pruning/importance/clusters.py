"""Channels as points in the plane, clustered around medoids, and how many clusters describe them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np


def embed(matrix: np.ndarray) -> np.ndarray:
    """The rows' first two principal components, shape (rows, at most 2); exact, so equal input gives equal output."""
    from sklearn.decomposition import PCA  # a second to import, for this criterion only

    points: np.ndarray = PCA(n_components=min(2, *matrix.shape), svd_solver="full").fit_transform(matrix)
    return points


def distances(points: np.ndarray) -> np.ndarray:
    """Euclidean distance of every pair of rows, shape (rows, rows)."""
    return np.sqrt(np.square(points[:, None] - points[None]).sum(2))


def cluster(points: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Cluster number of every point, shape (points,), by FasterPAM (Schubert and Rousseeuw 2021).

    It starts from medoids drawn with the seed: the careful start (BUILD) ends in clusters as good, a hundred times
    later. Points that coincide share a cluster, so fewer than `k` numbers may occur.
    """
    import kmedoids

    found = kmedoids.fasterpam(distances(points), k, init="random", random_state=seed, n_cpu=1)
    labels: np.ndarray = np.asarray(found.labels, dtype=np.int64)
    return labels


def silhouette_curve(points: np.ndarray, ks: Sequence[int]) -> np.ndarray:
    """Mean simplified silhouette at each number of clusters, shape (len(ks),), in [0, 1].

    The simplified silhouette of a point is 1 - a / b, a and b its distances to the nearest and second nearest medoid
    (Van der Laan, Pollard and Bryan 2003), 1 where b is zero; so it is 1 where every point is a medoid. Every k starts
    from the medoids of the k before, joined by the points farthest from them.

    Args:
        ks: ascending, from 2 at least to the number of points at most.
    """
    import kmedoids

    apart = distances(points)
    medoids = [int(apart.sum(1).argmin())]
    means = []
    for k in ks:
        nearest = apart[:, medoids].min(1)
        nearest[medoids] = -1.0
        while len(medoids) < k:
            medoids.append(int(nearest.argmax()))
            nearest = np.minimum(nearest, apart[medoids[-1]])
            nearest[medoids[-1]] = -1.0
        if k < len(points):
            found = kmedoids.fasterpam(apart, np.array(medoids, dtype=np.uint64), n_cpu=1)
            medoids = [int(m) for m in found.medoids]
        means.append(mean_simplified_silhouette(apart[:, medoids]))
    return np.array(means)


def mean_simplified_silhouette(to_medoids: np.ndarray) -> float:
    """Mean of 1 - a / b from distances to the medoids, shape (points, medoids >= 2); in [0, 1]."""
    nearest = np.partition(to_medoids, 1, axis=1)[:, :2]
    a, b = nearest[:, 0], nearest[:, 1]
    return float((1 - np.divide(a, b, out=np.zeros_like(a), where=b > 0)).mean())


def knee(ks: Sequence[int], means: np.ndarray) -> int | None:
    """Where the rising curve of `means` over `ks` flattens (Satopaa et al. 2011); None where it has no knee."""
    from kneed import KneeLocator

    if len(ks) < 3 or float(np.ptp(means)) == 0:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is no knee is an answer here
        found = KneeLocator(ks, means, curve="concave", direction="increasing").knee
    return None if found is None else int(found)
