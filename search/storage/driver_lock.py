"""One driver per run folder: a kernel lock that dies with its process, and the name of who holds it.

On storage that several hosts share, some file systems do not carry locks from host to host. So the holder also changes
a few bytes in the file every other second, and who gets the lock while the file names another host looks first whether
they still change. No clocks are compared.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from paretoprune.base.atomic import remove_temporaries
from paretoprune.search.errors import RunFolderError

LOCK_NAME = "driver.lock"
BEAT_SECONDS = 2.0
LOOK_SECONDS = 4 * BEAT_SECONDS  # attributes of a file may be cached for some seconds on network storage
_LENGTH = 400  # the file is replaced in one write of one length, so that nobody reads half of it


@dataclass(frozen=True)
class Driver:
    """Who drives a run: host, process, when it began (unix seconds), how many trials at a time.

    ``beat`` counts up while it lives; -1 once it has left in order.
    """

    host: str
    pid: int
    since: float
    slots: int = 1
    beat: int = 0


class DriverLock:
    """Holds ``<run>/driver.lock`` from ``with`` to its end.

    Raises :class:`RunFolderError` with the holder's host and pid where another driver is alive. ``flock`` is released
    by the kernel however the process dies, so no stale lock can be left behind; after a death on another host the next
    driver takes ``LOOK_SECONDS`` to see that it is one.
    """

    def __init__(self, run: Path) -> None:
        self._path = run / LOCK_NAME
        self._handle: int | None = None
        self._driver = Driver("", 0, 0.0)
        self._left = threading.Event()
        self._writing = threading.Lock()

    def __enter__(self) -> DriverLock:
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        if not _locked(handle) or _beats_elsewhere(handle):
            driver = _read(handle)
            os.close(handle)
            raise _held(self._path.parent, driver)
        self._handle = handle
        self._driver = Driver(platform.node(), os.getpid(), time.time())
        self._write(beat=0)
        remove_temporaries(self._path.parent)
        threading.Thread(target=self._keep_beating, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        self._write(beat=-1)
        with self._writing:
            if self._handle is not None:
                os.close(self._handle)  # closing releases the lock; the file stays, removing it would race
                self._handle = None

    def describe(self, slots: int) -> None:
        """Say how many trials run at a time, for ``status``."""
        self._driver = Driver(self._driver.host, self._driver.pid, self._driver.since, slots)
        self._write(beat=0)

    def _keep_beating(self) -> None:
        beat = 0
        while not self._left.wait(BEAT_SECONDS):
            beat += 1
            self._write(beat)

    def _write(self, beat: int) -> None:
        text = json.dumps({**asdict(self._driver), "beat": beat})
        with self._writing:
            if self._handle is None:
                return
            try:
                os.pwrite(self._handle, text.ljust(_LENGTH).encode(), 0)
            except OSError:  # a full disk: the kernel's lock is held all the same
                return


def alive_driver(run: Path) -> Driver | None:
    """The driver that holds ``run`` now, None where none does."""
    path = run / LOCK_NAME
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        handle = stream.fileno()
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _read(handle)
        return _read(handle) if _beats_elsewhere(handle) else None


def _locked(handle: int) -> bool:
    """Try a few times: somebody who asks for the status holds it in common for a moment."""
    for _ in range(3):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)
        else:
            return True
    return False


def _beats_elsewhere(handle: int) -> bool:
    """Whether a driver on another host changes the file; takes a while only where the file names one that may."""
    before = _read(handle)
    if before.host in ("", platform.node()) or before.beat < 0:
        return False
    end = time.monotonic() + LOOK_SECONDS
    while time.monotonic() < end:
        time.sleep(BEAT_SECONDS / 4)
        if _read(handle) != before:
            return True
    return False


def _read(handle: int) -> Driver:
    try:
        return Driver(**json.loads(os.pread(handle, 10 * _LENGTH, 0)))
    except (OSError, ValueError, TypeError):  # made a moment ago, or of another version
        return Driver("", 0, 0.0)


def _held(run: Path, driver: Driver) -> RunFolderError:
    return RunFolderError(
        f"run folder {run} is in use by another driver (host {driver.host or 'unknown'}, pid {driver.pid}); "
        "wait for it, stop it, or choose another --run",
        driver.host,
        driver.pid,
    )
