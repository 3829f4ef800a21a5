"""Final accuracy of a stopped trial, extrapolated: a regression from the accuracy at its rung to the final one.

Learned on the completed trials of the run. Added to the sampler's observations with its variance, this is true as far
as anything can be known; the low figure itself would say that the plan is bad where it was only trained less.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from paretoprune.results.store.records import TrialRecord, TrialState

FEWEST = 5  # completed trials below which nothing is said
_PRIOR_WEIGHT = 2.0  # pairs that the expectation "one more here is one more there" counts for


@dataclass(frozen=True)
class Estimate:
    """A final accuracy that was not measured, and its variance."""

    value: float
    variance: float


@dataclass
class _Moments:
    """Count, means and centred co-moments of (accuracy at a rung, final accuracy), updated pair by pair.

    Welford's recurrence: a run of thousands of trials asks after each of them, so no pair is looked at twice, and
    plain sums of squares would lose the small variances of accuracies that hardly differ.
    """

    count: int = 0
    start: float = 0.0
    final: float = 0.0
    start_start: float = 0.0
    start_final: float = 0.0
    final_final: float = 0.0

    def add(self, start: float, final: float) -> None:
        self.count += 1
        start_step, final_step = start - self.start, final - self.final
        self.start += start_step / self.count
        self.final += final_step / self.count
        self.start_start += start_step * (start - self.start)
        self.start_final += start_step * (final - self.final)
        self.final_final += final_step * (final - self.final)


class LearningCurves:
    """The completed trials' accuracies at each rung and at the end, for the metrics that are to be estimated."""

    def __init__(self, metrics: Iterable[str]) -> None:
        self._metrics = tuple(metrics)
        self._pairs: dict[tuple[str, int, str | None], _Moments] = {}  # a file loses by its precision

    def learn(self, record: TrialRecord) -> None:
        """Take a trial in; only completed ones show how accuracy goes on."""
        if record.state is not TrialState.COMPLETED:
            return
        for metric in self._metrics:
            final = record.number(metric)
            if final is None:
                continue
            for rung, best in _best_so_far(record, metric).items():
                if rung < record.epochs:
                    self._pairs.setdefault((metric, rung, record.precision), _Moments()).add(best, final)

    def final_accuracy(self, record: TrialRecord, metric: str) -> Estimate | None:
        """The final ``metric`` of the stopped ``record``, extrapolated; None with too few trials to fit.

        Ridge regression towards a slope of 1 over the completed trials of the same precision that have the same
        rung in their history. Never below the accuracy that the trial has: it keeps its best network.
        """
        reached = _best_so_far(record, metric).get(record.epochs)
        pairs = self._pairs.get((metric, record.epochs, record.precision))
        if reached is None or pairs is None or pairs.count < FEWEST:
            return None
        prior = _PRIOR_WEIGHT * max(pairs.start_start / pairs.count, 1e-8)
        slope = (pairs.start_final + prior) / (pairs.start_start + prior)
        offset = reached - pairs.start
        expected = pairs.final + slope * offset
        squared = pairs.final_final - slope * (2 * pairs.start_final - slope * pairs.start_start)
        noise = max(squared, 0.0) / max(1, pairs.count - 2)
        leverage = 1.0 / pairs.count + offset**2 / (pairs.start_start + prior)
        own = record.number(metric)  # of its file, which may be less than the network's at the rung
        return Estimate(max(expected, reached if own is None else own), noise * (1.0 + leverage))


def _best_so_far(record: TrialRecord, metric: str) -> dict[int, float]:
    """Rung -> the best value of ``metric`` up to it, for the rungs in the record's history (their epochs rise)."""
    best: dict[int, float] = {}
    known: float | None = None
    for row in record.history:
        value = row.get(metric)
        if isinstance(value, (int, float)):
            known = float(value) if known is None else max(known, float(value))
        if known is not None:
            best[row["epochs"]] = known
    return best
