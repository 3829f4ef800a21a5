"""One trial: the order of its phases, the gate, its files, and what becomes of a failure."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from paretoprune.base.errors import typed_line
from paretoprune.cluster.device_lock import DeviceLock
from paretoprune.results.store.bounds import Bounds
from paretoprune.results.store.records import TrialRecord, TrialState
from paretoprune.search.config.run_config import build_config
from paretoprune.search.stopping.rungs import RungReport
from paretoprune.search.storage.event_log import activity
from paretoprune.search.storage.request import TrialRequest, plan_of
from paretoprune.search.trial.trial import TrialSettings, latency_metrics, run_trial
from paretoprune.search.worker.worker import ingredients
from tests.search.fakes import FakeTools, NoGate, accuracy_of

REQUEST = TrialRequest(trial_id="t0001", ratios={"model.0.c0": 0.5, "model.0.d0": 0.5}, provenance="ladder")
SETTINGS = TrialSettings(epochs=1, recover=True, baseline_latency_ms=10.0)


class NotingGate:
    """Notes into the tools' calls when the device is taken and given back."""

    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    @contextmanager
    def using(self) -> Iterator[None]:
        self._calls.append("use")
        yield
        self._calls.append("leave")

    @contextmanager
    def measuring(self) -> Iterator[None]:
        self._calls.append("alone")
        yield
        self._calls.append("done")


def test_phases_in_order_on_the_device(tmp_path: Path) -> None:
    tools = FakeTools()
    record = run_trial(REQUEST, SETTINGS, tools, NotingGate(tools.calls), tmp_path / "t0001")
    expected = "prune recover use leave measure evaluate finetune use save leave release"
    assert tools.calls == expected.split()
    assert record.state is TrialState.COMPLETED
    phases = "prune recover stats latency evaluate finetune wait_for_latency save"
    assert list(record.seconds) == phases.split()


def test_the_plan_says_what_made_the_network_before_any_epoch(tmp_path: Path) -> None:
    made_with = {"importance": "taylor", "recovery": "refit"}
    settings = replace(SETTINGS, ingredients={**made_with, "distilled": True})
    run_trial(REQUEST, settings, FakeTools(), NoGate(), tmp_path / "t0001")
    assert json.loads((tmp_path / "t0001" / "plan.json").read_text())["made_with"] == made_with


def test_seconds_of_standing_still_for_another_are_no_phases_own(tmp_path: Path) -> None:
    measured, over = threading.Event(), threading.Event()

    def measure() -> None:
        with DeviceLock("cpu", tmp_path).measuring():
            measured.set()
            over.wait(1.0)

    measurer = threading.Thread(target=measure)
    measurer.start()
    measured.wait()
    record = run_trial(REQUEST, SETTINGS, FakeTools(), DeviceLock("cpu", tmp_path), tmp_path / "t0001")
    measurer.join()
    assert record.seconds["wait_for_device"] > 0.5
    assert record.seconds["prune"] < 0.5  # which is where it stood still


def test_record_holds_the_figures_and_lies_on_disk(tmp_path: Path) -> None:
    record = run_trial(REQUEST, SETTINGS, FakeTools(), NoGate(), tmp_path / "t0001")
    metrics = record.metrics
    start = accuracy_of(REQUEST.ratios)
    assert metrics["map50_95_refit"] == pytest.approx(start)
    assert metrics["map50_95"] == pytest.approx(start + 0.05)
    assert (record.epochs, record.fidelity, record.provenance) == (1, "epochs", "ladder")
    assert metrics["speedup"] == pytest.approx(1.125)
    # the run's own baseline latency (10 ms), not the session's (20 ms), is the yardstick
    assert metrics["latency_ms"] == pytest.approx(10.0 / 1.125)
    assert metrics["baseline_latency_measured_ms"] == 20.0
    assert TrialRecord.from_json(json.loads((tmp_path / "t0001" / "record.json").read_text())) == record
    assert json.loads((tmp_path / "t0001" / "plan.json").read_text())["hash"] == record.plan_hash
    assert activity(tmp_path / "t0001" / "events.jsonl").text == "finished"


def test_record_says_what_the_network_was_made_with(tmp_path: Path) -> None:
    settings = {"recover": {"how": "bn", "importance": "l2"}, "trial": {"epochs": 2, "distill": True}}
    config = build_config({"model": {"path": "m.pt"}, "data": {"path": "d.yaml"}, **settings}, "test")
    made_with = TrialSettings(1, True, 10.0, ingredients=ingredients(config))
    record = run_trial(REQUEST, made_with, FakeTools(), NoGate(), tmp_path / "t0001")
    read = TrialRecord.from_json(json.loads((tmp_path / "t0001" / "record.json").read_text()))
    for metrics in (record.metrics, read.metrics):
        assert [metrics[k] for k in ("recovery", "importance", "distilled")] == ["bn", "l2", True]


def test_without_epochs_the_refit_is_judged(tmp_path: Path) -> None:
    tools = FakeTools()
    record = run_trial(REQUEST, TrialSettings(0, False, 10.0), tools, NoGate(), tmp_path / "t0001")
    assert tools.calls == ["prune", "measure", "evaluate", "save", "release"]
    assert (record.epochs, record.fidelity) == (0, "refit")
    assert record.metrics["map50_95"] == record.metrics["map50_95_refit"]


@pytest.mark.parametrize("phase", ["prune", "recover", "finetune", "save", "measure"])
def test_an_exception_becomes_a_failed_record(phase: str, tmp_path: Path) -> None:
    def hook(now: str, ratios: Mapping[str, float]) -> None:
        if now == phase:
            raise RuntimeError("CUDA went away\nand a long tail")

    tools = FakeTools(hook=hook)
    record = run_trial(REQUEST, SETTINGS, tools, NoGate(), tmp_path / "t0001")
    named = "latency" if phase == "measure" else phase
    assert record.state is TrialState.FAILED
    assert record.error == f"{named}: RuntimeError: CUDA went away"
    assert record.metrics == {}
    assert record.plan_hash == plan_of(REQUEST).hash
    assert "Traceback" in (tmp_path / "t0001" / "trial.log").read_text()
    assert (tmp_path / "t0001" / "record.json").is_file()
    assert tools.calls[-1] == "release"


class EarlyStopper:
    """Stops at one rung, and keeps what it was told."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.reports: list[RungReport] = []

    def stops(self, report: RungReport) -> bool:
        self.reports.append(report)
        return report.epochs == self.at


def test_a_judge_that_lets_it_pass_is_asked_at_every_rung_and_only_there(tmp_path: Path) -> None:
    judge = EarlyStopper(at=99)
    settings = TrialSettings(4, True, 10.0, rungs=(0, 1, 3))
    record = run_trial(REQUEST, settings, FakeTools(epochs=4), NoGate(), tmp_path / "t0001", judge)
    start = accuracy_of(REQUEST.ratios)
    assert [report.epochs for report in judge.reports] == [0, 1, 3]
    assert [report.accuracy for report in judge.reports] == pytest.approx([start, start + 0.05, start + 0.15])
    costs = {"params_m": 2.9, "gflops": 8.0, "size_mb": 11.6, "latency_ms": 10.0 / 1.125}
    assert judge.reports[0].costs == pytest.approx(costs)
    assert (record.state, record.epochs) == (TrialState.COMPLETED, 4)
    assert [row["epochs"] for row in record.history] == [0, 1, 2, 3, 4]
    assert [row["map50_95"] for row in record.history] == pytest.approx([start + 0.05 * i for i in range(5)])


def test_a_trial_stopped_before_training_keeps_its_figures_and_its_network(tmp_path: Path) -> None:
    tools = FakeTools()
    record = run_trial(REQUEST, replace(SETTINGS, rungs=(0,)), tools, NoGate(), tmp_path / "t0001", EarlyStopper(at=0))
    assert "finetune" not in tools.calls
    assert (record.state, record.epochs, record.fidelity) == (TrialState.STOPPED, 0, "refit")
    assert record.metrics["map50_95"] == pytest.approx(accuracy_of(REQUEST.ratios))
    assert record.metrics["latency_ms"] == pytest.approx(10.0 / 1.125)
    assert (tmp_path / "t0001" / "pruned.pt").is_file()


FORETOLD_REQUEST = REQUEST.changed(foretold={"ratio": 0.8, "low": 0.78, "high": 0.82})


def test_a_foretold_trial_that_is_stopped_at_the_first_rung_is_never_timed(tmp_path: Path) -> None:
    tools, judge = FakeTools(), EarlyStopper(at=0)
    settings = replace(SETTINGS, rungs=(0,), foretells=True)
    record = run_trial(FORETOLD_REQUEST, settings, tools, NoGate(), tmp_path / "t0001", judge)
    assert "measure" not in tools.calls
    assert judge.reports[0].costs["latency_ms"] == 8.0
    assert record.state is TrialState.STOPPED
    figures = {name: value for name, value in record.metrics.items() if "latency" in name or "speedup" in name}
    expected = {"latency_ms": 8.0, "latency_ratio": 0.8, "speedup": 1.25, "latency_source": "foretold"}
    assert figures == {**expected, "speedup_pi95": [1 / 0.82, 1 / 0.78]}
    assert TrialRecord.from_json(json.loads((tmp_path / "t0001" / "record.json").read_text())) == record


def test_a_foretold_trial_that_goes_on_is_timed_before_it_is_trained(tmp_path: Path) -> None:
    tools, judge = FakeTools(), EarlyStopper(at=99)
    settings = replace(SETTINGS, rungs=(0, 1), foretells=True)
    record = run_trial(FORETOLD_REQUEST, settings, tools, NoGate(), tmp_path / "t0001", judge)
    assert tools.calls == "prune recover evaluate measure finetune save release".split()
    assert [report.costs["latency_ms"] for report in judge.reports] == [8.0, pytest.approx(10.0 / 1.125)]
    assert record.metrics["latency_ms"] == pytest.approx(10.0 / 1.125)
    assert "latency_source" not in record.metrics
    assert "latency_measured_ms" in record.metrics


@pytest.mark.parametrize(
    "change",
    [{"foretells": False, "rungs": (0,)}, {"foretells": True, "rungs": (1,)}, {"foretells": True, "epochs": 0}],
)
def test_what_is_compared_in_the_end_is_timed_first(change: dict[str, Any], tmp_path: Path) -> None:
    tools = FakeTools()
    run_trial(FORETOLD_REQUEST, replace(SETTINGS, **change), tools, NoGate(), tmp_path / "t0001", EarlyStopper(at=0))
    assert tools.calls[:4] == "prune recover measure evaluate".split()


def test_a_trial_stopped_in_training_names_its_fidelity(tmp_path: Path) -> None:
    settings = TrialSettings(9, True, 10.0, rungs=(0, 1, 3))
    record = run_trial(REQUEST, settings, FakeTools(epochs=9), NoGate(), tmp_path / "t0001", EarlyStopper(at=3))
    assert (record.state, record.epochs, record.fidelity_label) == (TrialState.STOPPED, 3, "3 epochs")
    assert record.metrics["map50_95"] == pytest.approx(accuracy_of(REQUEST.ratios) + 0.15)


def test_a_rung_is_on_disk_before_the_judge_is_asked(tmp_path: Path) -> None:
    events = tmp_path / "t0001" / "events.jsonl"

    class Reader(EarlyStopper):
        def stops(self, report: RungReport) -> bool:
            last = json.loads(events.read_text().splitlines()[-1])
            assert (last["event"], last["epochs"], last["accuracy"]) == ("rung", report.epochs, report.accuracy)
            return super().stops(report)

    judge = Reader(at=99)
    record = run_trial(REQUEST, replace(SETTINGS, rungs=(0, 1)), FakeTools(), NoGate(), tmp_path / "t0001", judge)
    assert record.error is None
    assert len(judge.reports) == 2


def test_latency_measured_elsewhere_is_waited_for_after_training(tmp_path: Path) -> None:
    class Remote(FakeTools):
        def start_measure(self, model: Any, keep: Any = None, device: str = "") -> Any:
            values = self.measure(model)
            calls = self.calls

            class Pending:
                def known(self) -> None:
                    return None

                def result(self) -> dict[str, Any]:
                    calls.append("collect")
                    return values

            return Pending()

    tools, judge = Remote(), EarlyStopper(at=99)
    record = run_trial(REQUEST, replace(SETTINGS, rungs=(0,)), tools, NoGate(), tmp_path / "t0001", judge)
    assert tools.calls[-4:] == ["finetune", "collect", "save", "release"]
    assert "latency_ms" not in judge.reports[0].costs
    assert record.metrics["speedup"] == pytest.approx(1.125)


def test_a_network_beyond_the_bounds_is_not_trained_and_says_by_how_much(tmp_path: Path) -> None:
    tools = FakeTools()
    settings = replace(SETTINGS, bounds=Bounds(max_latency_ms=8.0, max_params_m=5.0))
    record = run_trial(REQUEST, settings, tools, NoGate(), tmp_path / "t0001")
    assert "finetune" not in tools.calls
    assert (record.state, record.fidelity, record.feasible) == (TrialState.STOPPED, "refit", False)
    assert record.violations == pytest.approx({"max_latency_ms": 10.0 / 1.125 / 8.0 - 1.0})
    relative = replace(SETTINGS, bounds=Bounds(min_speedup=1.25, max_latency_ratio=0.8))  # 8 ms, again
    record = run_trial(REQUEST, relative, FakeTools(), NoGate(), tmp_path / "relative")
    assert record.violations == pytest.approx(dict.fromkeys(("min_speedup", "max_latency_ratio"), 1.25 / 1.125 - 1.0))
    within = replace(SETTINGS, bounds=Bounds(max_latency_ms=9.0, max_params_m=5.0))
    kept = run_trial(REQUEST, within, FakeTools(), NoGate(), tmp_path / "t0002")
    assert (kept.state, kept.violations) == (TrialState.COMPLETED, {})


def test_too_little_accuracy_is_known_after_training_only(tmp_path: Path) -> None:
    settings = replace(SETTINGS, bounds=Bounds(min_map=0.99))
    record = run_trial(REQUEST, settings, FakeTools(), NoGate(), tmp_path / "t0001")
    assert (record.state, record.epochs) == (TrialState.COMPLETED, 1)
    assert list(record.violations) == ["min_map"]


def test_nan_becomes_a_failed_record_that_names_the_field(tmp_path: Path) -> None:
    class Blind(FakeTools):
        def stats(self, model: object) -> dict[str, float]:
            return {"params_m": float("nan"), "gflops": 1.0, "size_mb": 1.0}

    record = run_trial(REQUEST, SETTINGS, Blind(), NoGate(), tmp_path / "t0001")
    assert record.state is TrialState.FAILED
    assert record.error is not None
    assert "params_m" in record.error


def test_ctrl_c_is_not_a_failed_trial(tmp_path: Path) -> None:
    def hook(phase: str, ratios: Mapping[str, float]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_trial(REQUEST, SETTINGS, FakeTools(hook=hook), NoGate(), tmp_path / "t0001")
    assert not (tmp_path / "t0001" / "record.json").exists()


@pytest.mark.parametrize("speedup", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_speedup_is_refused(speedup: float) -> None:
    measured = {"median_ms": 1.0, "p90_ms": 1.0, "baseline_median_ms": 1.0, "speedup": speedup, "speedup_ci95": [1, 1]}
    with pytest.raises(ValueError, match="a measured speed-up must be above 0"):
        latency_metrics(measured, 10.0)


def test_one_line_is_typed_line() -> None:
    assert typed_line(ValueError("first\nsecond")) == "ValueError: first"
    assert typed_line(ValueError()) == "ValueError"
    assert len(typed_line(ValueError("x" * 1000))) == 300
