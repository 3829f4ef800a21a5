"""What a stopped trial would have reached: a regression from the accuracy at its rung to the final one.

Learned on the completed trials of the run. Told to a sampler with its variance, this is true as far as anything can be
known; the low figure itself would say that the plan is bad where it was only trained less.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from results.records import TrialRecord, TrialState

FEWEST = 5  # completed trials below which nothing is said
_PRIOR_WEIGHT = 2.0  # pairs that the expectation "one more here is one more there" counts for


@dataclass(frozen=True)
class Estimate:
    """A final accuracy that was not measured, and its variance."""

    value: float
    variance: float


def estimate_final(record: TrialRecord, metric: str, completed: Iterable[TrialRecord]) -> Estimate | None:
    """What ``record``, stopped, would have had in ``metric``; None where too few trials show the way.

    Ridge regression towards a slope of 1 over the completed trials that have the same rung in their history. Never
    below the rung's own accuracy: a trial keeps its best network.
    """
    rung = record.epochs
    reached = _best_up_to(record, metric, rung)
    pairs = [
        (start, final)
        for other in completed
        if other.state is TrialState.COMPLETED and other.epochs > rung
        for start, final in [(_best_up_to(other, metric, rung), other.number(metric))]
        if start is not None and final is not None
    ]
    if reached is None or len(pairs) < FEWEST:
        return None
    starts, finals = np.array(pairs).T
    spread = float(np.var(starts))
    offsets = starts - starts.mean()
    prior = _PRIOR_WEIGHT * max(spread, 1e-8)
    slope = (float(offsets @ (finals - finals.mean())) + prior) / (float(offsets @ offsets) + prior)
    expected = finals.mean() + slope * (reached - starts.mean())
    residuals = finals - finals.mean() - slope * offsets
    noise = float(residuals @ residuals) / max(1, len(pairs) - 2)
    leverage = 1.0 / len(pairs) + (reached - starts.mean()) ** 2 / (float(offsets @ offsets) + prior)
    return Estimate(max(float(expected), reached), noise * (1.0 + float(leverage)))


def _best_up_to(record: TrialRecord, metric: str, epochs: int) -> float | None:
    """The best value of ``metric`` in the history up to ``epochs``; None where that rung is not in it."""
    values = [
        float(row[metric])
        for row in record.history
        if row["epochs"] <= epochs and isinstance(row.get(metric), (int, float))
    ]
    at_rung = any(row["epochs"] == epochs for row in record.history)
    return max(values) if values and at_rung else None
