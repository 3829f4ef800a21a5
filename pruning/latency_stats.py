"""The statistics of a paired latency measurement: pure functions of the timed series.

Two models are timed in turn, in blocks A B B A (A the candidate, B the baseline): within such a quad a clock that
drifts linearly slows both alike and cancels. The unit of the statistics is the quad, since single inferences follow one
another and are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

_RESAMPLES = 1000


@dataclass(frozen=True)
class Quad:
    """One A B B A: the times of all inferences of its two candidate blocks and of its two baseline blocks, ms."""

    candidate: tuple[tuple[float, ...], tuple[float, ...]]
    baseline: tuple[tuple[float, ...], tuple[float, ...]]

    @property
    def log_speedup(self) -> float:
        """log(baseline / candidate): each block counts with its median, the two blocks of a model with their mean.

        The median within a block shrugs off an inference that the operating system interrupted.
        """
        baseline, candidate = (
            float(np.mean([np.median(block) for block in blocks])) for blocks in (self.baseline, self.candidate)
        )
        return math.log(baseline / candidate)


@dataclass(frozen=True)
class Speedup:
    """A speed-up (baseline time over candidate time, > 1: the candidate is faster) and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def halfwidth(self) -> float:
        """Half the interval's width as a fraction of the value."""
        return (self.high - self.low) / (2 * self.value)


def speedup(quads: Sequence[Quad], seed: int = 0) -> Speedup:
    """Median over the quads of their speed-ups, with a 95 % percentile interval by circular block bootstrap.

    Blocks of about n^(1/3) neighbouring quads are resampled (Politis and Romano 1992), so that what slow noise is left
    between quads widens the interval as it should. Deterministic for a given `seed`. One quad gives an interval of
    infinite width; none raises ValueError, as does a time that is not positive and finite.
    """
    if not quads:
        raise ValueError("a speed-up needs at least one quad of blocks, but got none")
    logs = np.array([quad.log_speedup for quad in quads], dtype=np.float64)
    if not np.isfinite(logs).all():
        raise ValueError("timed values must be positive and finite")
    centre = float(np.median(logs))
    if len(logs) == 1:
        return Speedup(math.exp(centre), 0.0, math.inf)
    medians = np.median(_resampled(logs, np.random.default_rng(seed)), axis=1)
    # A median of few quads varies more than its bootstrap shows (the resamples are of n values, spread n - 1)
    widen = math.sqrt(len(logs) / (len(logs) - 1))
    low, high = np.quantile(medians, [0.025, 0.975])
    return Speedup(math.exp(centre), math.exp(centre - widen * (centre - low)), math.exp(centre + widen * (high - centre)))


def _resampled(values: FloatArray, generator: np.random.Generator) -> FloatArray:
    """(_RESAMPLES, n) circular block resamples of `values` (n,)."""
    n = len(values)
    length = max(1, round(n ** (1 / 3)))
    starts = generator.integers(0, n, size=(_RESAMPLES, math.ceil(n / length)))
    indices = (starts[:, :, None] + np.arange(length)) % n
    picked: FloatArray = values[indices.reshape(_RESAMPLES, -1)[:, :n]]
    return picked


def is_settled(times: Sequence[float], window: int = 5, tolerance: float = 0.03) -> bool:
    """Whether a series of times (ms) has stopped falling: the medians of its last two windows differ by little.

    Settled means that the earlier window's median is at most `tolerance` (a fraction) above the later one's. A series
    shorter than two windows is not settled.
    """
    if len(times) < 2 * window:
        return False
    later = float(np.median(times[-window:]))
    earlier = float(np.median(times[-2 * window : -window]))
    return earlier <= later * (1 + tolerance)


def inferences_per_block(single_ms: float, block_ms: float = 20.0, most: int = 200) -> int:
    """How many inferences make a block of about `block_ms`, given the time of one: between 1 and `most`."""
    return int(min(most, max(1, math.ceil(block_ms / max(single_ms, 1e-6)))))
