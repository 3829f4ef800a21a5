"""Latency of a network, always beside the unpruned one: interleaved blocks, detected warm-up, an interval."""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from paretoprune.base.device_gate import DeviceGate
from paretoprune.base.image_size import ImageSize
from paretoprune.pruning.device import NullGate, device_synchronizer, torch_device
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.latency.device_state import Conditions, DeviceMonitor, watch
from paretoprune.pruning.latency.images import ImageStream
from paretoprune.pruning.latency.malloc import malloc_trim_disabled
from paretoprune.pruning.latency.runtimes import ExportCache, Session, SessionSpec, Timeable, open_session
from paretoprune.pruning.latency.statistics import (
    FEWEST_QUADS,
    Quad,
    Speedup,
    block_length_ms,
    inferences_per_block,
    is_steady,
    speedup,
    with_session_variance,
)
from paretoprune.pruning.names import SpanName
from paretoprune.pruning.yolo.image_size import check_image_size, stride_of

_QUADS_TO_STOP = 24  # an interval from fewer is too uncertain itself to stop on, and has seen too little of slow noise
_LOOK_EVERY = 4  # quads between two looks at the interval: looking after each would stop on lucky streaks
WARMUP_SHARE = 0.3  # of max_seconds, at most
_LAZY = 2  # inferences in which a runtime allocates memory and chooses kernels: they need no device of their own
PATIENCE = 4.0  # times the usual seconds, for a measurement that a noisy machine would make useless
USEFUL_HALFWIDTH = 0.1  # of an interval that tells something, as a fraction of the speed-up


@dataclass(frozen=True)
class LatencyResult:
    """A candidate's latency and its speed-up over the baseline measured in the same minutes. Times in milliseconds.

    `median_ms`, `p90_ms`, `p99_ms`: of all `iterations` timed inferences of the candidate; `baseline_median_ms`: of as
    many of the baseline. `span`: what an inference is, "network" (up to the decoded boxes) or "predict" (Ultralytics'
    pre-processing, network and post-processing, on `images`). `images_per_s`, `baseline_images_per_s`: with `streams`
    inferences at the same time, each of `batch` images. `peak_memory_mb` ...: of a process of its own, where that was
    asked for (see `pruning.latency.memory`).
    `speedup`: baseline time / candidate time over the paired A B B A quads. `speedup_ci95`: the 95 % interval for
    another measurement at another time: the session's by block bootstrap, widened by what sessions differ among
    themselves (`with_session_variance`); it means this wherever the name is used.
    `session_halfwidth`: of the bootstrap's interval alone, as a fraction; `converged`: it reached `target_halfwidth`;
    if not, the time was up. `blocks`: timed blocks of both models together. `warmup_iterations`: inferences of each
    model before the first timed one.

    What it was measured on and with: `device` ("cpu" or the GPU's name), `threads` (None on a GPU), `precision`
    ("fp32", "fp16", "bf16", "int8") and `baseline_precision`, `runtime` and its `runtime_version`, `host`, and the
    device's state (see `Conditions`; None: cannot be read here).
    """

    median_ms: float
    p90_ms: float
    p99_ms: float
    iterations: int
    baseline_median_ms: float
    speedup: float
    speedup_ci95: tuple[float, float]
    blocks: int
    device: str
    threads: int | None
    imgsz: ImageSize
    batch: int
    runtime: str
    converged: bool
    warmup_iterations: int
    images_per_s: float
    baseline_images_per_s: float
    streams: int = 1
    span: SpanName = "network"
    images: str | None = None
    peak_memory_mb: float | None = None
    baseline_peak_memory_mb: float | None = None
    peak_device_memory_mb: float | None = None
    baseline_peak_device_memory_mb: float | None = None
    precision: str = "fp32"
    baseline_precision: str = "fp32"
    runtime_version: str = ""
    host: str = ""
    seconds: float = 0.0
    session_halfwidth: float = 0.0
    target_halfwidth: float = 0.01
    conditions: Conditions = field(default_factory=lambda: Conditions(""))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types, those of `conditions` among them."""
        content = {**asdict(self), "speedup_ci95": list(self.speedup_ci95)}
        content["imgsz"] = self.imgsz if isinstance(self.imgsz, int) else list(self.imgsz)
        conditions = content.pop("conditions")
        reasons = conditions["throttle_reasons"]
        return {**content, **conditions, "throttle_reasons": None if reasons is None else list(reasons)}


class Timed(Protocol):
    """Anything whose inferences can be timed one by one; see `pruning.latency.runtimes.base.Session`."""

    def time_ms(self) -> float:
        """Run one inference to its end; milliseconds."""
        ...


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
    candidate: Timeable,
    baseline: Timeable,
    imgsz: ImageSize,
    device: str = "cpu",
    batch: int = 1,
    threads: int | None = None,
    max_seconds: float = 4.0,
    target_halfwidth: float = 0.01,
    runtime: str = "torch",
    half: bool = False,
    exports: ExportCache | None = None,
    gate: DeviceGate | None = None,
    patience: float = 1.0,
    baseline_imgsz: ImageSize | None = None,
    stream: ImageStream | None = None,
    streams: int = 1,
) -> LatencyResult:
    """Time `candidate` and `baseline` (unpruned) in turn on one device until their ratio is known well enough.

    `imgsz`: of the candidate's images; `baseline_imgsz`: of the baseline's, None for the same.

    Goes on until the half-width of the session's 95 % interval is at most `target_halfwidth` (a fraction) or
    `max_seconds` are over, warm-up included, preparation not. `threads`: the runtime's threads on the CPU while
    measuring (None: torch's, as they are); torch's are put back afterwards. `half`: FP16/BF16 if the device
    supports it natively. Both models are copied; they may be the same object.
    `patience`: times `max_seconds` that it may take in all while the published interval's half-width is above
    `USEFUL_HALFWIDTH`, since a figure that a busy machine blurs misleads a search for good.
    `gate` keeps the device free of others while it is timed; making the networks ready shares it, since that takes
    longer than the timing where a runtime compiles them. Without one, the caller keeps others away.
    `exports` keeps what the runtime needs of a network for the next measurement of the same network.
    `stream`: images on which Ultralytics' whole predict is timed, of networks in PyTorch or what is deployed; None: the
    network alone is. `streams`: so many inferences at the same time, a thread each, for the throughput of both, which
    with more than one takes up to `max_seconds` more.
    Raises PruningError for a runtime, device, precision or bound that is not usable.
    """
    _check_bounds(batch, threads, max_seconds, target_halfwidth, streams)
    sizes = imgsz, imgsz if baseline_imgsz is None else baseline_imgsz
    for network, size in zip((candidate, baseline), sizes, strict=True):
        check_image_size(size, stride_of(network), "the network")
    place = torch_device(device)
    with ExitStack() as stack:
        stack.enter_context(_torch_threads(threads))
        stack.enter_context(malloc_trim_disabled())
        specs = [SessionSpec(size, device, batch, half, torch.get_num_threads(), stream) for size in sizes]
        door = gate or NullGate()
        with door.using():
            sessions = _made_ready((candidate, baseline) * streams, specs * streams, runtime, exports or ExportCache())
        first, second = sessions[:2]
        stack.enter_context(door.measuring())
        stack.enter_context(_no_garbage_collection())
        device_watch = watch(place)
        begun = time.perf_counter()
        how: dict[str, Any] = {"device_watch": device_watch, "patience": patience}
        if stream is not None:
            stream.at, how["advance"] = 0, lambda: stream.advance(batch)
        times = time_pair(first, second, max_seconds, target_halfwidth, **how)
        seconds, conditions = time.perf_counter() - begun, device_watch.finish()
        measured = figures(times, batch)
        if streams > 1:
            rates = images_per_second(sessions[::2], sessions[1::2], batch, max_seconds, how.get("advance"))
            measured |= {"images_per_s": rates[0], "baseline_images_per_s": rates[1], "streams": streams}
    return LatencyResult(
        **measured,
        span="network" if stream is None else "predict",
        images=None if stream is None else stream.source,
        device=conditions.device_name if place.type == "cuda" else place.type,
        threads=first.threads,
        imgsz=imgsz,
        batch=batch,
        runtime=runtime,
        precision=first.precision,
        baseline_precision=second.precision,
        runtime_version=first.version,
        host=platform.node(),
        seconds=seconds,
        target_halfwidth=target_halfwidth,
        conditions=conditions,
    )


def _made_ready(
    networks: Sequence[Timeable], specs: Sequence[SessionSpec], runtime: str, exports: ExportCache
) -> list[Session]:
    """A session of each network that has run already, nothing of it still under way on the device."""
    sessions = [open_session(network, spec, runtime, exports) for network, spec in zip(networks, specs, strict=True)]
    for session in sessions:
        for _ in range(_LAZY):
            session.time_ms()
    finish = device_synchronizer(torch_device(specs[0].device))
    if finish is not None:
        finish()  # what the GPU still has to do would run on beside another's timing
    return sessions


def figures(times: PairedTimes, batch: int) -> dict[str, Any]:
    """What a LatencyResult says of the times themselves."""
    own, theirs = times.all_ms("candidate"), times.all_ms("baseline")
    interval = with_session_variance(times.speedup)
    return {
        "median_ms": float(np.median(own)),
        "p90_ms": float(np.quantile(own, 0.9)),
        "p99_ms": float(np.quantile(own, 0.99)),
        "iterations": len(own),
        "baseline_median_ms": float(np.median(theirs)),
        "images_per_s": 1e3 * batch / float(own.mean()),
        "baseline_images_per_s": 1e3 * batch / float(theirs.mean()),
        "speedup": times.speedup.value,
        "speedup_ci95": (interval.low, interval.high),
        "session_halfwidth": times.speedup.halfwidth,
        "blocks": 4 * len(times.quads),
        "converged": times.converged,
        "warmup_iterations": times.warmup_iterations,
    }


def time_pair(
    candidate: Timed,
    baseline: Timed,
    max_seconds: float,
    target_halfwidth: float,
    clock: Callable[[], float] = time.perf_counter,
    device_watch: DeviceMonitor | None = None,
    patience: float = 1.0,
    advance: Callable[[], None] | None = None,
) -> PairedTimes:
    """Warm both sessions up, then time quads A B B A until the target or the time is reached; four at least.

    Fewer would give an interval that says nothing, so slow networks may take longer than `max_seconds`.
    `device_watch` is looked at between quads, where it delays no timed inference. `patience`: see `measure_pair`.
    `advance`: called between quads, gives both other input.
    """
    begun = clock()
    warm = _warm_up(candidate, baseline, clock() + WARMUP_SHARE * max_seconds, clock)
    block_ms = pair_block_ms(max_seconds)
    counts = [inferences_per_block(series, block_ms) for series in warm]
    candidate.time_ms()  # the warm-up ended with the baseline

    def timed() -> Iterator[Quad]:
        while True:
            yield _time_quad(candidate, baseline, counts)
            if advance is not None:
                advance()
                candidate.time_ms()  # not counted: the caches hold the input before

    return until_known(timed(), len(warm[0]), begun, max_seconds, target_halfwidth, clock, device_watch, patience)


def until_known(
    timed: Iterable[Quad],
    warmup_iterations: int,
    begun: float,
    max_seconds: float,
    target_halfwidth: float,
    clock: Callable[[], float] = time.perf_counter,
    device_watch: DeviceMonitor | None = None,
    patience: float = 1.0,
) -> PairedTimes:
    """Take quads, wherever they are timed, until the target or the time is reached; see `time_pair`.

    `begun`: when the warm-up began, by `clock`. Where `timed` ends before that, what came until then counts; fewer than
    four quads raise PruningError.
    """
    end, latest = begun + max_seconds, begun + patience * max_seconds
    quads: list[Quad] = []
    for quad in timed:
        quads.append(quad)
        if device_watch is not None and len(quads) % _LOOK_EVERY == 1:
            device_watch.look()
        overtime = len(quads) >= FEWEST_QUADS and clock() >= end
        time_is_up = overtime and clock() >= latest
        look = len(quads) % _LOOK_EVERY == 0 and (overtime or len(quads) >= _QUADS_TO_STOP)
        if not (time_is_up or look):
            continue
        result = speedup(quads)
        converged = len(quads) >= _QUADS_TO_STOP and result.halfwidth <= target_halfwidth
        useful = overtime and with_session_variance(result).halfwidth <= USEFUL_HALFWIDTH
        if converged or useful or time_is_up:
            return PairedTimes(tuple(quads), result, converged, warmup_iterations)
    if len(quads) < FEWEST_QUADS:
        raise PruningError(
            f"a measurement needs {FEWEST_QUADS} rounds at least, but it ended after {len(quads)}; give it more time"
        )
    result = speedup(quads)
    converged = len(quads) >= _QUADS_TO_STOP and result.halfwidth <= target_halfwidth
    return PairedTimes(tuple(quads), result, converged, warmup_iterations)


def pair_block_ms(max_seconds: float) -> float:
    """Length of a block of a measurement that may take so long, warm-up included."""
    return block_length_ms((1 - WARMUP_SHARE) * max_seconds, 4 * _QUADS_TO_STOP)


def _warm_up(
    candidate: Timed, baseline: Timed, end: float, clock: Callable[[], float]
) -> tuple[list[float], list[float]]:
    """Run both in turn until the times of both have stopped falling or `end` is reached; their times, ms."""
    ours: list[float] = []
    theirs: list[float] = []
    while True:
        ours.append(candidate.time_ms())
        theirs.append(baseline.time_ms())
        if (is_steady(ours) and is_steady(theirs)) or clock() >= end:
            return ours, theirs


def _time_quad(candidate: Timed, baseline: Timed, counts: list[int]) -> Quad:
    """One A B B A. The first inference after a change of model is run but not counted: the caches hold the other's."""
    first = _block(candidate, counts[0])  # follows an A block, of the quad before or of the warm-up's end
    baseline.time_ms()
    second, third = _block(baseline, counts[1]), _block(baseline, counts[1])
    candidate.time_ms()
    return Quad((first, _block(candidate, counts[0])), (second, third))


def _block(session: Timed, count: int) -> tuple[float, ...]:
    return tuple(session.time_ms() for _ in range(count))


def images_per_second(
    candidate: Sequence[Timed],
    baseline: Sequence[Timed],
    batch: int,
    seconds: float,
    advance: Callable[[], None] | None = None,
) -> tuple[float, float]:
    """Images per second of the candidate's and of the baseline's sessions, all of one at the same time, a thread each.

    Four windows A B B A share the `seconds`, so a clock that drifts slows both alike. An inference under way at a
    window's end is counted with its time. `advance`: called after every inference, gives other input.
    """

    def run_until(session: Timed, end: float) -> int:
        count = 0
        while count == 0 or time.perf_counter() < end:
            session.time_ms()
            count += 1
            if advance is not None:
                advance()
        return count

    both, done, took = (candidate, baseline), [0, 0], [0.0, 0.0]
    for which in (0, 1, 1, 0):
        with ThreadPoolExecutor(len(both[which])) as pool:
            begun = time.perf_counter()
            counts = list(pool.map(run_until, both[which], [begun + seconds / 4] * len(both[which])))
            took[which] += time.perf_counter() - begun
        done[which] += batch * sum(counts)
    return done[0] / took[0], done[1] / took[1]


def _check_bounds(batch: int, threads: int | None, max_seconds: float, target_halfwidth: float, streams: int) -> None:
    bounds = {"batch": batch, "max_seconds": max_seconds, "target_halfwidth": target_halfwidth, "streams": streams}
    for name, value in {**bounds, "threads": 1 if threads is None else threads}.items():
        if not value > 0:
            raise PruningError(f"`{name} > 0` must hold, but got {name}={value}")


@contextmanager
def timing_conditions(threads: int | None) -> Iterator[None]:
    """torch on `threads` CPU threads (None: as it is) and no garbage collection; both put back afterwards."""
    with _torch_threads(threads), _no_garbage_collection():
        yield


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
