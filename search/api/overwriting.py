"""What may be written over: nothing that it reads, no file of a run, no folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from paretoprune.base.file_names import BEST, PLAN, PRUNED
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.errors import ArgumentError

_NAMES = frozenset({PRUNED, BEST, PLAN})  # a run writes these once it gets there
_SUFFIXES = frozenset({".pt", ".json", ".jsonl", ".yaml", ".journal", ".csv", ".parquet", ".html", ".md", ".log"})


def check_output(
    written: Sequence[Path], read: Iterable[str | Path | None], folders: Sequence[tuple[Path, str]] = ()
) -> None:
    """Raise :class:`ArgumentError` where a file would be written over something that must stay.

    ``read``: what the command reads. ``folders``: that are made anew, each with the pattern of what may lie there.
    """
    inputs = [path for path in (Path(item) for item in read if item is not None) if path.exists()]
    for path in written:
        if path.is_dir():
            raise ArgumentError(f"`output` must name a file, but {path} is a folder; give a name in it")
        above = next(folder for folder in path.absolute().parents if folder.exists())
        if not above.is_dir():
            raise ArgumentError(f"`output` must name a file in a folder, but {above} is a file; give another name")
        for item in inputs:
            if path.exists() and path.samefile(item):
                raise ArgumentError(f"`output` must not replace what is read, but {path} is {item}; give another name")
        run = _run_of(path)
        if run is not None and (path.name in _NAMES or (path.exists() and path.suffix in _SUFFIXES)):
            raise ArgumentError(f"`output` must not replace a run's own file, but {path} is of the run {run}; "
                                   "give a place outside of it")  # fmt: skip
    for folder, pattern in folders:
        strange = [item.name for item in folder.glob("*") if not item.match(pattern)] if folder.is_dir() else []
        if strange or folder.is_file():
            what = f"it holds {sorted(strange)[0]}" if strange else "it is a file"
            raise ArgumentError(f"`output` makes the folder {folder} anew, but {what}; give another name")
        for item in inputs:
            if folder.resolve() in item.resolve().parents:
                raise ArgumentError(f"`output` makes the folder {folder} anew, but {item} is read; give another name")


def _run_of(path: Path) -> Path | None:
    """The run in whose folder a path lies."""
    for folder in path.resolve().parents:
        run = RunFolder(folder)
        if run.baseline.is_file() and (run.config.is_file() or run.trials_file.is_file()):
            return folder
        if (folder / "comparison.json").is_file() and (folder / "strategies").is_dir():
            return folder
    return None
