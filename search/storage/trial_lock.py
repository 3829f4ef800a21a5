"""One worker per trial (or pick): who works in a folder holds it, and one that comes later waits for it.

A driver that was killed may leave workers behind that go on for a while. The next driver hands the same trial out
again: without this, both would train it in the same folder at once.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from paretoprune.base.atomic import remove_temporaries

CLAIM_NAME = "worker.lock"
POLL_SECONDS = 0.5
GIVE_UP_SECONDS = 1800.0
"""A holder that wrote nothing for so long hangs, or its host died in a way that its storage did not notice."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def claimed(folder: Path, waiting: Callable[[str], None] = lambda holder: None) -> Iterator[None]:
    """Hold ``folder`` for this process; ``waiting`` is called once with who holds it, if one has to wait.

    A record lock (``lockf``): released by the kernel however its process dies, not shared with forked loaders, honoured
    by NFS. Where the storage knows no locks, nobody waits: files are replaced whole, so two workers waste time only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / CLAIM_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _try(handle):
            waiting(_holder(handle))
            _wait(handle, folder)
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"host": platform.node(), "pid": os.getpid()}).encode(), 0)
        remove_temporaries(folder)
        yield
    finally:
        os.close(handle)


def _try(handle: int) -> bool:
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _wait(handle: int, folder: Path) -> None:
    while not _try(handle):
        if time.time() - _last_sign(folder) > GIVE_UP_SECONDS:
            return
        time.sleep(POLL_SECONDS)


def _last_sign(folder: Path) -> float:
    """When anything in the folder was written last (unix seconds)."""
    return max(path.stat().st_mtime for path in [folder, *folder.glob("*.*")])


def _holder(handle: int) -> str:
    try:
        content = json.loads(os.pread(handle, 1000, 0))
        return f"host {content['host']}, pid {content['pid']}"
    except (ValueError, KeyError, TypeError):  # being written
        return "another worker"
