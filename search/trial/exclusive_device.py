"""Latency on the device that it is meant for, whoever asks: a trial, the baseline, a pick, a comparison."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from paretoprune.base.messages import note

SAID_AFTER_S = 5.0  # of waiting
MOST_THREADS = 8  # small detectors gain nothing from more


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

    line = f"waiting for other jobs on {device} to finish"
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


def measuring_threads() -> int:
    """CPU threads for latency where nobody says: all usable cores but one, at most 8.

    With a thread on every core, each inference waits for the thread that any other process of the machine displaces:
    on two busy cores that made a latency of 6 ms read 700 ms, and the speed-up useless.
    """
    from paretoprune.cluster.environment import usable_cpus

    return max(1, min(MOST_THREADS, usable_cpus() - 1))
