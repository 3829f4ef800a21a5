"""Files that are either the old or the new version, never half of one: temporary name, fsync, rename."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from results.errors import ResultsError
from results.wording import readable


def fsync_directory(directory: Path) -> None:
    """Make a rename or a creation inside `directory` survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, content: bytes) -> Path:
    """Replace `path` by `content` atomically, creating its parents. Raises OSError where the folder is not writable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name[:40]}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(_default_mode())  # mkstemp makes files that only the owner can read
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)
    return path


def is_temporary(path: Path) -> bool:
    """Whether it is a file that is being written, or that a killed writer left behind."""
    return path.name.startswith(".") and path.suffix == ".tmp"


def remove_temporaries(folder: Path) -> None:
    """Remove what killed writers left in `folder` itself; for whoever alone writes there."""
    for path in folder.glob(".*.tmp"):
        with suppress(OSError):
            path.unlink()


def _default_mode() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def write_text(path: Path, content: str) -> Path:
    """Replace `path` by UTF-8 text atomically; of a name that is not UTF-8, what cannot be written becomes a sign."""
    return write_bytes(path, readable(content).encode("utf-8"))


def write_json(path: Path, content: Any) -> Path:
    """Replace `path` by indented JSON atomically. NaN and infinity are refused: they are not JSON."""
    try:
        text = json.dumps(content, indent=2, allow_nan=False)
    except ValueError as error:
        raise ResultsError(f"{path.name} must hold finite numbers only, but got one that is not ({error})") from error
    return write_text(path, text + "\n")
