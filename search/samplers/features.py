"""Features of a plan for the surrogate's regressions of cost and loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from paretoprune.base.image_size import area_of
from paretoprune.search.samplers.gaussian_process import FeatureMatrix
from paretoprune.search.samplers.prior import Prior
from paretoprune.search.space.space import Space

Array = NDArray[np.float64]
Whole = NDArray[np.int64]

SHALLOWEST = 0.4  # a removed branch changes a network about as much as this fraction of a layer's channels
TILE = 16  # channels; kernels of CPUs and GPUs work in tiles, so that latency is a staircase of widths


@dataclass(frozen=True)
class PlanFeatures:
    """``kept[i]``: fraction of channels left at every level of axis i; ``tiled[i]``: the same in whole tiles.

    ``depths[i]``: how much is left at every level of the next axes, those of branches, on the scale of ``kept``.
    ``areas``: the input's area at every level of the next axis, as a fraction of the run's; empty where there is no
    such axis. ``precisions``: how many there are, of the last axis; 0 without one. ``losses[i]``: what the removal's
    scores estimate that every level of axis i loses, of widths, then of depth, in units of a usual plan's sum; empty
    without such scores. ``work``: what plans (n, d) compute, shares of the unpruned network (n, k), the first one all
    multiply-adds; None where that is not known.
    """

    kept: tuple[Array, ...]
    tiled: tuple[Array, ...]
    depths: tuple[Array, ...] = ()
    areas: Array = field(default_factory=lambda: np.empty(0))
    precisions: int = 0
    losses: tuple[Array, ...] = ()
    work: Callable[[Whole], Array] | None = None

    @classmethod
    def of(cls, space: Space, prior: Prior | None = None) -> PlanFeatures:
        """By the widths of each axis's leading group, the branches, the input's size, the precision, the estimates."""
        widths = [(axis.groups[0].widths, axis.groups[0].channels) for axis in space.width_axes]
        areas = np.array([area_of(size) for size in space.image_sizes], dtype=np.float64)
        depths = tuple(np.linspace(1.0, SHALLOWEST, axis.size) for axis in space.depth_axes)
        more = {"depths": depths, "areas": areas / areas.max(initial=1.0), "precisions": len(space.precisions)}
        prior = prior or Prior()
        return replace(cls.of_widths(widths), losses=prior.in_usual_units(), work=prior.work, **more)

    @classmethod
    def of_widths(cls, axes: Sequence[tuple[Sequence[int], int]]) -> PlanFeatures:
        """``axes``: widths by level, and channels when unpruned."""
        kept = tuple(np.array(widths) / channels for widths, channels in axes)
        tiled = tuple(np.ceil(np.array(widths) / TILE) / np.ceil(channels / TILE) for widths, channels in axes)
        return cls(kept, tiled)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of levels of each axis."""
        return (*map(len, self._columns), *([self.precisions] if self.precisions else []))

    @property
    def shared(self) -> int:
        """How many of the last axes are of the whole network: its input's size, its precision."""
        return bool(len(self.areas)) + bool(self.precisions)

    @property
    def _columns(self) -> tuple[Array, ...]:
        return (*self.kept, *self.depths, *([self.areas] if len(self.areas) else []))

    def design(self, levels: Whole) -> FeatureMatrix:
        """Plans (n, d) of levels as the surrogate wants them.

        Families: where the loss of levels is estimated, functions of their sum come first: accuracy falls with it, fast
        at first or only later, which two trials are enough to tell, and not without end. It is believed to explain
        most, so its columns are larger. Then fractions kept; their squares (loss grows faster than the ratio);
        multiply-adds; what else a convolution's time depends on. Where the network's work is not known, fractions in
        whole tiles and products of neighbouring axes in whole tiles (a convolution costs input times output), times the
        input's area, take the place of the last two: on the synthetic problem they raise the share of the front after
        100 trials from 0.90 to 0.93. The area alone, which costs as much accuracy as many layers together. In each
        further precision everything costs something else: the costs once more, of the plans in it.
        """
        levels = levels.reshape(-1, len(self.sizes))
        columns = self._columns
        kept = self._looked_up(columns, levels)
        area = kept[:, -1:] if len(self.areas) else np.ones((len(levels), 1))
        tiled = self._looked_up(self.tiled, levels)
        low = np.array([values.min() for values in columns])
        span = np.array([np.ptp(values) or 1.0 for values in columns])
        if self.work is None:
            costs = [area * tiled, area * tiled[:, 1:] * tiled[:, :-1]]
        else:
            work = self.work(levels)
            costs = [work[:, :1], work[:, 1:]]
        families = [kept, kept**2, *costs]
        if len(self.areas):
            families.append(np.hstack([area, area**2]))
        if self.losses:
            lost = self.lost(levels)
            families.insert(0, 4 * np.hstack([np.log1p(lost), lost / (1 + lost)]))
        points, scaled = (kept - low) / span, tuple(_scaled(family) for family in families)
        if not self.precisions:
            return FeatureMatrix(points, scaled)
        other = (levels[:, -1:] == np.arange(1, self.precisions)).astype(np.float64)  # (n, precisions - 1)
        again = [other[:, [index]] * np.hstack([_scaled(cost) for cost in costs]) for index in range(other.shape[1])]
        return FeatureMatrix(np.hstack([points, other]), (*scaled, np.hstack([other, *again])))

    def lost(self, levels: Whole) -> Array:
        """Estimated loss of plans (n, d), shape (n, 1); needs `losses`."""
        return self._looked_up(self.losses, levels).sum(axis=1, keepdims=True)

    @staticmethod
    def _looked_up(table: tuple[Array, ...], levels: Whole) -> Array:
        return np.stack([values[levels[:, axis]] for axis, values in enumerate(table)], axis=1)


def _scaled(family: Array) -> Array:
    """Centred on 0.6, about where plans lie, and divided so that all columns together count as one."""
    return np.asarray((family - 0.6) / (0.25 * np.sqrt(max(1, family.shape[1]))))
