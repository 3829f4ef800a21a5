"""Latency of several networks in one session: every round times each of them forwards, then backwards (A B C C B A)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from paretoprune.base.image_size import ImageSize
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.latency.images import ImageStream
from paretoprune.pruning.latency.pair import Timed, timing_conditions
from paretoprune.pruning.latency.runtimes import ExportCache, SessionSpec, Timeable, open_session
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
from paretoprune.pruning.yolo.image_size import check_image_size, stride_of

FEWEST_ROUNDS = 12  # an interval from fewer is too uncertain itself to stop on
LOOK_EVERY = 4  # rounds between two looks at the intervals: looking after each would stop on lucky streaks
WARMUP_SHARE = 0.3  # of max_seconds, at most

Block = tuple[float, ...]


@dataclass(frozen=True)
class GroupTimes:
    """The blocks of all networks, one (forwards, backwards) pair a round; times in milliseconds."""

    rounds: Mapping[str, Sequence[tuple[Block, Block]]]
    converged: bool

    def speedup(self, of: str, over: str) -> Speedup:
        """Time of `over` / time of `of` in this session. A round is one quad: a linear drift cancels in it."""
        pairs = zip(self.rounds[of], self.rounds[over], strict=True)
        return speedup([Quad(candidate, baseline) for candidate, baseline in pairs])

    def all_ms(self, name: str) -> npt.NDArray[np.float64]:
        """All timed inferences of a network, in the order they were taken."""
        return np.concatenate([block for pair in self.rounds[name] for block in pair])


def time_group(
    sessions: Mapping[str, Timed],
    reference: str,
    max_seconds: float,
    target_halfwidth: float,
    clock: Callable[[], float] = time.perf_counter,
    advance: Callable[[], None] | None = None,
) -> GroupTimes:
    """Time all sessions in turn until every speed-up over `reference` is known well enough, or `max_seconds` are over.

    Well enough: the half-width of its 95 % interval is at most `target_halfwidth` (a fraction) after 12 rounds or more;
    four rounds are made at least. Which network begins a round changes from round to round, so that none always follows
    the same one. `advance`: called between rounds, gives all other input. Raises PruningError without the reference or
    with a bound that is not above 0.
    """
    if reference not in sessions:
        raise PruningError(f"the reference must be one of the networks, but got '{reference}' of {sorted(sessions)}")
    if not (max_seconds > 0 and target_halfwidth > 0):
        raise PruningError(f"bounds must be above 0, but got max_seconds={max_seconds}, {target_halfwidth=}")
    end = clock() + max_seconds
    names = list(sessions)
    block_ms = block_length_ms((1 - WARMUP_SHARE) * max_seconds, 2 * len(names) * FEWEST_ROUNDS)
    counts = _warm_up(sessions, clock() + WARMUP_SHARE * max_seconds, clock, block_ms)
    rounds: dict[str, list[tuple[Block, Block]]] = {name: [] for name in names}
    done = 0
    while True:
        shift = done % len(names)
        order = names[shift:] + names[:shift]
        forwards = {name: _block(sessions[name], counts[name]) for name in order}
        for name in reversed(order):
            rounds[name].append((forwards[name], _block(sessions[name], counts[name])))
        done += 1
        if advance is not None:
            advance()
        time_is_up = done >= FEWEST_QUADS and clock() >= end
        if not (time_is_up or (done >= FEWEST_ROUNDS and done % LOOK_EVERY == 0)):
            continue
        times = GroupTimes(rounds, converged=False)
        widths = [times.speedup(name, reference).halfwidth for name in names if name != reference]
        converged = done >= FEWEST_ROUNDS and max(widths, default=0.0) <= target_halfwidth
        if converged or time_is_up:
            return GroupTimes(rounds, converged)


def _warm_up(sessions: Mapping[str, Timed], end: float, clock: Callable[[], float], block_ms: float) -> dict[str, int]:
    """Run all in turn until none gets faster any more or `end` is reached; inferences per block of each."""
    seen: dict[str, list[float]] = {name: [] for name in sessions}
    while True:
        for name, session in sessions.items():
            seen[name].append(session.time_ms())
        if all(is_steady(series) for series in seen.values()) or clock() >= end:
            return {name: inferences_per_block(times, block_ms) for name, times in seen.items()}


def _block(session: Timed, count: int) -> Block:
    session.time_ms()  # not counted: the caches hold the network before
    return tuple(session.time_ms() for _ in range(count))


def measure_group(
    models: Mapping[str, Timeable],
    reference: str,
    imgsz: ImageSize | Mapping[str, ImageSize],
    device: str = "cpu",
    batch: int = 1,
    threads: int | None = None,
    max_seconds: float = 30.0,
    target_halfwidth: float = 0.01,
    runtime: str = "torch",
    half: bool = False,
    stream: ImageStream | None = None,
) -> dict[str, dict[str, Any]]:
    """Time all `models` in one session: name -> `median_ms`, `p90_ms`, `iterations`, `baseline_median_ms`, `speedup`
    over `reference` with `speedup_ci95`, `converged`, and `over`: every other name -> [speed-up over it, low, high].

    `imgsz`: size of all networks' images, or by name of each one's. `stream`: as of `measure_pair`. Intervals are those
    for another measurement at another time, as everywhere (see `LatencyResult`). The caller keeps the device free of
    others. Raises PruningError for a runtime, device or bound that is not usable.
    """
    sizes = imgsz if isinstance(imgsz, Mapping) else dict.fromkeys(models, imgsz)
    for name, model in models.items():
        check_image_size(sizes[name], stride_of(model), name)
    with timing_conditions(threads):
        count, exports = torch.get_num_threads(), ExportCache()
        sessions = {
            name: open_session(model, SessionSpec(sizes[name], device, batch, half, count, stream), runtime, exports)
            for name, model in models.items()
        }
        advance = None
        if stream is not None:
            stream.at, advance = 0, lambda: stream.advance(batch)
        times = time_group(sessions, reference, max_seconds, target_halfwidth, advance=advance)
    base_ms = float(np.median(times.all_ms(reference)))
    found = {}
    for name in models:
        own = times.all_ms(name)
        over = {other: with_session_variance(times.speedup(name, other)) for other in models if other != name}
        gain = over.get(reference) or Speedup(1.0, 1.0, 1.0)
        found[name] = {
            "median_ms": float(np.median(own)),
            "p90_ms": float(np.quantile(own, 0.9)),
            "iterations": len(own),
            "baseline_median_ms": base_ms,
            "speedup": gain.value,
            "speedup_ci95": [gain.low, gain.high],
            "converged": times.converged,
            "over": {other: [ratio.value, ratio.low, ratio.high] for other, ratio in over.items()},
        }
    return found
