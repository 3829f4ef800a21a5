"""The observation that a sampler gets of a finished trial: figures of the plan, and how far it violates the bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from paretoprune.results.store.bounds import NO_BOUNDS, Bounds
from paretoprune.results.store.objectives import direction
from paretoprune.results.store.records import TrialRecord, TrialState
from paretoprune.search.samplers.extrapolation import LearningCurves

MAXIMIZED = "max"  # results' word for it
VARIANCES = "variances"
"""User attribute of a trial: variance of each observed value beyond a measurement's own (for a value that was
estimated)."""


@dataclass(frozen=True)
class Observation:
    """``metrics``: at least the objectives. ``variances``: of those that were estimated. ``constraints``: name ->
    value, above 0 where a bound is not kept (Optuna's convention)."""

    metrics: Mapping[str, Any]
    variances: Mapping[str, float] = field(default_factory=dict)
    constraints: Mapping[str, float] = field(default_factory=dict)


class ObservationBuilder:
    """For runs over ``objectives`` within ``bounds``; ``baseline``: content of baseline.json ({}: not measured yet)."""

    def __init__(
        self, objectives: Sequence[str], bounds: Bounds = NO_BOUNDS, baseline: Mapping[str, Any] | None = None
    ) -> None:
        self.objectives = tuple(objectives)
        self.bounds = bounds
        self.baseline = baseline or {}
        self._accuracies = tuple(name for name in self.objectives if direction(name) == MAXIMIZED)
        self._curves = LearningCurves(self._accuracies)

    def learn(self, record: TrialRecord) -> None:
        """Take a finished trial in, before the observations of it and others are made."""
        self._curves.learn(record)

    def told(self, record: TrialRecord) -> Observation | None:
        """The observation of ``record``, by all that were learned so far. None: there is none, the trial counts as
        failed.

        A stopped trial's accuracy is what completed ones of the same rung came to in the end; before enough are known,
        nothing is told. Measured on the synthetic problem (benchmarks/results/search_stopping.md): the low figure told
        as final misleads the sampler, silence wastes the trial.
        """
        if record.state is TrialState.FAILED:
            return None
        metrics, variances = dict(record.metrics), {}
        if record.state is TrialState.STOPPED:
            for name in self._accuracies:
                estimate = self._curves.final_accuracy(record, name)
                if estimate is None:
                    return None
                metrics[name], variances[name] = estimate.value, estimate.variance
        return Observation(metrics, variances, self.bounds.violations(metrics, self.baseline))

    def told_baseline(self) -> Observation:
        """The unpruned network, which is a plan too."""
        metrics = self.baseline["metrics"]
        return Observation(metrics, {}, self.bounds.violations(metrics, self.baseline))
