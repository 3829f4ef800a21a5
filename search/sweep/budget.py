"""How long a sweep may go on, beside its number of trials: hours of this start, GPU hours of the whole run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from paretoprune.results.store.records import TrialRecord

HOUR = 3600.0


@dataclass
class Budget:
    """``hours``, ``gpu_hours``: None is no limit. ``gpus``: what one trial takes (0: on CPUs, then as if 1).

    The clock starts when this is made. Running trials count with the time since they were handed out.
    """

    hours: float | None = None
    gpu_hours: float | None = None
    gpus: float = 0.0
    clock: Callable[[], float] = time.monotonic
    _began: float = field(init=False)
    _handed_out: dict[str, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._began = self.clock()

    def began(self, trial_id: str) -> None:
        """A trial was handed out."""
        self._handed_out[trial_id] = self.clock()

    def ended(self, trial_id: str) -> None:
        """It came back; from now on its record counts."""
        self._handed_out.pop(trial_id, None)

    def used_up(self, records: Iterable[TrialRecord]) -> str:
        """The budget that is used up, for people; "" while trials may start."""
        if self.hours is not None and self.clock() - self._began >= self.hours * HOUR:
            return f"the time budget of {self.hours:g} h"
        if self.gpu_hours is not None and self.used_gpu_hours(records) >= self.gpu_hours:
            return f"the budget of {self.gpu_hours:g} GPU h"
        return ""

    def used_gpu_hours(self, records: Iterable[TrialRecord]) -> float:
        """GPU hours of finished trials by their records, and of running ones so far."""
        now = self.clock()
        seconds = sum(spent_seconds(record.seconds) for record in records)
        seconds += sum(now - since for since in self._handed_out.values())
        return seconds * (self.gpus or 1.0) / HOUR


def spent_seconds(phases: Mapping[str, float]) -> float:
    """Seconds for which a trial held its device."""
    return sum(phases.values())
