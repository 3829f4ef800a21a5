"""Importance criteria: how much each channel is worth, higher stays.

A criterion is a function from `Evidence` to one score per class of channels that leave together, shape (class_count,).
Register it with `@criterion(name)`; it then works everywhere (`--importance NAME`).
"""

from __future__ import annotations

from paretoprune.pruning.importance.activations import activation
from paretoprune.pruning.importance.base import CRITERIA, Criterion, Evidence, known_criterion, score
from paretoprune.pruning.importance.gradients import hessian, taylor
from paretoprune.pruning.importance.reconstruction import reconstruction
from paretoprune.pruning.importance.weights import bn_scale, fpgm, l1, l2, lamp, random

__all__ = [
    "CRITERIA",
    "Criterion",
    "Evidence",
    "activation",
    "bn_scale",
    "fpgm",
    "hessian",
    "known_criterion",
    "l1",
    "l2",
    "lamp",
    "random",
    "reconstruction",
    "score",
    "taylor",
]
