"""A plan's latency before it is a network: the Protocol of a predictor, and the one that knows nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from paretoprune.pruning.plan import Plan
from paretoprune.results.store.records import TrialRecord

PRECISE = 0.1  # half-width: what a measurement has to reach, too, on a busy machine (`USEFUL_HALFWIDTH`)


@dataclass(frozen=True)
class Prediction:
    """Latency as a fraction of the unpruned network's (``ratio``).

    ``low``, ``high``: what a measurement would say in 95 % of cases. ``halfwidth``: of the interval that holds the
    latency itself in 95 % of cases, as a fraction of ``ratio``.
    """

    ratio: float
    low: float
    high: float
    halfwidth: float

    @property
    def is_precise(self) -> bool:
        """Whether it says as much as a measurement: known to within a tenth of itself."""
        return self.halfwidth <= PRECISE

    def foretold(self) -> dict[str, float]:
        """The latency itself with its interval, for a :class:`search.storage.request.TrialRequest`."""
        return {
            "ratio": self.ratio,
            "low": self.ratio * (1 - self.halfwidth),
            "high": self.ratio * (1 + self.halfwidth),
        }


class LatencyPredictor(Protocol):
    """Learns from finished trials; asked by the driver before a plan starts. Never raises, answers in milliseconds."""

    def learn(self, record: TrialRecord) -> None:
        """Take a finished trial's measured ``latency_ratio`` in."""
        ...

    def predict(self, plan: Plan) -> Prediction | None:
        """The latency of ``plan``; None where nothing can be said yet."""
        ...


class NoPredictor:
    """Knows nothing."""

    def learn(self, record: TrialRecord) -> None:
        """Forgets it."""

    def predict(self, plan: Plan) -> Prediction | None:
        """None."""
        return None
