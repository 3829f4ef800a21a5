"""The project's own code: where its package lies, and whether another process has the same one."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "paretoprune"
PARTS = ("base", "cluster", "pruning", "results", "search")


def package_directory() -> Path | None:
    """The folder that `import paretoprune` takes here; None where there is none. Nothing is imported."""
    spec = importlib.util.find_spec(PACKAGE)
    return Path(spec.origin).resolve().parent if spec and spec.origin and spec.submodule_search_locations else None


def package_directories() -> list[str]:
    """The package as this process finds it, as a list of modules to be sent to other machines."""
    found = package_directory()
    return [] if found is None else [str(found)]


def import_root() -> Path:
    """The folder that must be on the path for `import paretoprune` to find this code."""
    # Not resolved beyond the package itself: in a checkout its parts are links to folders beside it.
    return Path(__file__).absolute().parents[2]


def source_digests() -> dict[str, str]:
    """Part of the package -> a short hash over the names and contents of its Python files; "missing" without any."""
    folder = package_directory()
    return {part: _digest(folder / part) if folder else "missing" for part in PARTS}


def _digest(folder: Path) -> str:
    if not folder.is_dir():
        return "missing"
    digest = hashlib.sha256()
    for path in sorted(_python_files(folder)):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _python_files(folder: Path) -> Iterator[Path]:
    for place, _, names in os.walk(folder, followlinks=True):  # in a checkout the parts are links
        yield from (Path(place, name) for name in names if name.endswith(".py"))
