"""The report of a trial after each rung, and the decision whether it continues.

A *rung* is a number of epochs after which a trial may be stopped; the first one is 0: removal and recovery, no epoch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from paretoprune.results.store.accuracy import accuracy_name
from paretoprune.search.storage.event_log import PhaseClock

RUNG_EVENT = "rung"


@dataclass(frozen=True)
class RungReport:
    """A trial after ``epochs`` epochs: its best ``accuracy`` so far (higher is better) and what it costs.

    ``costs``: ``params_m``, ``gflops``, ``size_mb``, and ``latency_ms`` (in a run that counts it ``energy_j``, too)
    where it is known by now; none changes with epochs. ``precision``: of its file, "" the run's: accuracy on the way
    is that of the network in PyTorch, so that trials of another precision lose something else in the end.
    """

    trial_id: str
    epochs: int
    accuracy: float
    costs: Mapping[str, float]
    precision: str = ""


class EarlyStopper(Protocol):
    """Decides about trials at their rungs."""

    def stops(self, report: RungReport) -> bool:
        """Whether the trial of ``report`` ends here. Must not raise: a trial does not fail for want of a decision."""
        ...


class NeverStop:
    """Stops no trial."""

    def stops(self, report: RungReport) -> bool:
        """Never."""
        return False


@dataclass
class Course:
    """One trial's way over the rungs: its accuracy after every epoch, kept as data, and the decisions.

    ``accuracy``: name of the metric that is compared; "": the task's own. ``history``: a row an epoch, the start as
    epoch 0.
    """

    trial_id: str
    rungs: Collection[int]
    judge: EarlyStopper
    accuracy: str
    costs: Mapping[str, float]
    clock: PhaseClock
    precision: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)
    stopped: bool = False

    def reached(self, epochs: int, metrics: Mapping[str, float]) -> bool:
        """Note the metrics after ``epochs``; True where the trial ends here (the shape of an ``OnEpoch``)."""
        figures = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
        self.history.append({"epochs": epochs, **figures})
        judged = self.accuracy or accuracy_name(figures)
        best = max(float(row[judged]) for row in self.history)
        if epochs not in self.rungs:
            return False
        # Written before the question is asked: whoever decides next, in any process, finds it.
        said = {"precision": self.precision} if self.precision else {}
        self.clock.event(RUNG_EVENT, epochs=epochs, accuracy=best, costs=dict(self.costs), **said)
        self.stopped = self.judge.stops(RungReport(self.trial_id, epochs, best, self.costs, self.precision))
        if self.stopped:
            self.clock.event("stopped", epochs=epochs)
        return self.stopped
