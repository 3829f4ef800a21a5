"""Criteria that look at the weights alone."""

from __future__ import annotations

import numpy as np
import torch

from paretoprune.pruning.importance.base import Evidence, add_normalised, conv_weight, criterion


def _norms(evidence: Evidence, p: int) -> np.ndarray:
    """Sum over a class's output rows and input columns of |w|^p, each convolution weighing alike."""
    total = np.zeros(evidence.table.class_count)
    for name, channels in evidence.table.convs.items():
        weight = conv_weight(evidence.model.get_submodule(name)).abs().pow(p)
        add_normalised(total, channels.outputs, weight.sum((1, 2)).cpu().numpy())
        if not channels.depthwise and weight.shape[1] == len(channels.inputs):
            add_normalised(total, channels.inputs, weight.sum((0, 2)).cpu().numpy())
    return total


@criterion("l1")
def l1(evidence: Evidence) -> np.ndarray:
    """Sum of absolute weights (Li et al. 2017, arXiv:1608.08710), over the whole group."""
    return _norms(evidence, 1)


@criterion("l2")
def l2(evidence: Evidence) -> np.ndarray:
    """Sum of squared weights over the whole group (group L2; Fang et al. 2023, arXiv:2301.12900)."""
    return _norms(evidence, 2)


@criterion("bn")
def bn_scale(evidence: Evidence) -> np.ndarray:
    """Absolute batch-norm scale (network slimming; Liu et al. 2017, arXiv:1708.06519)."""
    total = np.zeros(evidence.table.class_count)
    for name, classes in evidence.table.norms.items():
        scale = evidence.model.get_submodule(name).weight.detach().abs()  # type: ignore[operator]
        np.add.at(total, classes, scale.cpu().numpy().astype(np.float64))
    return total


@criterion("fpgm")
def fpgm(evidence: Evidence) -> np.ndarray:
    """Sum of distances to the layer's other filters: near their geometric median is replaceable.

    He et al. 2019, arXiv:1811.00250, without its restriction to one layer: every convolution of the group counts alike.
    """
    total = np.zeros(evidence.table.class_count)
    for name, channels in evidence.table.convs.items():
        filters = conv_weight(evidence.model.get_submodule(name)).flatten(1)
        add_normalised(total, channels.outputs, torch.cdist(filters, filters).sum(1).cpu().numpy())
    return total


@criterion("lamp")
def lamp(evidence: Evidence) -> np.ndarray:
    """Squared norm over the sum of all squared norms at least as large (Lee et al. 2021, arXiv:2010.07611)."""
    squares = _norms(evidence, 2)
    scores = squares.copy()
    for group in evidence.table.groups:
        for part in group.parts:
            order = np.argsort(-squares[part], kind="stable")
            scores[part[order]] = squares[part[order]] / np.maximum(np.cumsum(squares[part[order]]), 1e-30)
    return scores


@criterion("random")
def random(evidence: Evidence) -> np.ndarray:
    """Uniform scores from the seed: the control every criterion has to beat."""
    return np.random.default_rng(evidence.seed).random(evidence.table.class_count)
