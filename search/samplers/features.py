"""Features of a plan for the surrogate's regressions of cost and loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paretoprune.search.samplers.gaussian_process import Design
from paretoprune.search.space.space import Space

Array = NDArray[np.float64]
Whole = NDArray[np.int64]

TILE = 16  # channels; kernels of CPUs and GPUs work in tiles, so that latency is a staircase of widths


@dataclass(frozen=True)
class PlanFeatures:
    """``kept[i]``: fraction of channels left at every level of axis i; ``tiled[i]``: the same in whole tiles."""

    kept: tuple[Array, ...]
    tiled: tuple[Array, ...]

    @classmethod
    def of(cls, space: Space) -> PlanFeatures:
        """By the widths of each axis's leading group."""
        return cls.of_widths([(axis.groups[0].widths, axis.groups[0].channels) for axis in space.axes])

    @classmethod
    def of_widths(cls, axes: Sequence[tuple[Sequence[int], int]]) -> PlanFeatures:
        """``axes``: widths by level, and channels when unpruned."""
        kept = tuple(np.array(widths) / channels for widths, channels in axes)
        tiled = tuple(np.ceil(np.array(widths) / TILE) / np.ceil(channels / TILE) for widths, channels in axes)
        return cls(kept, tiled)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of levels of each axis."""
        return tuple(len(values) for values in self.kept)

    def design(self, levels: Whole) -> Design:
        """Plans (n, d) of levels as the surrogate wants them.

        Families: fractions kept; their squares (loss grows faster than the ratio); fractions in whole tiles; products
        of neighbouring axes in whole tiles (a convolution costs input times output). Measured on the synthetic problem:
        the last two raise the share of the front after 100 trials from 0.90 to 0.93; products of the fractions
        themselves, as well as tiled ones, take a hundredth away again.
        """
        levels = levels.reshape(-1, len(self.kept))
        kept = self._looked_up(self.kept, levels)
        tiled = self._looked_up(self.tiled, levels)
        low = np.array([values.min() for values in self.kept])
        span = np.array([np.ptp(values) or 1.0 for values in self.kept])
        families = (kept, kept**2, tiled, tiled[:, 1:] * tiled[:, :-1])
        return Design((kept - low) / span, tuple(_scaled(family) for family in families))

    @staticmethod
    def _looked_up(table: tuple[Array, ...], levels: Whole) -> Array:
        return np.stack([values[levels[:, axis]] for axis, values in enumerate(table)], axis=1)


def _scaled(family: Array) -> Array:
    """Centred on 0.6, about where plans lie, and divided so that all columns together count as one."""
    return np.asarray((family - 0.6) / (0.25 * np.sqrt(max(1, family.shape[1]))))
