"""One driver per run folder: a kernel lock that dies with its process, and the name of who holds it."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from search.errors import RunFolderError

LOCK_NAME = "driver.lock"


@dataclass(frozen=True)
class Driver:
    """Who drives a run: host, process, when it began (unix seconds), how many trials at a time."""

    host: str
    pid: int
    since: float
    slots: int = 1


class DriverLock:
    """Holds ``<run>/driver.lock`` from ``with`` to its end.

    Raises :class:`RunFolderError` with the holder's host and pid where another driver is alive. ``flock`` is released
    by the kernel however the process dies, so no stale lock can be left behind.
    """

    def __init__(self, run: Path) -> None:
        self._path = run / LOCK_NAME
        self._handle: int | None = None

    def __enter__(self) -> DriverLock:
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise _held(self._path) from None
        self._handle = handle
        self.describe(slots=1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            os.close(self._handle)  # closing releases the lock; the file stays, removing it would race
            self._handle = None

    def describe(self, slots: int) -> None:
        """Write who holds the lock, for the message to a second driver and for ``status``."""
        assert self._handle is not None, "the lock is held"
        driver = Driver(platform.node(), os.getpid(), time.time(), slots)
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, json.dumps(asdict(driver)).encode(), 0)


def alive_driver(run: Path) -> Driver | None:
    """The driver that holds ``run`` now, None where none does."""
    path = run / LOCK_NAME
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _read(path)
    return None


def _read(path: Path) -> Driver:
    try:
        return Driver(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):  # caught between truncation and writing
        return Driver("unknown", 0, time.time())


def _held(path: Path) -> RunFolderError:
    driver = _read(path)
    return RunFolderError(
        f"run folder {path.parent} is in use by another driver (host {driver.host}, pid {driver.pid}); "
        "wait for it, stop it, or choose another --run",
        driver.host,
        driver.pid,
    )
