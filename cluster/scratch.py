"""Folders that live as long as their process, however it ends: work files of Ray's workers, Ray's own.

Ray ends workers by force, so nothing of theirs runs at the end. A shell that waits for the process's death removes the
folder; where that was killed, too (a batch job's end, a reboot), the next process that makes one does.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

# stdin ends when its writer, the process, is gone. Others may still write below the folder for a moment.
_REMOVER = """
exec 3<&0
(
  trap '' HUP INT TERM
  cat <&3 >/dev/null
  for _ in 1 2 3 4 5 6 7 8 9 10; do rm -rf -- "$1" && break; sleep 1; done
) &
"""

# Descriptors that this process's folders hang on, by folder: its lock, and the remover's pipe.
_HELD: dict[Path, tuple[int, int]] = {}


def process_folder(prefix: str, parents: Sequence[Path] = ()) -> Path:
    """A new private folder, below the first of `parents` that can be written (default: the temporary directory).

    It is gone soon after this process, or with `remove_folder`. Folders of dead processes with this `prefix` go first.
    Raises OSError where none of the parents can be written.
    """
    tried: OSError | None = None
    for parent in parents or [Path(tempfile.gettempdir())]:
        try:
            _clear(parent, prefix)
            folder, lock = _make(parent, prefix)
        except OSError as error:
            tried = tried or error
            continue
        _HELD[folder] = (lock, _start_remover(folder))
        return folder
    assert tried is not None
    raise tried


def remove_folder(folder: Path) -> None:
    """Remove a folder that `process_folder` made now."""
    shutil.rmtree(folder, ignore_errors=True)
    for descriptor in _HELD.pop(folder, ()):
        os.close(descriptor)


def _make(parent: Path, prefix: str) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.is_dir():  # not taken for a dead one's in between
                return folder, lock
        except OSError:  # network storage may know no such locks: then nobody clears it away either
            return folder, lock
        os.close(lock)


def _start_remover(folder: Path) -> int:
    """The pipe's end to keep. The remover is nobody's child: Ray ends a worker's children with it."""
    reading, writing = os.pipe()
    try:
        subprocess.run(
            ["/bin/sh", "-c", _REMOVER, "sh", str(folder)], cwd="/", stdin=reading, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True, check=False,
        )  # fmt: skip
    finally:
        os.close(reading)
    return writing


def _clear(parent: Path, prefix: str) -> None:
    """Remove this user's folders whose process is dead: it held a lock."""
    for folder in parent.glob(f"{prefix}*"):
        with suppress(OSError):
            status = folder.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
                continue
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
