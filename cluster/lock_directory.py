"""Where the device locks of a host lie: one place for all its users, jobs and runs, whatever TMPDIR says.

A lock that two processes look for in two places keeps nobody apart. A batch system gives each job a TMPDIR of its own,
often a /tmp, too. What all of a host have in common is its memory file systems: /run/lock where everybody may write
there (Debian, Ubuntu), else /dev/shm. A container has its own of both unless it is told to share them.
"""

from __future__ import annotations

import os
import re
import stat
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from paretoprune.cluster.errors import LockDirectoryError

DIRECTORY_VARIABLE = "PARETOPRUNE_LOCK_DIR"
REMEDY = f"set {DIRECTORY_VARIABLE} to a local directory that all users and jobs of this host can write"
NAME = "paretoprune-locks"

# Anybody may write, but only remove what is theirs, as in /tmp.
_FOR_ALL = 0o1777
_MEMORY_PLACES = ("/run/lock", "/dev/shm")
_MAKER_SECONDS = 2.0
_MOUNTS = Path("/proc/self/mountinfo")


@dataclass(frozen=True)
class LockPlace:
    """`base`: the directory that holds a directory per device. `caveat`: what it does not hold for; "" for nothing."""

    base: Path
    caveat: str = ""


def lock_place() -> LockPlace:
    """This host's: the variable PARETOPRUNE_LOCK_DIR, a memory file system, /tmp, else the temporary directory."""
    if given := os.environ.get(DIRECTORY_VARIABLE):
        return LockPlace(Path(given).absolute())
    mounts = _mounts()
    for name in _MEMORY_PLACES:
        kinds = mounts.get(name, [])
        if kinds[-1:] == ["tmpfs"] and _is_for_all(Path(name)):
            # A job's own is put over the host's.
            base = Path(name) / NAME
            return LockPlace(
                base, _caveat(base, "is this job's or container's own", "outside of it") if kinds[1:] else ""
            )
    if _is_for_all(Path("/tmp")):
        base = Path("/tmp") / NAME
        return LockPlace(base, _caveat(base, "may be this job's own", "in other jobs") if mounts else "")
    base = Path(tempfile.gettempdir()) / f"{NAME}-{os.getuid()}"
    return LockPlace(base, _caveat(base, "follows TMPDIR", "of other users, or with another TMPDIR,"))


def _caveat(base: Path, why: str, where: str) -> str:
    return f"{base} {why}: what runs {where} is not kept off while latency is measured"


def key_directory(device_key: str, directory: Path | None = None) -> Path:
    """The directory of one device's lock, made if need be: everybody's, each file its maker's (mode 1777).

    `directory` defaults to `lock_place`. It must be local to the host: the locks say nothing about devices of other
    hosts. Raises LockDirectoryError where it cannot be made, is a symbolic link, or lets only others in.
    """
    place = LockPlace(directory.absolute()) if directory else lock_place()
    if directory is None and DIRECTORY_VARIABLE not in os.environ:
        _make(place.base)  # one that somebody named may serve other ends: its mode is theirs
    # Long or odd names (a GPU's UUID is neither) must not climb out of the directory.
    name = re.sub(r"[^A-Za-z0-9._-]", "_", device_key).lstrip(".")[:100] or "device"
    folder = place.base / name
    _make(folder)
    return folder


def _make(path: Path) -> None:
    try:
        try:
            path.mkdir(parents=True)
            path.chmod(_FOR_ALL)  # mkdir's mode is cut by the umask
        except FileExistsError:
            pass
        status = path.lstat()
        if status.st_uid == os.getuid() and stat.S_ISDIR(status.st_mode) and stat.S_IMODE(status.st_mode) != _FOR_ALL:
            path.chmod(_FOR_ALL)  # its maker died in between
        end = time.monotonic() + _MAKER_SECONDS
        while stat.S_ISDIR(status.st_mode) and not os.access(path, os.W_OK | os.X_OK) and time.monotonic() < end:
            time.sleep(0.05)  # another user is about to open it
            status = path.lstat()
    except OSError as error:
        raise LockDirectoryError(
            f"the directory of the device locks must be usable, but {path}: {error.strerror}; {REMEDY}"
        ) from error
    # lstat: a symbolic link planted under our name would send the locks elsewhere.
    if not stat.S_ISDIR(status.st_mode) or not os.access(path, os.W_OK | os.X_OK):
        raise LockDirectoryError(
            f"the directory of the device locks must be a directory that everybody can write, but {path} is "
            f"{stat.filemode(status.st_mode)} of user {status.st_uid}; {REMEDY}"
        )


def _is_for_all(path: Path) -> bool:
    """Whether it is a directory in which everybody may make files that nobody else removes."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return stat.S_ISDIR(mode) and mode & _FOR_ALL == _FOR_ALL


def _mounts() -> dict[str, list[str]]:
    """Mount point -> the kinds of the file systems mounted there, the uppermost last; {} where the system says none."""
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    found: dict[str, list[str]] = {}
    for line in lines:
        before, _, after = line.partition(" - ")  # "ID PARENT MAJOR:MINOR ROOT POINT OPTIONS ... - KIND SOURCE ..."
        if len(before.split()) > 4 and after:
            found.setdefault(before.split()[4], []).append(after.split()[0])
    return found
