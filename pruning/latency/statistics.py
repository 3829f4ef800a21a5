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
from scipy.special import ndtri, stdtrit

FloatArray = npt.NDArray[np.float64]

SESSION_SD = 0.01
"""Standard deviation of a speed-up's logarithm between sessions, beyond what a session of some seconds shows.

Measured, not derived: yolov8n pruned by half at 320 pixels, one thread of a virtual machine (AMD EPYC), 1,217 quads in
150 s. Means of 5 s moved with the machine's momentary speed, with a standard deviation of 1.2 %, and hardly less over
10 s; a calmer machine deserves less, and gets intervals that are too wide rather than too narrow.
"""

FEWEST_QUADS = 4
"""Of a measurement, however short its time: Student's quantile is 12.7 over two quads, 3.2 over four."""

_RESAMPLES = 1000
_MOST_CORRELATION = 0.95  # beyond it a few dozen quads say nothing


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
        if not (0 < candidate < math.inf and 0 < baseline < math.inf):
            raise ValueError(f"times must be positive and finite, but got medians of {candidate} and {baseline} ms")
        return math.log(baseline / candidate)


@dataclass(frozen=True)
class Speedup:
    """A speed-up (baseline time over candidate time, > 1: the candidate is faster) and its 95 % interval.

    As `speedup` gives it, the interval of one session; published is `with_session_variance` of it, as `speedup_ci95`.
    """

    value: float
    low: float
    high: float

    @property
    def halfwidth(self) -> float:
        """Half the interval's width as a fraction of the value."""
        return (self.high - self.low) / (2 * self.value)


def speedup(quads: Sequence[Quad], seed: int = 0) -> Speedup:
    """Interquartile mean over the quads of their speed-ups, with a 95 % interval by circular block bootstrap.

    Means are of logarithms, so swapping the models inverts the figure. Blocks of neighbouring quads are resampled
    (Politis and Romano 1992), the longer the more the quads follow one another: at least n^(1/3), and what Andrews
    (1991, Econometrica 59, eq. 6.4 with Bartlett's weights) gives for a first-order autoregression of their estimated
    correlation, at most n / 3. What such blocks miss of that autoregression's variance is made up for by its closed
    form, and the quantiles are widened by Student's t over the number of blocks. Simulated (`benchmarks/latency.py
    coverage`): 95 to 98 % covered on independent quads, 92 to 95 % at a correlation of 0.6 from 28 quads on, where
    blocks of n^(1/3) alone covered 85 to 90 %. Noise that lasts longer than the measurement cannot be seen in it.
    Deterministic for a `seed`. One quad gives an interval of infinite width; none raises ValueError, as does a time
    that is not positive and finite.
    """
    if not quads:
        raise ValueError("a speed-up needs at least one quad of blocks, but got none")
    logs = np.array([quad.log_speedup for quad in quads], dtype=np.float64)
    centre = float(_interquartile_mean(logs))
    if len(logs) == 1:
        return Speedup(math.exp(centre), 0.0, math.inf)
    correlation = neighbours_correlation(logs)
    length = _block_length(len(logs), correlation)
    resamples = _resampled(logs, length, np.random.default_rng(seed))
    low, high = np.quantile(_interquartile_mean(resamples), [0.025, 0.975])
    blocks = len(logs) / length
    student = math.sqrt(blocks / (blocks - 1)) * float(stdtrit(blocks - 1, 0.975) / ndtri(0.975))
    widen = student * _missed_by_blocks(length, correlation)
    return Speedup(
        math.exp(centre), math.exp(centre - widen * (centre - low)), math.exp(centre + widen * (high - centre))
    )


def with_session_variance(found: Speedup) -> Speedup:
    """The interval that another measurement at another time must also satisfy: `SESSION_SD` added in quadrature.

    A speed-up is not one number on a machine whose clock, caches and neighbours change from minute to minute: the
    slower the moment, the less of it is left, and a few seconds see one moment only.
    """
    if found.low <= 0 or math.isinf(found.high):
        return found
    extra, centre = float(ndtri(0.975)) * SESSION_SD, math.log(found.value)
    below, above = (math.hypot(math.log(bound) - centre, extra) for bound in (found.low, found.high))
    return Speedup(found.value, math.exp(centre - below), math.exp(centre + above))


def agree(one: Speedup, other: Speedup) -> bool:
    """Whether two independent measurements are of one speed-up: the 95 % interval of their difference holds zero.

    On the logarithm, where the difference's half width is the root of the sum of the squared half widths. (Two 95 %
    intervals that merely overlap are a weaker statement: they still do for differences that are significant.)
    """
    halves = (math.log(each.high / each.low) / 2 if each.low > 0 else math.inf for each in (one, other))
    return abs(math.log(one.value / other.value)) <= math.hypot(*halves)


def neighbours_correlation(values: FloatArray) -> float:
    """Lag-one autocorrelation of `values` (n >= 2,), in [0, 0.95]; a negative one counts as none.

    Of values held between their deciles, so that one interrupted quad does not hide it; corrected for the bias of short
    series (Kendall 1954: the estimate is about (1 + 3 rho) / n too low).
    """
    held = np.clip(values, *np.quantile(values, [0.1, 0.9]))
    deviations = held - held.mean()
    variance = float((deviations**2).sum())
    if variance <= 0:
        return 0.0
    estimate = float((deviations[1:] * deviations[:-1]).sum()) / variance
    return min(_MOST_CORRELATION, estimate + (1 + 3 * estimate) / len(values)) if estimate > 0 else 0.0


def _block_length(count: int, correlation: float) -> int:
    """Quads per block of the bootstrap; see `speedup`."""
    andrews = (math.sqrt(6) * correlation / (1 - correlation**2)) ** (2 / 3)
    return max(1, round(min(max(1.0, andrews) * count ** (1 / 3), count / 3)))


def _missed_by_blocks(length: int, correlation: float) -> float:
    """Standard error of a mean of a first-order autoregression over what blocks of `length` see of it, >= 1."""
    lags = np.arange(1, length)
    seen = 1 + 2 * float(((1 - lags / length) * correlation**lags).sum())
    return math.sqrt((1 + correlation) / (1 - correlation) / seen)


def _interquartile_mean(values: FloatArray) -> FloatArray:
    """(..., n) -> (...): the mean without the lowest and the highest quarter."""
    ordered = np.sort(values, axis=-1)
    cut = ordered.shape[-1] // 4
    return np.asarray(ordered[..., cut : ordered.shape[-1] - cut].mean(axis=-1), dtype=np.float64)


def _resampled(values: FloatArray, length: int, generator: np.random.Generator) -> FloatArray:
    """(_RESAMPLES, n) resamples of `values` (n,), each of circular blocks of `length` neighbours."""
    n = len(values)
    starts = generator.integers(0, n, size=(_RESAMPLES, math.ceil(n / length)))
    indices = (starts[:, :, None] + np.arange(length)) % n
    picked: FloatArray = values[indices.reshape(_RESAMPLES, -1)[:, :n]]
    return picked


def is_steady(times: Sequence[float], window: int = 5, tolerance: float = 0.03) -> bool:
    """Whether a series of times (ms) has stopped falling: the medians of its last two windows differ by little.

    Settled means that the earlier window's median is at most `tolerance` (a fraction) above the later one's. A series
    shorter than two windows is not settled.
    """
    if len(times) < 2 * window:
        return False
    later = float(np.median(times[-window:]))
    earlier = float(np.median(times[-2 * window : -window]))
    return earlier <= later * (1 + tolerance)


def block_length_ms(max_seconds: float, blocks: int) -> float:
    """20 ms, or less where so many blocks would not fit into the time: many short ones tell more than few long ones."""
    return min(20.0, 1e3 * max_seconds / blocks)


def inferences_per_block(warm_ms: Sequence[float], block_ms: float = 20.0, most: int = 200) -> int:
    """How many inferences make a block of about `block_ms`, given those of a warm-up: between 1 and `most`.

    By the fastest of its last ones: on a busy machine the others were interrupted, and taken for the network's own time
    would leave blocks of one, whose median is no shield against the next interruption.
    """
    return int(min(most, max(1, math.ceil(block_ms / max(min(warm_ms[-10:]), 1e-6)))))
