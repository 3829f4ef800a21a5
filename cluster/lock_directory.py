"""Where the device locks of this user lie: a private directory of the host, the same one for every run."""

from __future__ import annotations

import os
import re
import stat
import tempfile
from pathlib import Path

from cluster.errors import LockDirectoryError

DIRECTORY_VARIABLE = "PARETOPRUNE_LOCK_DIR"


def key_directory(device_key: str, directory: Path | None = None) -> Path:
    """The directory of one device's lock, made if need be, mode 0700.

    `directory` defaults to the environment variable PARETOPRUNE_LOCK_DIR, then to a per-user name in the temporary
    directory. It must be local to the host: the locks say nothing about devices of other hosts.
    Raises LockDirectoryError where it cannot be made, or belongs to someone else (anyone may create names in /tmp).
    """
    given = directory or os.environ.get(DIRECTORY_VARIABLE)
    if given:
        base = Path(given).absolute()  # may be shared with other files of the user's: only what lies below is ours
    else:
        base = Path(tempfile.gettempdir()) / f"paretoprune-locks-{os.getuid()}"
        _ensure_private(base)
    # Long or odd names (a GPU's UUID is neither) must not climb out of the directory.
    name = re.sub(r"[^A-Za-z0-9._-]", "_", device_key).lstrip(".")[:100] or "device"
    folder = base / name
    _ensure_private(folder)
    return folder


def _ensure_private(path: Path) -> None:
    remedy = f"set {DIRECTORY_VARIABLE} to a directory of yours on a local disk"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        raise LockDirectoryError(
            f"the directory of the device locks must be usable, but {path}: {error.strerror}; {remedy}"
        ) from error
    # lstat: a symbolic link planted under our name would send the locks elsewhere.
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise LockDirectoryError(
            f"the directory of the device locks must be your own directory, but {path} is "
            f"{stat.filemode(status.st_mode)} of user {status.st_uid}; {remedy}"
        )
    if stat.S_IMODE(status.st_mode) & 0o077:
        path.chmod(0o700)
