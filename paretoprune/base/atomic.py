"""Files that are either the old or the new version, never half of one: temporary name, fsync, rename."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from paretoprune.base.errors import UserError
from paretoprune.base.formatting import readable


def fsync_directory(directory: Path) -> None:
    """Make a rename or a creation inside `directory` survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A stream whose content becomes `path` when the block ends without an error; the parent folder is created.

    Until then it lies beside it as `.NAME.*.tmp`. Readable for others as the process's mask has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name[:40]}.", suffix=".tmp", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        with temporary.open("wb") as file:  # by name: torch.save asks the stream for it
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(_default_mode())  # mkstemp makes files that only the owner can read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_directory(path.parent)


def write_bytes(path: Path, content: bytes) -> Path:
    """Replace `path` by `content` atomically, creating its parents. Raises OSError where the folder is not writable."""
    with whole_file(path) as file:
        file.write(content)
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
        raise UserError(f"{path.name} must hold finite numbers only, but got one that is not ({error})") from error
    return write_text(path, text + "\n")
