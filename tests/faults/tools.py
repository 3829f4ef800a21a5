"""Pretended training that leaves a trace of who worked on which trial, and that can be made to fail."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from paretoprune.base.device_gate import DeviceGate
from paretoprune.base.file_names import RECORD
from paretoprune.search.config.run_config import RunConfig
from tests.search.fakes import FakeTools

MARKS = "marks.jsonl"
BEGIN = "begin"
AGAIN = "begin although its record is there"
END = "end"
SECONDS_OF_A_TRIAL = 0.4


class MarkingTools(FakeTools):
    """Marks in the trial's folder when work on it begins and when it has been done."""

    seconds = SECONDS_OF_A_TRIAL
    checkpoint_bytes = 0

    def logging(self, path: Path) -> AbstractContextManager[None]:
        """The first thing a trial calls, and the only one that says where it lives."""
        self.folder = path.parent
        self.mark(AGAIN if (self.folder / RECORD).exists() else BEGIN)
        return super().logging(path)

    def evaluate(self, model: Any) -> dict[str, float]:
        time.sleep(self.seconds)
        return super().evaluate(model)

    def save(self, model: Any, path: Path) -> None:
        path.write_bytes(json.dumps(model).encode() + b" " * self.checkpoint_bytes)
        self.mark(END)

    def mark(self, what: str) -> None:
        line = json.dumps({"what": what, "pid": os.getpid(), "time": time.time()})
        with (self.folder / MARKS).open("a") as stream:
            stream.write(line + "\n")


class LastingTools(MarkingTools):
    """Long enough to be struck in the middle."""

    seconds = 1.5


class DeadlyTools(MarkingTools):
    """One plan kills whoever works on it."""

    def prune(self, ratios: Mapping[str, float]) -> Any:
        if self.folder.name == "t0002":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().prune(ratios)


class BulkyTools(MarkingTools):
    """A quarter of a megabyte a trial."""

    seconds = 0.05
    checkpoint_bytes = 250_000


def marking_tools(config: RunConfig, device: str, gate: DeviceGate) -> MarkingTools:
    return MarkingTools()


def lasting_tools(config: RunConfig, device: str, gate: DeviceGate) -> LastingTools:
    return LastingTools()


def deadly_tools(config: RunConfig, device: str, gate: DeviceGate) -> DeadlyTools:
    return DeadlyTools()


def bulky_tools(config: RunConfig, device: str, gate: DeviceGate) -> BulkyTools:
    return BulkyTools()


def marks_of(trial: Path) -> list[dict[str, Any]]:
    """What workers marked in a trial's folder; a killed one may have torn its last line."""
    path = trial / MARKS
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]
