"""Which formats and precisions work on this machine: each is exported, run and compared, none is guessed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from paretoprune.pruning.builtin import BASELINE
from paretoprune.pruning.data.calibration import Calibration
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.export.exporter import export_model
from paretoprune.pruning.export.precision import RUNNABLE, check_precision, written_precisions
from paretoprune.pruning.latency.runtimes.autobackend import Backend
from paretoprune.pruning.names import PRECISIONS

_SIZE = 64  # pixels; a small network on small images


@dataclass(frozen=True)
class TriedFormat:
    """A format with the precisions that worked, those that failed when they were tried, and those that were not tried.

    The latter two with the reason, one line. All that is known where the packages are missing is what was left out.
    """

    name: str
    works: tuple[str, ...]
    failed: dict[str, str]
    left_out: dict[str, str]


def try_formats(device: str = "cpu") -> Iterator[TriedFormat]:
    """Try them one by one with the built-in network; tens of seconds for a format that quantises."""
    images = torch.rand(1, 3, _SIZE, _SIZE, generator=torch.Generator().manual_seed(0))
    for target in RUNNABLE:
        works: list[str] = []
        failed: dict[str, str] = {}
        left_out: dict[str, str] = {}
        for precision in written_precisions(target, device) or PRECISIONS[:1]:
            try:
                check_precision(target, precision, device)
            except PruningError as error:
                left_out[precision] = str(error).split("; possible here")[0]
                continue
            with tempfile.TemporaryDirectory(prefix="paretoprune-export-") as folder:
                try:
                    calibration = Calibration({"img": images})
                    file = export_model(BASELINE, target, _SIZE, device, False, Path(folder), precision, calibration)
                    Backend(file, _SIZE, device, precision=precision).time_ms()
                    works.append(precision)
                except PruningError as error:
                    failed[precision] = str(error)
        yield TriedFormat(target, tuple(works), failed, left_out)
