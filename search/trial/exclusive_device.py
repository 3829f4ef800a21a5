"""Latency on the device that it is meant for, whoever asks: a trial, the baseline, a pick, a comparison."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from paretoprune.search.monitoring.progress import note

SAID_AFTER_S = 5.0  # of waiting


def note_lock_place() -> None:
    """Say so where this host's device locks do not reach everything that may use its devices."""
    from paretoprune.cluster.lock_directory import REMEDY, lock_place

    if caveat := lock_place().caveat:
        note(f"device locks: {caveat}; {REMEDY}")


@contextmanager
def alone_on(device: str) -> Iterator[None]:
    """``device`` alone, for a command of a person; tells them where others take long to leave it."""
    from paretoprune.cluster.device_lock import DeviceLock
    from paretoprune.cluster.devices import device_key

    line = f"waiting until what else uses {device} on this host has ended its batch or measurement"
    timer = threading.Timer(SAID_AFTER_S, note, (line,))
    timer.daemon = True
    timer.start()
    note_lock_place()
    try:
        with DeviceLock(device_key(device)).measuring():
            timer.cancel()
            yield
    finally:
        timer.cancel()
