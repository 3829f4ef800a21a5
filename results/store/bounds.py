"""Bounds on what may be chosen; the same words on the command line, in the API and in messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from paretoprune.results.errors import ResultsError
from paretoprune.results.store.accuracy import accuracy_of
from paretoprune.results.store.records import TrialRecord

_MAXIMA = ("max_latency_ms", "max_latency_ratio", "max_params_m", "max_gflops")
ROUNDING = 1e-12  # 0.60 - 0.02 must admit 0.58, whatever the last bit says


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a trial must keep to, each bound inclusive; None is no bound. Raises ResultsError for one below zero.

    max_latency_ms: milliseconds. max_latency_ratio: latency as a fraction of the unpruned model's; min_speedup: the
    same the other way round, how many times as fast as it (2 is a ratio of 0.5). max_params_m: millions of parameters.
    max_gflops: GFLOPs. min_map: accuracy (mAP50-95, or a classifier's top-1) in [0, 1]. max_drop: accuracy lost against
    the baseline at most (0.02 is two points; a negative one demands a gain).
    """

    max_latency_ms: float | None = None
    max_latency_ratio: float | None = None
    min_speedup: float | None = None
    max_params_m: float | None = None
    max_gflops: float | None = None
    min_map: float | None = None
    max_drop: float | None = None

    def __post_init__(self) -> None:
        for name, value in self._values.items():
            if value < 0 and name != "max_drop":
                raise ResultsError(f"{name} must be at least 0, but got {value}")
        if self.min_speedup == 0:
            raise ResultsError("min_speedup must be above 0, but got 0; leave it out")

    @property
    def _values(self) -> dict[str, float]:
        """The bounds that are given."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def _costs(self) -> dict[str, tuple[str, float]]:
        """Bound -> the metric that it holds down, and its highest allowed value; of those that are given."""
        given = self._values
        costs = {name: (name.removeprefix("max_"), given[name]) for name in _MAXIMA if name in given}
        return costs | ({"min_speedup": ("latency_ratio", 1 / given["min_speedup"])} if "min_speedup" in given else {})

    @property
    def given(self) -> bool:
        """Whether there is any bound."""
        return bool(self._values)

    @property
    def limit_latency(self) -> bool:
        """Whether latency is bounded."""
        return any(metric in ("latency_ms", "latency_ratio") for metric, _ in self._costs.values())

    @property
    def ask_for_economy(self) -> bool:
        """Whether latency or size is bounded, so that the most accurate trial within is worth naming."""
        return bool(self._costs)

    @property
    def ask_for_accuracy(self) -> bool:
        """Whether accuracy is bounded, so that the fastest trial within is worth naming."""
        return self.min_map is not None or self.max_drop is not None

    def admit(self, record: TrialRecord, baseline: Mapping[str, Any]) -> bool:
        """Whether a record keeps to all bounds; one without a bounded metric does not. baseline: of baseline.json."""
        found = self.violations(record.metrics, baseline)
        return found.keys() == self._values.keys() and all(value <= 0 for value in found.values())

    def violations(self, metrics: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, float]:
        """Bound -> by how much it is not kept, at most 0 where it is: a fraction of the limit, or accuracy.

        Bounds on metrics that are missing are left out (they are not known yet). A missing ratio follows from the
        latencies: the network's, and that of `baseline` (of which nothing else is needed but the accuracy for
        `max_drop`).
        """
        before = baseline.get("metrics", {})
        if "latency_ratio" not in metrics and metrics.get("latency_ms") and before.get("latency_ms"):
            metrics = {**metrics, "latency_ratio": metrics["latency_ms"] / before["latency_ms"]}
        found = {
            name: (float(metrics[metric]) - limit) / max(limit, ROUNDING)
            for name, (metric, limit) in self._costs.items()
            if isinstance(metrics.get(metric), (int, float))
        }
        accuracy = accuracy_of(metrics)
        if accuracy is not None and self.min_map is not None:
            found["min_map"] = self.min_map - accuracy
        if accuracy is not None and self.max_drop is not None:
            found["max_drop"] = (accuracy_of(before) or 0.0) - self.max_drop - accuracy
        return {name: 0.0 if abs(value) < ROUNDING else value for name, value in found.items()}

    def within(self, records: Iterable[TrialRecord], baseline: Mapping[str, Any]) -> list[TrialRecord]:
        """The records that keep to all bounds, in their order."""
        return [record for record in records if self.admit(record, baseline)]

    def __str__(self) -> str:
        """``at most 5 ms, an accuracy of at least 0.6``; "" without a bound."""
        words = {
            "max_latency_ms": "at most {:g} ms",
            "max_latency_ratio": "at most {:g} of the unpruned model's latency",
            "min_speedup": "at least {:g} times the unpruned model's speed",
            "max_params_m": "at most {:g} M parameters",
            "max_gflops": "at most {:g} GFLOPs",
            "min_map": "an accuracy of at least {:g}",
            "max_drop": "an accuracy at most {:g} below the baseline's",
        }
        return ", ".join(words[name].format(value) for name, value in self._values.items())


NO_BOUNDS = Bounds()
