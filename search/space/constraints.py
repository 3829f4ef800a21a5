"""A run's bounds from its configuration, and what they say of a plan before it is a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paretoprune.pruning.plan import Plan
from paretoprune.results.store.bounds import Bounds
from paretoprune.search.space.prediction import LatencyPredictor

if TYPE_CHECKING:
    from paretoprune.pruning.graph.geometry import NetworkGeometry
    from paretoprune.search.config.sections import SearchSection


def bounds_of_search(section: SearchSection) -> Bounds:
    """The bounds that the front must keep."""
    return Bounds(
        max_latency_ms=section.max_latency_ms,
        max_latency_ratio=section.max_latency_ratio,
        min_speedup=section.min_speedup,
        max_params_m=section.max_params_m,
        max_gflops=section.max_gflops,
        min_map=section.min_map,
    )


@dataclass(frozen=True)
class ConstraintFilter:
    """Says of plans that they cannot keep the bounds: parameters and work are computed, latency is predicted.

    ``geometry`` None (an older run's baseline): only latency is looked at, and that only where it is predicted.
    """

    bounds: Bounds
    baseline_latency_ms: float
    predictor: LatencyPredictor
    geometry: NetworkGeometry | None = None

    def refusal(self, plan: Plan) -> str:
        """Why ``plan`` is not tried; "" where it may keep all bounds."""
        known: dict[str, Any] = {}
        if self.geometry is not None:
            geometry = self.geometry.at(plan.imgsz)
            params, gflops = geometry.costs(geometry.shares([plan]))
            known = {"params_m": float(params[0]), "gflops": float(gflops[0])}
        if self.bounds.limit_latency:
            prediction = self.predictor.predict(plan)
            if prediction is not None:  # its most optimistic end: what may keep the bound is measured
                known["latency_ms"] = prediction.low * self.baseline_latency_ms
        unpruned = {"metrics": {"latency_ms": self.baseline_latency_ms}}
        beyond = [name for name, value in self.bounds.violations(known, unpruned).items() if value > 0]
        return f"beyond {', '.join(beyond)}" if beyond else ""


def make_screen(bounds: Bounds, baseline: Mapping[str, Any], predictor: LatencyPredictor) -> ConstraintFilter | None:
    """The screen of a run from the content of ``baseline.json``; None where nothing is bounded that can be
    predicted."""
    if not bounds.ask_for_economy or not baseline:
        return None
    from paretoprune.pruning.graph.geometry import NetworkGeometry

    content = baseline.get("geometry")
    geometry = NetworkGeometry.from_json(content) if content else None
    return ConstraintFilter(bounds, float(baseline["metrics"]["latency_ms"]), predictor, geometry)
