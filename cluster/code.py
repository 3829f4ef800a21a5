"""The project's own code: where its four packages lie, and whether another process has the same ones."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

ROOMS = ("search", "pruning", "cluster", "results")


def package_directory(room: str) -> Path | None:
    """The folder that `import <room>` takes here; None where there is none. Nothing is imported."""
    spec = importlib.util.find_spec(room)
    return Path(spec.origin).resolve().parent if spec and spec.origin and spec.submodule_search_locations else None


def package_directories() -> list[str]:
    """The four packages as this process finds them, to be sent to other machines."""
    found = {room: package_directory(room) for room in ROOMS}
    return [str(path) for path in found.values() if path is not None]


def source_digests() -> dict[str, str]:
    """Package -> a short hash over the names and contents of its Python files; "missing" where there is none."""
    return {room: _digest(package_directory(room)) for room in ROOMS}


def _digest(folder: Path | None) -> str:
    if folder is None:
        return "missing"
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
