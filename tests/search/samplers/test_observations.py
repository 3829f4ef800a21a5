"""What the sampler is told: estimates for stopped trials, bounds, budgets, plans that need not be tried."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from paretoprune.pruning.plan import Plan
from paretoprune.results.store.bounds import Bounds
from paretoprune.results.store.records import TrialRecord, TrialState
from paretoprune.search.samplers.extrapolation import FEWEST, Estimate, LearningCurves
from paretoprune.search.samplers.observations import ObservationBuilder
from paretoprune.search.space.constraints import ConstraintFilter
from paretoprune.search.space.prediction import NoPredictor, Prediction
from paretoprune.search.sweep.budget import Budget

OBJECTIVES = ("map50_95", "latency_ms")


def record(name: str, start: float, final: float | None = None, **changes: Any) -> TrialRecord:
    """A trial of three epochs that began at ``start``; ``final`` None: stopped there."""
    history = [{"epochs": 0, "map50_95": start}]
    history += [] if final is None else [{"epochs": 3, "map50_95": final}]
    values: dict[str, Any] = {
        "trial_id": name, "state": TrialState.STOPPED if final is None else TrialState.COMPLETED, "plan_hash": name,
        "ratios": {}, "metrics": {"map50_95": start if final is None else final, "latency_ms": 8.0},
        "epochs": 0 if final is None else 3, "fidelity": "refit" if final is None else "epochs", "finished_at": 1.0,
        "seconds": {"finetune": 1800.0}, "history": history,
    }  # fmt: skip
    return TrialRecord(**{**values, **changes})


def estimate_final(stopped: TrialRecord, metric: str, others: Iterable[TrialRecord]) -> Estimate | None:
    curves = LearningCurves([metric])
    for other in others:
        curves.learn(other)
    return curves.final_accuracy(stopped, metric)


def completed(count: int, gain: float = 0.1, slope: float = 1.0) -> list[TrialRecord]:
    starts = [0.2 + 0.03 * i for i in range(count)]
    return [record(f"c{i}", start, slope * start + gain) for i, start in enumerate(starts)]


def test_a_stopped_trial_is_told_as_the_completed_ones_went_on() -> None:
    estimate = estimate_final(record("s", 0.25), "map50_95", completed(10))
    assert estimate is not None
    assert estimate.value == pytest.approx(0.35)
    assert estimate.variance == pytest.approx(0.0, abs=1e-9)


def test_a_slope_is_learned_and_scatter_becomes_variance() -> None:
    steep = estimate_final(record("s", 0.3), "map50_95", completed(40, gain=0.3, slope=0.5))
    assert steep is not None
    assert steep.value == pytest.approx(0.45, abs=0.02)
    scattered = [record(f"c{i}", 0.3, 0.4 + (0.05 if i % 2 else -0.05)) for i in range(20)]
    estimate = estimate_final(record("s", 0.3), "map50_95", scattered)
    assert estimate is not None
    assert estimate.value == pytest.approx(0.4)
    assert estimate.variance == pytest.approx(0.0025, rel=0.3)


def test_pair_by_pair_is_the_ridge_regression_over_all_pairs() -> None:
    """The textbook formulas on whole arrays; hardly any spread, where sums of squares would cancel."""
    generator = np.random.default_rng(0)
    starts = 0.6 + 1e-6 * generator.normal(size=200)
    finals = 0.61 + 0.7 * (starts - 0.6) + 1e-7 * generator.normal(size=200)
    pairs = zip(starts.tolist(), finals.tolist(), strict=True)
    found = estimate_final(record("s", 0.6 + 2e-6), "map50_95", [record(f"c{i}", *p) for i, p in enumerate(pairs)])
    assert found is not None
    offsets, prior = starts - starts.mean(), 2.0 * max(float(np.var(starts)), 1e-8)
    slope = (offsets @ (finals - finals.mean()) + prior) / (offsets @ offsets + prior)
    step = 0.6 + 2e-6 - starts.mean()
    residuals = finals - finals.mean() - slope * offsets
    variance = residuals @ residuals / 198 * (1 + 1 / 200 + step**2 / (offsets @ offsets + prior))
    assert found.value == pytest.approx(finals.mean() + slope * step, abs=1e-12)
    assert found.variance == pytest.approx(variance, rel=1e-6)


def test_it_is_never_below_what_was_reached_and_silent_where_little_is_known() -> None:
    estimate = estimate_final(record("s", 0.5), "map50_95", completed(10, gain=-0.1))
    assert estimate is not None
    assert estimate.value == 0.5
    assert estimate_final(record("s", 0.3), "map50_95", completed(FEWEST - 1)) is None
    assert estimate_final(record("s", 0.3), "map50", completed(10)) is None
    other_rung = record("s", 0.3, epochs=1, fidelity="epochs", history=[{"epochs": 1, "map50_95": 0.3}])
    assert estimate_final(other_rung, "map50_95", completed(10)) is None


def test_the_low_figure_is_never_told_as_final() -> None:
    teller, others = ObservationBuilder(OBJECTIVES), completed(10)
    stopped = record("s", 0.25)
    assert teller.told(stopped) is None
    for other in (*others, stopped):
        teller.learn(other)
    told = teller.told(stopped)
    assert told is not None
    assert told.metrics["map50_95"] == pytest.approx(0.35)
    assert told.metrics["latency_ms"] == 8.0
    assert set(told.variances) == {"map50_95"}
    plain = teller.told(others[0])
    assert plain is not None
    assert (plain.metrics, plain.variances) == (others[0].metrics, {})
    failed = record("f", 0.2, state=TrialState.FAILED, error="no luck")
    assert teller.told(failed) is None


def test_bounds_are_told_in_optunas_way() -> None:
    teller = ObservationBuilder(OBJECTIVES, Bounds(max_latency_ms=4.0, min_map=0.2))
    told = teller.told(record("c", 0.3, 0.5))
    assert told is not None
    assert told.constraints == pytest.approx({"max_latency_ms": 1.0, "min_map": -0.3})


class Foretold:
    """Every plan at 0.5 of the baseline, give or take 0.1."""

    def learn(self, record: TrialRecord) -> None: ...

    def predict(self, ratios: Any) -> Prediction:
        return Prediction(0.5, 0.4, 0.6, 0.1)


def test_a_plan_is_refused_only_where_even_the_best_case_is_too_slow() -> None:
    assert ConstraintFilter(Bounds(max_latency_ms=3.9), 10.0, Foretold()).refusal({}) == "beyond max_latency_ms"
    assert ConstraintFilter(Bounds(max_latency_ms=4.1), 10.0, Foretold()).refusal({}) == ""
    assert ConstraintFilter(Bounds(max_latency_ms=0.1), 10.0, NoPredictor()).refusal({}) == ""
    assert ConstraintFilter(Bounds(max_latency_ratio=0.39), 10.0, Foretold()).refusal({}) == "beyond max_latency_ratio"
    assert (
        ConstraintFilter(Bounds(min_speedup=2.6), 10.0, Foretold()).refusal({}) == "beyond min_speedup"
    )  # 0.4 at best
    assert ConstraintFilter(Bounds(min_speedup=2.5, max_latency_ratio=0.4), 10.0, Foretold()).refusal({}) == ""


def test_parameters_and_work_are_computed() -> None:
    class Geometry:
        def at(self, imgsz: int | None, precision: str | None = None) -> Any:
            return self

        def shares(self, plans: Any) -> Any:
            return plans

        def costs(self, plans: Any) -> Any:
            return [3.0 - plan.ratios["a"] for plan in plans], [8.0 - plan.ratios["a"] for plan in plans]

    geometry: Any = Geometry()
    screen = ConstraintFilter(Bounds(max_params_m=2.5, max_gflops=7.0), 10.0, NoPredictor(), geometry)
    assert screen.refusal(Plan({"a": 0.4})) == "beyond max_params_m, max_gflops"
    assert screen.refusal(Plan({"a": 0.6})) == "beyond max_gflops"
    assert screen.refusal(Plan({"a": 0.9})) == "beyond max_gflops"
    assert ConstraintFilter(Bounds(max_params_m=2.5), 10.0, NoPredictor(), geometry).refusal(Plan({"a": 0.5})) == ""


def test_budgets_in_hours_and_gpu_hours() -> None:
    now = [0.0]
    budget = Budget(hours=2.0, clock=lambda: now[0])
    assert not budget.used_up([])
    now[0] = 7200.0
    assert budget.used_up([]) == "the time budget of 2 h"
    finished = [record(f"c{i}", 0.3, 0.4) for i in range(4)]  # half an hour each
    gpu = Budget(gpu_hours=4.0, gpus=2.0, clock=lambda: now[0])
    assert gpu.used_up(finished) == "the budget of 4 GPU h"
    assert not gpu.used_up(finished[:3])
    gpu.began("t9")
    now[0] += 1800.0
    assert gpu.used_gpu_hours(finished[:3]) == pytest.approx(4.0)
    assert gpu.used_up(finished[:3])
    gpu.ended("t9")
    assert not gpu.used_up(finished[:3])


def test_without_limits_nothing_is_ever_used_up() -> None:
    assert Budget().used_up([record("c", 0.3, 0.4)] * 1000) == ""
