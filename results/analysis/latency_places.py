"""Where latency was measured: each kind of device, as it said of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paretoprune.results.store.records import TrialRecord, of_device

_CONDITIONS = "latency_conditions"


@dataclass(frozen=True)
class LatencyPlace:
    """A kind of device, "" the main one.

    ``facts``: what it said while the unpruned model was measured, in words. ``measured``: trials that were measured
    there, of which ``throttled`` while its clock was held down; None where it does not tell.
    """

    name: str
    facts: Mapping[str, str]
    measured: int
    throttled: int | None

    @property
    def throttling(self) -> str:
        """For tables."""
        return "not told" if self.throttled is None else f"{self.throttled} of {self.measured} measurements"


def latency_places(baseline: Mapping[str, Any], records: Sequence[TrialRecord]) -> tuple[LatencyPlace, ...]:
    """The run's devices, the main one first; none of a run whose records do not say."""
    metrics = baseline["metrics"]
    names = [name.removeprefix(_CONDITIONS).removeprefix("_") for name in metrics if name.startswith(_CONDITIONS)]
    return tuple(_place(name, metrics, records) for name in sorted(names) if of_device(metrics, name).get(_CONDITIONS))


def _place(name: str, metrics: Mapping[str, Any], records: Sequence[TrialRecord]) -> LatencyPlace:
    said = of_device(metrics, name)[_CONDITIONS]
    seen = [of_device(record.metrics, name).get(_CONDITIONS) for record in records]
    told = [conditions.get("throttled") for conditions in seen if conditions]
    clock, memory = said.get("clock_mhz_start"), said.get("memory_free_mb")
    facts = {
        "host": said.get("host"),
        "device": said.get("device_name") or said.get("device"),
        "system": said.get("driver"),
        "runtime": said.get("runtime_version") or said.get("runtime"),
        "precision": said.get("precision"),
        "what is timed": f"Ultralytics' predict, on {said['images']}" if said.get("span") == "predict" else None,
        "threads": said.get("threads"),
        "clock": f"{clock:.0f} MHz" if clock else None,
        "governor": said.get("governor"),
        "power mode": said.get("power_mode"),
        "memory free": f"{memory / 1024:.1f} GB" if memory else None,
    }
    throttled = None if None in told or not told else sum(told)
    return LatencyPlace(
        name, {key: str(value) for key, value in facts.items() if value is not None}, len(told), throttled
    )
