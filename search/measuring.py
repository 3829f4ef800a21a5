"""Latency on the device that it is meant for, whoever asks: a trial, the baseline, a pick, a comparison."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from search.progress import note

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
