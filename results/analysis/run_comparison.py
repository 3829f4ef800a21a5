"""Several runs laid over each other: their fronts, finished picks and baselines on one accuracy/latency plane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paretoprune.base.image_size import size_text
from paretoprune.results.analysis.figures import FrontFigure, HypervolumeCurve, Point
from paretoprune.results.analysis.summary import Summary, summarise
from paretoprune.results.errors import ResultsError
from paretoprune.results.store.run_folder import RunFolder

MOST_RUNS = 7  # as many as there are colours and markers to tell them apart by


@dataclass(frozen=True)
class RunLine:
    """One run in the comparison. name: of its folder, with as much of the path as tells it apart from the others."""

    name: str
    summary: Summary
    sampler: str

    @property
    def figure(self) -> FrontFigure:
        """What the plane shows of it."""
        return self.summary.front

    @property
    def curve(self) -> HypervolumeCurve:
        """How its front grew."""
        return self.summary.hypervolume

    @property
    def finished(self) -> tuple[Point, ...]:
        """Its fully fine-tuned picks."""
        return tuple(move.after for move in self.figure.picks if move.after)


@dataclass(frozen=True)
class Overlay:
    """Runs to compare, and in what their conditions differ, a line each (none: compare them as they are)."""

    runs: tuple[RunLine, ...]
    differences: tuple[str, ...]


def overlay(paths: Sequence[str | Path]) -> Overlay:
    """Read two to seven run folders. Raises ResultsError for another number, one folder twice, or a broken folder."""
    folders = [RunFolder(Path(path)) for path in paths]
    if len({folder.path.resolve() for folder in folders}) < len(folders):
        given = ", ".join(map(str, paths))
        raise ResultsError(f"every run must be given once, but got {given}; leave out what is there twice")
    if not 2 <= len(folders) <= MOST_RUNS:
        raise ResultsError(f"two to {MOST_RUNS} runs can be laid over each other, but got {len(folders)}; give others")
    names = _names([folder.path.resolve() for folder in folders])
    runs = tuple(
        RunLine(name, summarise(folder), _sampler(folder)) for name, folder in zip(names, folders, strict=True)
    )
    return Overlay(runs, _differences(runs))


def _sampler(folder: RunFolder) -> str:
    section = folder.read_config().get("search")
    return str(section.get("sampler") or "") if isinstance(section, Mapping) else ""


def _names(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as few as make all of them different."""
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise AssertionError(f"{paths} are different paths")


def _differences(runs: Sequence[RunLine]) -> tuple[str, ...]:
    """Differences that make two runs' figures incomparable: data, input, device, fidelity."""
    asked: dict[str, list[Any]] = {
        "data": [run.summary.data for run in runs],
        "image size": [run.summary.imgsz and size_text(run.summary.imgsz) for run in runs],
        "device": [run.summary.device for run in runs],
        "span of the latency": [run.summary.span for run in runs],
        "CPU": [run.summary.environment.get("cpu_model", "") for run in runs],
        "GPU": [run.summary.environment.get("gpu", "") for run in runs],
        "fidelity of the front": [run.figure.fidelity for run in runs],
    }
    lines = []
    for what, values in asked.items():
        if len(set(values)) > 1:
            told = "; ".join(f"{run.name}: {value or 'not known'}" for run, value in zip(runs, values, strict=True))
            lines.append(f"different {what} ({told})")
    return tuple(lines)
