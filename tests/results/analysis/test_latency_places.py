"""Where latency was measured, from what the records keep."""

from __future__ import annotations

from collections.abc import Callable

from paretoprune.results.analysis.latency_places import latency_places
from paretoprune.results.store.records import TrialRecord


def test_each_kind_of_device_says_what_it_is(record: Callable[..., TrialRecord]) -> None:
    said = {"host": "orin", "device": "gpu", "device_name": "Jetson", "precision": "fp16", "clock_mhz_start": 1300.2}
    told = {"host": "pi", "device": "cpu", "runtime_version": "ncnn 1.0", "threads": 4, "governor": None}
    baseline = {"metrics": {"latency_ms": 9.0, "latency_conditions": said, "latency_conditions_pi": told}}
    records = []
    for name, throttled in (("a", True), ("b", False)):
        plain = record(name, 0.5, 8.0)
        here, there = {**said, "throttled": throttled}, {**told, "throttled": None}
        metrics = {**plain.metrics, "latency_conditions": here, "latency_conditions_pi": there}
        records.append(plain.changed(metrics=metrics))
    main, pi = latency_places(baseline, records)
    assert main.facts == {"host": "orin", "device": "Jetson", "precision": "fp16", "clock": "1300 MHz"}
    assert (main.name, main.throttling) == ("", "1 of 2 measurements")
    assert pi.facts == {"host": "pi", "device": "cpu", "runtime": "ncnn 1.0", "threads": "4"}
    assert (pi.name, pi.throttling) == ("pi", "not told")


def test_whole_predictions_are_said() -> None:
    said = {"device": "cpu", "span": "predict", "images": "16 validation images of d.yaml"}
    (place,) = latency_places({"metrics": {"latency_conditions": said}}, [])
    assert place.facts["what is timed"] == "Ultralytics' predict, on 16 validation images of d.yaml"
    (alone,) = latency_places({"metrics": {"latency_conditions": {**said, "span": "network"}}}, [])
    assert "what is timed" not in alone.facts


def test_a_run_whose_records_do_not_say_has_none(record: Callable[..., TrialRecord]) -> None:
    assert latency_places({"metrics": {"latency_ms": 9.0}}, [record("a", 0.5, 8.0)]) == ()
