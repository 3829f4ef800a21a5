"""What a convolution's time depends on, counted from the widths alone. No torch here.

Everything is a share of the unpruned network's own total, so that a coefficient reads as a share of its latency.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paretoprune.pruning.graph.geometry import FloatArray, NetworkGeometry

_LANES = 16  # channels that a vector unit works on together: 512 bits of float32; a GPU's matrix units take 8 or 16


@dataclass(frozen=True)
class LatencyFeatures:
    """Features of some plans.

    `whole`: of the network: a constant (launches, decoding, everything that no width changes), multiply-adds by kind of
    convolution (pointwise, larger kernels, depthwise), the same with the output channels padded to full vectors,
    activations written, activations read, weights read; shape (plans, features).
    `macs`, `written`: by convolution, multiply-adds and activations written, shapes (plans, convs). They let single
    layers be slower or faster than their kind.
    """

    whole: FloatArray
    macs: FloatArray
    written: FloatArray


def latency_features(geometry: NetworkGeometry, shares: FloatArray) -> LatencyFeatures:
    """Features of the plans that leave each group these `shares` of its channels, shape (plans, groups)."""
    unpruned = np.ones((1, len(geometry.groups)))
    ours, theirs = _counts(geometry, shares), _counts(geometry, unpruned)
    area = np.array([conv.area for conv in geometry.convs])
    deep = geometry.depthwise
    kinds = [kind for kind in ((area == 1) & ~deep, (area > 1) & ~deep, deep) if kind.any()]
    everything = np.ones(len(geometry.convs), dtype=bool)
    columns = [np.ones(len(shares))]
    for name, subsets in {
        "macs": kinds, "padded": kinds, "written": [everything], "read": [everything], "weights": [everything],
    }.items():  # fmt: skip
        for subset in subsets:
            total = float(theirs[name][:, subset].sum())
            if total > 0:
                columns.append(ours[name][:, subset].sum(axis=1) / total)
    by_layer = {name: ours[name] / max(float(theirs[name].sum()), 1.0) for name in ("macs", "written")}
    return LatencyFeatures(np.stack(columns, axis=1), by_layer["macs"], by_layer["written"])


def _counts(geometry: NetworkGeometry, shares: FloatArray) -> dict[str, FloatArray]:
    """What every convolution does, not yet as shares; each of shape (plans, convs)."""
    outputs, inputs = geometry.widths(shares)
    macs = geometry.macs(shares)
    padding = np.ceil(outputs / _LANES) * _LANES / outputs
    return {
        "macs": macs,
        "padded": macs * padding,
        "written": outputs * np.array([conv.out_pixels for conv in geometry.convs], dtype=np.float64),
        "read": inputs * np.array([conv.in_pixels for conv in geometry.convs], dtype=np.float64),
        "weights": geometry.weights(shares) * np.array([conv.out_pixels > 0 for conv in geometry.convs]),
    }
