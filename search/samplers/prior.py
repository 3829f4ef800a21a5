"""What the removal's scores say before any plan was tried: the loss of every plan, and the plans of least loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paretoprune.pruning.plan import Plan
from paretoprune.search.space.space import Space

Array = NDArray[np.float64]
Whole = NDArray[np.int64]


@dataclass(frozen=True)
class Prior:
    """Empty in runs of older versions.

    ``losses[i]``: estimated loss at every level of the space's width axis i, nats per image, in all as much as the sum
    over axes. ``path``: levels (n, d) of the plans by sensitivity, at every size of the input and in
    every precision.
    """

    losses: tuple[Array, ...] = ()
    path: Whole = field(default_factory=lambda: np.empty((0, 0), dtype=np.int64))

    def in_usual_units(self) -> tuple[Array, ...]:
        """The losses over the median of the path's sums."""
        if not self.losses or not len(self.path):
            return ()
        sums = sum(values[self.path[:, axis]] for axis, values in enumerate(self.losses))
        usual = float(np.median(sums)) or 1.0
        return tuple(values / usual for values in self.losses)

    @classmethod
    def of(cls, space: Space, baseline: Mapping[str, Any]) -> Prior:
        """From ``baseline.json``: its ``groups`` with their ``losses``, and ``sensitivity``."""
        groups = {row["name"]: row for row in baseline.get("groups") or ()}
        known = {
            name: {int(w): float(x) for w, x in row["losses"].items()}
            for name, row in groups.items()
            if row.get("losses")
        }
        axes = space.width_axes
        if not all(group.name in known for axis in axes for group in axis.groups):
            return cls()
        losses = tuple(
            np.array(
                [
                    sum(known[name].get(width, 0.0) for name, width in axis.widths(level).items())
                    for level in range(axis.size)
                ]
            )
            for axis in axes
        )
        return cls(losses, path_levels(space, baseline.get("sensitivity") or ()))


def path_levels(space: Space, rows: Sequence[Mapping[str, Any]]) -> Whole:
    """The plans of ``rows`` (``ratios``), each at every size of the input and in every precision: levels (n, d)."""
    choices = list(product(space.image_sizes or (None,), space.precisions or (None,)))
    plans = {
        space.nearest(Plan(row["ratios"], imgsz=size, precision=precision)): None
        for row in rows
        for size, precision in choices
    }
    return np.array(list(plans), dtype=np.int64).reshape(-1, len(space.axes))
