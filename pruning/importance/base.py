"""The contract of an importance criterion, and the registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from paretoprune.pruning.data.calibration import Calibration
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.graph.layers import ALWAYS, LayerTable


def unweighted() -> None:
    """All classes count alike."""


@dataclass(frozen=True)
class Evidence:
    """What a criterion may look at. The model must not be changed; `calibration` is None where no data was given.

    `classes` gives what an error of each class counts, shape (classes,) (`output_distribution.class_weights`); it costs
    a pass over the images.
    """

    model: nn.Module
    table: LayerTable
    calibration: Calibration | None = None
    seed: int = 0
    device: str = "cpu"
    classes: Callable[[], torch.Tensor | None] = unweighted


CriterionFunction = Callable[[Evidence], np.ndarray]


@dataclass(frozen=True)
class Criterion:
    """A named criterion. `needs_data`: it is refused without calibration images."""

    name: str
    function: CriterionFunction
    needs_data: bool


CRITERIA: dict[str, Criterion] = {}


def criterion(name: str, needs_data: bool = False) -> Callable[[CriterionFunction], CriterionFunction]:
    """Register a function as the criterion `name`."""

    def add(function: CriterionFunction) -> CriterionFunction:
        CRITERIA[name] = Criterion(name, function, needs_data)
        return function

    return add


def known_criterion(name: str) -> Criterion:
    """The criterion of this name; `PruningError` where there is none."""
    if name not in CRITERIA:
        known = ", ".join(sorted(CRITERIA))
        raise PruningError(
            f"`importance` must be one of {known}, but got '{name}'; choose one of these (a run keeps its own: begin "
            "another run)."
        )
    return CRITERIA[name]


def score(name: str, evidence: Evidence) -> np.ndarray:
    """Scores per class, float64, shape (class_count,), higher is worth more; comparable within a group only.

    Raises:
        PruningError: unknown criterion, missing calibration images, or a score that is not finite.
    """
    chosen = known_criterion(name)
    if chosen.needs_data and evidence.calibration is None:
        raise PruningError(f"importance '{name}' looks at images, but no dataset was given; pass --data or use l2.")
    scores = np.asarray(chosen.function(evidence), dtype=np.float64)
    scores[ALWAYS] = 0.0
    if not np.isfinite(scores).all():
        raise PruningError(f"importance '{name}' is not finite for {int((~np.isfinite(scores)).sum())} channels.")
    return scores


def conv_weight(module: nn.Module) -> torch.Tensor:
    """A convolution's weight as (out, in, positions), also of a transposed one."""
    weight: torch.Tensor = module.weight.detach().float()  # type: ignore[operator]
    if isinstance(module, nn.ConvTranspose2d):
        weight = weight.transpose(0, 1)
    return weight.flatten(2)


def add_normalised(total: np.ndarray, classes: np.ndarray, values: np.ndarray) -> None:
    """Add one convolution's scores, divided by their mean so that no member of a group outweighs the others."""
    mean = float(values.mean())
    np.add.at(total, classes, values / mean if mean > 0 else values)
