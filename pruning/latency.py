"""Latency of a network, always beside the unpruned one: interleaved blocks, detected warm-up, an interval."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from pruning.errors import PruningError
from pruning.evaluation_gate import torch_device
from pruning.latency_runtimes import Session, open_session
from pruning.latency_stats import Quad, Speedup, inferences_per_block, is_settled, speedup

_FEWEST_QUADS = 12  # an interval from fewer is too uncertain itself to stop on
_LOOK_EVERY = 4  # quads between two looks at the interval: looking after each would stop on lucky streaks
_WARMUP_SHARE = 0.3  # of max_seconds, at most


@dataclass(frozen=True)
class LatencyResult:
    """A candidate's latency and its speed-up over the baseline measured in the same minutes. Times in milliseconds.

    `median_ms`, `p90_ms`: of all `iterations` timed inferences of the candidate; `baseline_median_ms`: of as many of
    the baseline. `speedup`: baseline time / candidate time over the paired A B B A quads, with its 95 % interval.
    `blocks`: timed blocks of both models together. `converged`: the interval's half-width reached the target; if not,
    the time was up. `warmup_iterations`: inferences of each model before the first timed one.
    """

    median_ms: float
    p90_ms: float
    iterations: int
    baseline_median_ms: float
    speedup: float
    speedup_ci95: tuple[float, float]
    blocks: int
    device: str
    threads: int
    imgsz: int
    batch: int
    runtime: str
    converged: bool
    warmup_iterations: int
    precision: str = "fp32"

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types."""
        return {**asdict(self), "speedup_ci95": list(self.speedup_ci95)}


@dataclass(frozen=True)
class PairedTimes:
    """What `time_pair` measured, before it is given names and units of a device."""

    quads: tuple[Quad, ...]
    speedup: Speedup
    converged: bool
    warmup_iterations: int

    def all_ms(self, which: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        """All times of `candidate` or `baseline`, in the order they were taken."""
        return np.concatenate([block for quad in self.quads for block in getattr(quad, which)])


def measure_pair(
    candidate: nn.Module,
    baseline: nn.Module,
    imgsz: int,
    device: str = "cpu",
    batch: int = 1,
    threads: int | None = None,
    max_seconds: float = 4.0,
    target_halfwidth: float = 0.01,
    runtime: str = "torch",
) -> LatencyResult:
    """Time `candidate` and `baseline` (unpruned) in turn on one device until their ratio is known well enough.

    Goes on until the half-width of the speed-up's 95 % interval is at most `target_halfwidth` (a fraction) or
    `max_seconds` are over, warm-up included, preparation not. `threads`: torch's threads on the CPU while measuring
    (None: as they are); put back afterwards. The caller keeps the device free of others. Both models are copied; they
    may be the same object. Raises PruningError for a runtime, device or bound that is not usable.
    """
    _check_bounds(imgsz, batch, threads, max_seconds, target_halfwidth)
    place = torch_device(device)
    with _torch_threads(threads):
        sessions = [open_session(model, imgsz, device, batch, runtime) for model in (candidate, baseline)]
        with _no_garbage_collection():
            times = time_pair(sessions[0], sessions[1], max_seconds, target_halfwidth)
        used_threads = torch.get_num_threads()
    own = times.all_ms("candidate")
    return LatencyResult(
        median_ms=float(np.median(own)),
        p90_ms=float(np.quantile(own, 0.9)),
        iterations=len(own),
        baseline_median_ms=float(np.median(times.all_ms("baseline"))),
        speedup=times.speedup.value,
        speedup_ci95=(times.speedup.low, times.speedup.high),
        blocks=4 * len(times.quads),
        device=torch.cuda.get_device_name(place) if place.type == "cuda" else place.type,
        threads=used_threads,
        imgsz=imgsz,
        batch=batch,
        runtime=runtime,
        converged=times.converged,
        warmup_iterations=times.warmup_iterations,
    )


def time_pair(
    candidate: Session,
    baseline: Session,
    max_seconds: float,
    target_halfwidth: float,
    clock: Callable[[], float] = time.perf_counter,
) -> PairedTimes:
    """Warm both sessions up, then time quads A B B A until the target or the time is reached; at least two quads."""
    end = clock() + max_seconds
    warm = _warm_up(candidate, baseline, clock() + _WARMUP_SHARE * max_seconds, clock)
    counts = [inferences_per_block(float(np.median(series[-3:]))) for series in warm]
    candidate.time_ms()  # the warm-up ended with the baseline
    quads: list[Quad] = []
    while True:
        quads.append(_time_quad(candidate, baseline, counts))
        time_is_up = len(quads) >= 2 and clock() >= end
        look = len(quads) >= _FEWEST_QUADS and len(quads) % _LOOK_EVERY == 0
        if not (time_is_up or look):
            continue
        result = speedup(quads)
        converged = len(quads) >= _FEWEST_QUADS and result.halfwidth <= target_halfwidth
        if converged or time_is_up:
            return PairedTimes(tuple(quads), result, converged, warmup_iterations=len(warm[0]))


def _warm_up(
    candidate: Session, baseline: Session, end: float, clock: Callable[[], float]
) -> tuple[list[float], list[float]]:
    """Run both in turn until the times of both have stopped falling or `end` is reached; their times, ms."""
    ours: list[float] = []
    theirs: list[float] = []
    while True:
        ours.append(candidate.time_ms())
        theirs.append(baseline.time_ms())
        if (is_settled(ours) and is_settled(theirs)) or clock() >= end:
            return ours, theirs


def _time_quad(candidate: Session, baseline: Session, counts: list[int]) -> Quad:
    """One A B B A. The first inference after a change of model is run but not counted: the caches hold the other's."""
    first = _block(candidate, counts[0])  # follows an A block, of the quad before or of the warm-up's end
    baseline.time_ms()
    second, third = _block(baseline, counts[1]), _block(baseline, counts[1])
    candidate.time_ms()
    return Quad((first, _block(candidate, counts[0])), (second, third))


def _block(session: Session, count: int) -> tuple[float, ...]:
    return tuple(session.time_ms() for _ in range(count))


def _check_bounds(imgsz: int, batch: int, threads: int | None, max_seconds: float, target_halfwidth: float) -> None:
    bounds = {"imgsz": imgsz, "batch": batch, "max_seconds": max_seconds, "target_halfwidth": target_halfwidth}
    for name, value in {**bounds, "threads": 1 if threads is None else threads}.items():
        if not value > 0:
            raise PruningError(f"`{name} > 0` must hold, but got {name}={value}")
    if imgsz % 32:
        raise PruningError(f"imgsz must be a multiple of 32, but got {imgsz}: use {max(32, round(imgsz / 32) * 32)}")


@contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before if threads is None else threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection in the middle of a block would be counted as the model's time."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
