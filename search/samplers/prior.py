"""What is known before any plan was tried: what every plan is estimated to lose, the plans of least loss, and the work
that every plan does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paretoprune.pruning.graph.geometry import NetworkGeometry
from paretoprune.pruning.latency.features import work_features
from paretoprune.pruning.plan import Plan
from paretoprune.search.space.space import Space

Array = NDArray[np.float64]
Whole = NDArray[np.int64]


@dataclass(frozen=True)
class Prior:
    """Empty in runs of older versions.

    ``losses[i]``: estimated loss at every level of the space's axis i (those of widths, then those of depth), nats per
    image, in all as much as the sum over axes. ``path``: levels (n, d) of the plans by sensitivity, at every size of
    the input and in every precision. ``work``: None without a geometry.
    """

    losses: tuple[Array, ...] = ()
    path: Whole = field(default_factory=lambda: np.empty((0, 0), dtype=np.int64))
    work: PlanWork | None = None

    def in_usual_units(self) -> tuple[Array, ...]:
        """The losses over the median of the path's sums."""
        if not self.losses or not len(self.path):
            return ()
        sums = sum(values[self.path[:, axis]] for axis, values in enumerate(self.losses))
        usual = float(np.median(sums)) or 1.0
        return tuple(values / usual for values in self.losses)

    @classmethod
    def of(cls, space: Space, baseline: Mapping[str, Any]) -> Prior:
        """From ``baseline.json``: ``groups`` and ``branches`` with their losses, ``sensitivity``, ``geometry``."""
        geometry = baseline.get("geometry")
        work = PlanWork(space, NetworkGeometry.from_json(geometry)) if geometry else None
        known = {
            row["name"]: {int(width): float(loss) for width, loss in row["losses"].items()}
            for row in baseline.get("groups") or ()
            if row.get("losses")
        }
        axes = space.width_axes
        if not all(group.name in known for axis in axes for group in axis.groups):
            return cls(work=work)
        losses = [
            [sum(known[name].get(w, 0.0) for name, w in axis.widths(level).items()) for level in range(axis.size)]
            for axis in axes
        ]
        branches = {row["name"]: float(row["loss"]) for row in baseline.get("branches") or ()}
        losses += [
            [sum(branches.get(name, 0.0) for name in _outer(step)) for step in a.steps] for a in space.depth_axes
        ]
        path = path_levels(space, baseline.get("sensitivity") or ())
        return cls(tuple(np.array(values) for values in losses), path, work)


class PlanWork:
    """Features of what the plans of a space compute (`pruning.latency.features.work_features`), thousands at a time."""

    def __init__(self, space: Space, geometry: NetworkGeometry) -> None:
        self._geometry = geometry
        self._sizes = space.image_sizes
        self._depths = len(space.width_axes) + len(space.depth_axes)
        named = {group.name: place for place, group in enumerate(geometry.groups)}
        # By axis: the columns of `NetworkGeometry.shares` that it decides on, and their values at every level
        self._tables: list[tuple[list[int], Array]] = []
        for axis in space.width_axes:
            places = [named[group.name] for group in axis.groups if group.name in named]
            channels = np.array([geometry.groups[place].channels for place in places], dtype=np.float64)
            widths = [[axis.widths(level)[geometry.groups[p].name] for p in places] for level in range(axis.size)]
            self._tables.append((places, np.array(widths) / channels))
        for depth in space.depth_axes:
            own = sorted({name for step in depth.steps for name in step} & set(geometry.branches))
            places = [len(geometry.groups) + geometry.branches.index(name) for name in own]
            left = [[0.0 if name in step else 1.0 for name in own] for step in depth.steps]
            self._tables.append((places, np.array(left)))

    def __call__(self, levels: Whole) -> Array:
        """Shape (n, features), each a share of the unpruned network's; the first one is all multiply-adds."""
        shares = np.repeat(self._geometry.whole, len(levels), axis=0)
        for axis, (places, values) in enumerate(self._tables):
            shares[:, places] = values[levels[:, axis]]
        size = levels[:, self._depths] if self._sizes else np.zeros(len(levels), dtype=np.int64)
        sizes = [self._sizes[level] if self._sizes else self._geometry.imgsz for level in size]
        found = work_features(self._geometry, shares, sizes)
        return np.hstack([found.macs.sum(axis=1, keepdims=True), found.whole[:, 1:]])  # without the constant


def _outer(branches: Sequence[str]) -> list[str]:
    """Those that lie in no other one of them."""
    return [name for name in branches if not any(name.startswith(f"{other}.") for other in branches)]


def path_levels(space: Space, rows: Sequence[Mapping[str, Any]]) -> Whole:
    """The plans of ``rows`` (``ratios``), each at every size of the input and in every precision: levels (n, d)."""
    choices = list(product(space.image_sizes or (None,), space.precisions or (None,)))
    plans = {
        space.nearest(Plan(row["ratios"], imgsz=size, precision=precision)): None
        for row in rows
        for size, precision in choices
    }
    return np.array(list(plans), dtype=np.int64).reshape(-1, len(space.axes))
