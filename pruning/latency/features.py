"""What a convolution's time depends on, counted from widths, branches, input size and precision. No torch here.

Everything is a share of the total of the unpruned network at the geometry's own size, so that a coefficient reads as a
share of its latency.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from paretoprune.base.image_size import ImageSize, area_of
from paretoprune.pruning.graph.geometry import FloatArray, NetworkGeometry
from paretoprune.pruning.names import PRECISIONS
from paretoprune.pruning.plan import Plan

_LANES = 16  # channels that a vector unit works on together: 512 bits of float32; a GPU's matrix units take 8 or 16


@dataclass(frozen=True)
class LatencyFeatures:
    """Features of some plans.

    `whole`: of the network: a constant (launches), the input's area (decoding, upsampling, all that no width changes),
    multiply-adds by kind of convolution (pointwise, larger kernels, depthwise), the same with the output channels
    padded to full vectors, activations written, activations read, weights read, and where branches can go the number of
    convolutions; then for each precision the same once more, of the plans that name it: in another precision than the
    reference's every kind of work costs something else. Shape (plans, features).
    `macs`, `written`: by convolution, multiply-adds and activations written, shapes (plans, convs). They let single
    layers be slower or faster than their kind.
    """

    whole: FloatArray
    macs: FloatArray
    written: FloatArray


def latency_features(geometry: NetworkGeometry, plans: Sequence[Plan]) -> LatencyFeatures:
    """Features of plans by their realised ratios, branches, sizes (None: the geometry's own) and precisions (None: that
    of the unpruned network that they are timed beside).

    Raises `PlanError` for a layer that is in no group, or a branch that the network does not have.
    """
    found = work_features(geometry, geometry.shares(plans), [plan.imgsz or geometry.imgsz for plan in plans])
    named = [np.array([[plan.precision == name] for plan in plans]) for name in PRECISIONS]
    return replace(found, whole=np.hstack([found.whole, *(found.whole * its for its in named)]))


def work_features(geometry: NetworkGeometry, shares: FloatArray, sizes: Sequence[ImageSize]) -> LatencyFeatures:
    """The same in one precision, of n plans by their `NetworkGeometry.shares` (n, groups + branches) and sizes."""
    theirs = _counts(geometry, geometry.whole)
    ours = {name: np.empty((len(shares), len(geometry.convs))) for name in theirs}
    for size in dict.fromkeys(sizes):
        rows = [row for row, its in enumerate(sizes) if its == size]
        for name, counts in _counts(geometry.at(size), shares[rows]).items():
            ours[name][rows] = counts
    area = np.array([conv.area for conv in geometry.convs])
    deep = geometry.depthwise
    kinds = [kind for kind in ((area == 1) & ~deep, (area > 1) & ~deep, deep) if kind.any()]
    everything = np.ones(len(geometry.convs), dtype=bool)
    columns = [np.ones(len(shares)), np.array([area_of(size) for size in sizes]) / area_of(geometry.imgsz)]
    for name, subsets in {
        "macs": kinds, "padded": kinds, "written": [everything], "read": [everything], "weights": [everything],
    }.items():  # fmt: skip
        for subset in subsets:
            total = float(theirs[name][:, subset].sum())
            if total > 0:
                columns.append(ours[name][:, subset].sum(axis=1) / total)
    if geometry.branches:  # a convolution's launch counts for itself
        columns.append(ours["runs"].sum(axis=1) / theirs["runs"].sum())
    by_layer = {name: ours[name] / max(float(theirs[name].sum()), 1.0) for name in ("macs", "written")}
    return LatencyFeatures(np.stack(columns, axis=1), by_layer["macs"], by_layer["written"])


def _counts(geometry: NetworkGeometry, shares: FloatArray) -> dict[str, FloatArray]:
    """What every convolution does, not yet as shares; each of shape (plans, convs)."""
    outputs, inputs = geometry.widths(shares)
    macs = geometry.macs(shares)
    padding = np.ceil(outputs / _LANES) * _LANES / np.maximum(outputs, 1)
    return {
        "macs": macs,
        "padded": macs * padding,
        "written": outputs * np.array([conv.out_pixels for conv in geometry.convs], dtype=np.float64),
        "read": inputs * np.array([conv.in_pixels for conv in geometry.convs], dtype=np.float64),
        "runs": geometry.runs(shares) * np.array([conv.out_pixels > 0 for conv in geometry.convs]),
        "weights": geometry.weights(shares) * np.array([conv.out_pixels > 0 for conv in geometry.convs]),
    }
