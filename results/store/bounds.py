"""Bounds on what may be chosen; the same words on the command line, in the API and in messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from paretoprune.results.errors import ResultsError
from paretoprune.results.store.accuracy import accuracy_of
from paretoprune.results.store.records import TrialRecord

ROUNDING = 1e-12  # 0.60 - 0.02 must admit 0.58, whatever the last bit says


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a trial must keep to, each bound inclusive; None is no bound. Raises ResultsError for one below zero.

    max_latency_ms: milliseconds. max_params_m: millions of parameters. max_gflops: GFLOPs. min_map: accuracy (mAP50-95,
    or a classifier's top-1) in [0, 1]. max_drop: accuracy lost against the baseline at most (0.02 is two points; a
    negative one demands a gain).
    """

    max_latency_ms: float | None = None
    max_params_m: float | None = None
    max_gflops: float | None = None
    min_map: float | None = None
    max_drop: float | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if value is not None and value < 0 and item.name != "max_drop":
                raise ResultsError(f"{item.name} must be at least 0, but got {value}")

    @property
    def given(self) -> bool:
        """Whether there is any bound."""
        return any(getattr(self, item.name) is not None for item in fields(self))

    @property
    def ask_for_economy(self) -> bool:
        """Whether latency or size is bounded, so that the most accurate trial within is worth naming."""
        return any(limit is not None for limit in (self.max_latency_ms, self.max_params_m, self.max_gflops))

    @property
    def ask_for_accuracy(self) -> bool:
        """Whether accuracy is bounded, so that the fastest trial within is worth naming."""
        return self.min_map is not None or self.max_drop is not None

    def admit(self, record: TrialRecord, baseline: Mapping[str, Any]) -> bool:
        """Whether a record keeps to all bounds; one without a bounded metric does not. baseline: of baseline.json."""
        at_most = {"latency_ms": self.max_latency_ms, "params_m": self.max_params_m, "gflops": self.max_gflops}
        for name, limit in at_most.items():
            value = record.number(name)
            if limit is not None and (value is None or value > limit + ROUNDING):
                return False
        floors = [self.min_map] if self.min_map is not None else []
        floors += [(accuracy_of(baseline["metrics"]) or 0.0) - self.max_drop] if self.max_drop is not None else []
        accuracy = accuracy_of(record.metrics)
        return not floors or (accuracy is not None and accuracy >= max(floors) - ROUNDING)

    def violations(self, metrics: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, float]:
        """Bound -> by how much it is not kept, at most 0 where it is: a fraction of the limit, or accuracy.

        Bounds on metrics that are missing are left out (they are not known yet).
        """
        limits = {"latency_ms": self.max_latency_ms, "params_m": self.max_params_m, "gflops": self.max_gflops}
        found = {
            f"max_{name}": (float(metrics[name]) - limit) / max(limit, ROUNDING)
            for name, limit in limits.items()
            if limit is not None and isinstance(metrics.get(name), (int, float))
        }
        accuracy = accuracy_of(metrics)
        if accuracy is not None and self.min_map is not None:
            found["min_map"] = self.min_map - accuracy
        if accuracy is not None and self.max_drop is not None:
            found["max_drop"] = (accuracy_of(baseline.get("metrics", {})) or 0.0) - self.max_drop - accuracy
        return {name: 0.0 if abs(value) < ROUNDING else value for name, value in found.items()}

    def within(self, records: Iterable[TrialRecord], baseline: Mapping[str, Any]) -> list[TrialRecord]:
        """The records that keep to all bounds, in their order."""
        return [record for record in records if self.admit(record, baseline)]

    def __str__(self) -> str:
        """``at most 5 ms, an accuracy of at least 0.6``; "" without a bound."""
        words = {
            "max_latency_ms": "at most {:g} ms",
            "max_params_m": "at most {:g} M parameters",
            "max_gflops": "at most {:g} GFLOPs",
            "min_map": "an accuracy of at least {:g}",
            "max_drop": "an accuracy at most {:g} below the baseline's",
        }
        given = {name: getattr(self, name) for name in words if getattr(self, name) is not None}
        return ", ".join(words[name].format(value) for name, value in given.items())


NO_BOUNDS = Bounds()
