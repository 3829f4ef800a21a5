"""The driver's latency model over records, on a network of two groups whose latency law is known."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import pytest

from paretoprune.pruning.graph.geometry import FIXED, ConvGeometry, GroupGeometry, NetworkGeometry
from paretoprune.pruning.plan import Plan
from paretoprune.results.store.records import TrialRecord, TrialState
from paretoprune.search.space.latency_predictor import MOST_PLANS, RecordPredictor, make_predictor
from paretoprune.search.space.prediction import NoPredictor, Prediction

LAYERS = ("model.0", "model.1")


def geometry() -> NetworkGeometry:
    """Three convolutions in a row, 3 -> 64 -> 64 -> 10; the first two are prunable."""

    def conv(name: str, inputs: int, outputs: int, reads: int, writes: int) -> ConvGeometry:
        return ConvGeometry(name, ((outputs, writes),), ((inputs, reads),), 9, 100, 100, 100, 1, False, False)

    return NetworkGeometry(
        imgsz=32,
        params=100_000,
        gflops=0.1,
        groups=tuple(GroupGeometry(name, (name,), 64) for name in LAYERS),
        convs=(conv("a", FIXED, 0, 3, 64), conv("b", 0, 1, 64, 64), conv("c", 1, FIXED, 64, 10)),
        norms=(),
        linears=(),
    )


def true_ratio(ratios: Mapping[str, float], area: float = 1.0) -> float:
    """A fifth is overhead, the rest goes with the middle convolution and the input's area."""
    first, second = (1 - ratios.get(layer, 0.0) for layer in LAYERS)
    return 0.2 + 0.8 * first * second * area


def record(number: int, ratios: Mapping[str, float], state: TrialState = TrialState.COMPLETED) -> TrialRecord:
    ratio = true_ratio(ratios)
    metrics: dict[str, Any] = {
        "map50_95": 0.5, "latency_ms": 20 * ratio, "latency_ratio": ratio, "speedup_ci95": [0.99 / ratio, 1.01 / ratio],
    }  # fmt: skip
    failed = state is TrialState.FAILED
    return TrialRecord(
        trial_id=f"t{number:04d}", state=state, plan_hash=str(number), ratios=dict(ratios),
        metrics={} if failed else metrics, epochs=0, fidelity="refit", finished_at=float(number),
        error="prune: out of luck" if failed else None,
    )  # fmt: skip


def random_plan(generator: random.Random) -> dict[str, float]:
    return {layer: generator.randrange(0, 6) / 8 for layer in LAYERS}


def records(count: int) -> list[TrialRecord]:
    generator = random.Random(0)
    return [record(number, random_plan(generator)) for number in range(count)]


def test_it_foretells_from_the_records_and_from_nothing_else() -> None:
    baseline = {"geometry": geometry().to_json()}
    predictor = make_predictor(baseline, records(20))
    again = make_predictor(baseline, records(20))
    plan = Plan({"model.0": 0.125, "model.1": 0.625})
    found = predictor.predict(plan)
    assert found is not None
    assert found == again.predict(plan)
    assert found.ratio == pytest.approx(true_ratio(plan.ratios), rel=0.02)
    assert found.low < true_ratio(plan.ratios) < found.high
    assert found.high - found.low < 0.1
    assert isinstance(predictor, RecordPredictor)
    assert predictor.error is not None
    assert predictor.error.plans == 20
    assert predictor.error.median < 0.02


def test_the_size_of_the_input_counts() -> None:
    """All but the overhead goes with the area; sizes and widths that were not measured together are predicted."""
    generator, predictor = random.Random(1), RecordPredictor(geometry())
    for number in range(30):
        ratios, imgsz = random_plan(generator), generator.choice([None, 24, 20])
        ratio = true_ratio(ratios, ((imgsz or 32) / 32) ** 2)
        metrics = {"latency_ratio": ratio, "speedup_ci95": [0.99 / ratio, 1.01 / ratio]}
        known = record(number, ratios)
        predictor.learn(known.changed(metrics={**known.metrics, **metrics}, imgsz=imgsz))
    for imgsz in (None, 28, 24, 20):
        found = predictor.predict(Plan({"model.0": 0.125, "model.1": 0.625}, imgsz=imgsz))
        assert found is not None
        area = ((imgsz or 32) / 32) ** 2
        assert found.ratio == pytest.approx(true_ratio({"model.0": 0.125, "model.1": 0.625}, area), rel=0.03)


def test_it_is_silent_until_enough_was_measured_and_learns_on() -> None:
    predictor = RecordPredictor(geometry())
    plan = Plan({"model.0": 0.5})
    widths = []
    for each in records(40):
        predictor.learn(each)
        found = predictor.predict(plan)
        widths.append(None if found is None else found.high - found.low)
    assert widths[:5] == [None] * 5
    known = [width for width in widths[5:] if width is not None]
    assert len(known) == 35
    assert known[-1] < known[0]


def test_trials_without_a_latency_are_passed_over_and_stopped_ones_count() -> None:
    predictor = RecordPredictor(geometry())
    for each in records(5):
        predictor.learn(each)
    predictor.learn(record(90, {"model.0": 0.25}, TrialState.FAILED))
    predictor.learn(record(91, {"model.7": 0.25}))  # of another model
    assert predictor.predict(Plan({"model.0": 0.5})) is None
    predictor.learn(record(92, {"model.0": 0.25}, TrialState.STOPPED))
    assert predictor.predict(Plan({"model.0": 0.5})) is not None
    assert predictor.predict(Plan({"model.7": 0.5})) is None


def test_what_was_foretold_teaches_nothing() -> None:
    predictor = RecordPredictor(geometry())
    for each in records(5):
        predictor.learn(each)
    measured = record(90, {"model.0": 0.25}, TrialState.STOPPED)
    predictor.learn(measured.changed(metrics={**measured.metrics, "latency_source": "foretold"}))
    assert predictor.predict(Plan({"model.0": 0.5})) is None


@pytest.mark.parametrize(("halfwidth", "precise"), [(0.08, True), (0.12, False)])
def test_precise_is_within_a_tenth_of_itself_whatever_a_measurement_would_say(halfwidth: float, precise: bool) -> None:
    prediction = Prediction(0.5, 0.4, 0.6, halfwidth)
    assert prediction.is_precise is precise
    foretold = {"ratio": 0.5, "low": 0.5 * (1 - halfwidth), "high": 0.5 * (1 + halfwidth)}
    assert prediction.foretold() == pytest.approx(foretold)


def test_only_the_latest_plans_of_a_long_run_are_fitted() -> None:
    predictor = RecordPredictor(geometry())
    for each in records(MOST_PLANS + 50):
        predictor.learn(each)
    assert predictor.error is not None
    assert predictor.error.plans == MOST_PLANS


def test_a_baseline_without_geometry_foretells_nothing() -> None:
    predictor = make_predictor({"metrics": {}}, records(20))
    assert isinstance(predictor, NoPredictor)
    assert predictor.predict(Plan({"model.0": 0.5})) is None
