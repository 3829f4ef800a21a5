"""Latency on the device that it is meant for, whoever asks: a trial, the baseline, a pick, a comparison."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from search.progress import note

WIDEST_USEFUL = 0.1  # half width of the speed-up's interval, as a fraction of it
PATIENCE = 3.0  # times the usual seconds
SAID_AFTER_S = 5.0  # of waiting


@contextmanager
def alone_on(device: str) -> Iterator[None]:
    """``device`` alone, for a command of a person; tells them where others take long to leave it."""
    from cluster.device_lock import DeviceLock
    from cluster.devices import device_key

    line = f"waiting until what else uses {device} on this host has ended its batch or measurement"
    timer = threading.Timer(SAID_AFTER_S, note, (line,))
    timer.daemon = True
    timer.start()
    try:
        with DeviceLock(device_key(device)).measuring():
            timer.cancel()
            yield
    finally:
        timer.cancel()


def with_patience(measure: Callable[[float], dict[str, Any]], seconds: float) -> dict[str, Any]:
    """``measure(seconds)``; where the machine was so busy that the interval is useless, once more with more time.

    Such a figure would mislead the search for good.
    """
    first = measure(seconds)
    if first["converged"] or _halfwidth(first) <= WIDEST_USEFUL:
        return first
    return min(first, measure(PATIENCE * seconds), key=_halfwidth)


def _halfwidth(measured: Mapping[str, Any]) -> float:
    low, high = measured["speedup_ci95"]
    return float((high - low) / 2 / measured["speedup"])
