"""A run folder in an object store (`s3://`, `gs://`, or any other that pyarrow's file systems know).

The driver works on a mirror on its own disk, as on any run folder: fetched before, sent while it works and at the end.
Records go last, so that a record in the store never stands without its files. Workers send their files to the driver
(`search.worker.file_transfer`), so nothing but the driver's machine needs the store.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from paretoprune.base.atomic import write_bytes, write_json
from paretoprune.base.errors import one_line
from paretoprune.base.file_names import STUDY, TRIALS
from paretoprune.base.messages import note
from paretoprune.search.errors import RunFolderError

CACHE_VARIABLE = "PARETOPRUNE_CACHE"
MARK = ".remote.json"
LEASE = "driver.json"
SEND_EVERY_SECONDS = 5.0
LEASE_SECONDS = 120.0
RETRY_SECONDS = 30
_LAST = (TRIALS, STUDY)
_STAY = {MARK, LEASE, "driver.lock"}
_GROWING = (".jsonl", ".journal", ".log")  # append-only: of two versions the longer one is the newer


def is_uri(text: str) -> bool:
    """Whether a run is named by an address rather than a path."""
    return bool(re.match(r"[a-z][a-z0-9+.-]*://", text))


def remote_of(run: Path) -> ObjectStoreRun | None:
    """The store that a folder mirrors; None for an ordinary run folder."""
    return ObjectStoreRun(address_of(run)) if (run / MARK).is_file() else None


def address_of(run: Path) -> str:
    """What names a run on every machine: the address of what the folder mirrors, an ordinary folder's own path."""
    mark = run / MARK
    return str(json.loads(mark.read_text(encoding="utf-8"))["uri"]) if mark.is_file() else str(run)


class ObjectStoreRun:
    """One run in a store and its mirror. Raises RunFolderError, one line, for an address that cannot be used."""

    def __init__(self, uri: str) -> None:
        if "@" in uri.partition("://")[2].partition("/")[0]:
            raise RunFolderError("a run's address must not hold credentials; put them into the environment")
        from pyarrow import fs

        try:
            self._store, path = fs.FileSystem.from_uri(_patient(uri))
        except ValueError as error:
            raise RunFolderError(
                f"--run {uri} must be an address that pyarrow knows ({one_line(error, 200)})"
            ) from error
        except OSError as error:  # an S3 address without a region is asked for it
            raise _unreachable(uri, error) from error
        self.uri, self._path = uri, path.rstrip("/")
        cache = Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "paretoprune")
        name = re.sub(r"[^A-Za-z0-9._-]", "_", PurePosixPath(self._path).name).lstrip(".") or "run"
        self.mirror = cache / f"{name}-{hashlib.sha256(uri.encode()).hexdigest()[:8]}"
        self._sent: dict[str, tuple[int, int]] = {}
        self._turn = threading.Lock()

    def pull(self) -> Path:
        """Bring the mirror up to date; returns it."""
        self.mirror.mkdir(parents=True, exist_ok=True)
        write_json(self.mirror / MARK, {"uri": self.uri})
        for name, (size, changed) in self._listed().items():
            here = self.mirror / name
            have = here.stat().st_size if here.is_file() else -1
            if here.suffix in _GROWING and have > size:
                continue
            if have != size or here.stat().st_mtime < changed:  # settings may change and keep their length
                write_bytes(here, self._read(name))
            state = here.stat()
            self._sent[name] = (state.st_size, state.st_mtime_ns)
        return self.mirror

    def push(self) -> int:
        """Send what is new or changed, records last; returns how many files. Raises RunFolderError."""
        with self._turn:
            changed = self._changed()
            for name in sorted(changed, key=lambda name: (name in _LAST, name)):
                self._write(name, (self.mirror / name).read_bytes())
                self._sent[name] = changed[name]
            return len(changed)

    def _changed(self) -> dict[str, tuple[int, int]]:
        if not self._sent:
            self._sent = {name: (size, -1) for name, (size, _) in self._listed().items()}
        found = {}
        for path in self.mirror.rglob("*"):
            name = path.relative_to(self.mirror).as_posix()
            if path.is_symlink() or not path.is_file() or path.name.startswith(".") or name in _STAY:
                continue
            if name.startswith("ray/"):
                continue
            state = path.stat()
            before = self._sent.get(name, (-1, -1))
            if (
                before[0] != state.st_size
                or before[1] not in (-1, state.st_mtime_ns)
                or (before[1] == -1 and path.suffix not in (".pt", *_GROWING))
            ):  # what an earlier process sent is known by its size only: small files that keep theirs go again
                found[name] = (state.st_size, state.st_mtime_ns)
        return found

    def take(self) -> None:
        """Say in the store that this process drives the run; RunFolderError where another one does."""
        held = self._lease()
        if held and time.time() - held["time"] < LEASE_SECONDS and (held["host"], held["pid"]) != _me():
            raise RunFolderError(
                f"{self.uri} is in use by another driver (host {held['host']}, pid {held['pid']}); wait for it, "
                f"stop it, or choose another --run (a dead one's hold ends after {LEASE_SECONDS:.0f} s)",
                held["host"],
                held["pid"],
            )
        self.renew()

    def renew(self) -> None:
        """Keep the hold."""
        host, pid = _me()
        self._write(LEASE, json.dumps({"host": host, "pid": pid, "time": time.time()}).encode())

    def give_up(self) -> None:
        """End the hold."""
        held = self._lease()
        if held and (held["host"], held["pid"]) == _me():
            self._store.delete_file(f"{self._path}/{LEASE}")

    def _lease(self) -> dict[str, Any] | None:
        try:
            content = json.loads(self._read(LEASE))
        except (FileNotFoundError, ValueError):
            return None
        return content if {"host", "pid", "time"} <= content.keys() else None

    def _listed(self) -> dict[str, tuple[int, float]]:
        """Relative path -> size and time of change (unix seconds) of every file of the run that a mirror holds."""
        from pyarrow import fs

        try:
            found = self._store.get_file_info(fs.FileSelector(self._path, recursive=True, allow_not_found=True))
        except OSError as error:
            raise _unreachable(self.uri, error) from error
        files = {
            info.path[len(self._path) + 1 :]: (info.size, (info.mtime_ns or 0) / 1e9)
            for info in found
            if info.type == fs.FileType.File
        }
        unsafe = [name for name in files if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute()]
        if unsafe:
            raise RunFolderError(f"{self.uri} holds a file whose name leaves the folder ({unsafe[0]!r}); remove it")
        return {name: state for name, state in files.items() if name not in _STAY}

    def _read(self, name: str) -> bytes:
        try:
            with self._store.open_input_stream(f"{self._path}/{name}") as stream:
                content: bytes = stream.read()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise _unreachable(self.uri, error) from error
        return content

    def _write(self, name: str, content: bytes) -> None:
        path = f"{self._path}/{name}"
        try:
            self._store.create_dir(str(PurePosixPath(path).parent), recursive=True)
            with self._store.open_output_stream(path) as stream:
                stream.write(content)
        except OSError as error:
            raise RunFolderError(
                f"{self.uri} must be writable, but {one_line(error, 200)}; check your rights"
            ) from error


@contextmanager
def published(run: Path) -> Iterator[bool]:
    """While the body drives the run in ``run``: hold it in its store and send what changes; yields whether it has one.

    A store that is away for a while is only noted; at the end everything must have been sent, else RunFolderError.
    """
    remote = remote_of(run)
    if remote is None:
        yield False
        return
    remote.take()
    over = threading.Event()

    def keep_sending() -> None:
        while not over.wait(SEND_EVERY_SECONDS):
            try:
                remote.push()
                remote.renew()
            except (RunFolderError, OSError) as error:
                note(f"not sent yet: {one_line(error, 200)}")

    thread = threading.Thread(target=keep_sending, daemon=True)
    thread.start()
    try:
        yield True
    finally:
        over.set()
        thread.join()
        remote.push()
        remote.give_up()


def _me() -> tuple[str, int]:
    return platform.node(), os.getpid()


def _patient(uri: str) -> str:
    """Google's client tries for 15 minutes before it says that nothing answers; S3's for seconds."""
    if not uri.startswith("gs://") or "retry_limit_seconds" in uri:
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}retry_limit_seconds={RETRY_SECONDS}"


def _unreachable(uri: str, error: OSError) -> RunFolderError:
    return RunFolderError(
        f"{uri} must be readable, but {one_line(error, 200)}; check the network, the address and your rights"
    )
