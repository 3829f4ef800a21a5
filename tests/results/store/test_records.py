"""What a record refuses, and the store's promises: nothing lost, nothing doubled, torn lines found."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paretoprune.results.analysis.figures import point
from paretoprune.results.analysis.frames import trials_frame
from paretoprune.results.errors import DuplicateTrialError, RecordError, SchemaVersionError, StoreError
from paretoprune.results.store.records import PI95, RecordStore, TrialRecord, TrialState, speedup_interval
from paretoprune.results.store.run_folder import RunFolder

Build = Callable[..., TrialRecord]
FIXTURES = Path(__file__).parent.parent / "fixtures"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float64("nan"), None])
def test_a_metric_that_is_no_number_is_refused_by_name(record: Build, value: Any) -> None:
    with pytest.raises(RecordError, match=r"metrics\[map50\] must be a finite number, but got"):
        record("a", metrics={"map50": value})
    with pytest.raises(RecordError, match=r"metrics\[speedup_ci95\]\[1\] must be a finite number"):
        record("a", metrics={"speedup_ci95": [1.0, value]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratios": {"model.4": 1.0}}, r"ratios\[model.4\] must be less than 1, but got 1.0"),
        ({"ratios": {"model.4": -0.1}}, r"ratios\[model.4\] must be greater than or equal to 0, but got -0.1"),
        ({"ratios": {"model.4": math.nan}}, r"ratios\[model.4\] must be a finite number"),
        ({"ratios": [0.1]}, r"ratios must be a valid dictionary, but got \[0.1\]"),
        ({"seconds": {"refit": -1.0}}, r"seconds\[refit\] must be greater than or equal to 0"),
        ({"finished_at": math.inf}, "finished_at must be a finite number"),
        ({"state": "pruned"}, "state must be 'completed', 'stopped' or 'failed', but got 'pruned'"),
        ({"fidelity": "half"}, "fidelity must be 'refit', 'epochs' or 'full', but got 'half'"),
        ({"epochs": 2}, "means no epoch, but got epochs=2"),
        ({"epochs": -1}, "epochs must be greater than or equal to 0, but got -1"),
        ({"state": "failed"}, "a failed trial must say why"),
        ({"schema_version": 5}, "schema_version must be 4, but got 5"),
        ({"imgsz": 0}, "the image size must be a side in pixels, or height and width, but got 0"),
    ],
)
def test_what_breaks_the_contract_is_refused(record: Build, change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        record("a", **change)


@pytest.mark.parametrize("trial_id", ["", ".", "..", "a/b", "a\\b", "a\nb", "x" * 201, 7])
def test_a_trial_id_must_be_a_file_name(record: Build, trial_id: Any) -> None:
    with pytest.raises(RecordError, match="trial_id must be usable as a file name"):
        record(trial_id)


def test_a_completed_trial_needs_accuracy_and_latency_and_a_failed_one_does_not() -> None:
    values: dict[str, Any] = {"trial_id": "a", "plan_hash": "0", "ratios": {}, "epochs": 0, "fidelity": "refit"}
    with pytest.raises(RecordError, match="'a' must have the metric latency_ms"):
        TrialRecord(state=TrialState.COMPLETED, metrics={"map50_95": 0.5}, finished_at=0.0, **values)
    failed = TrialRecord(state=TrialState.FAILED, metrics={}, error="out of memory", finished_at=0.0, **values)
    assert failed.number("map50_95") is None


def test_numpy_numbers_become_plain_ones_and_survive_json(record: Build) -> None:
    metrics = {"params_m": np.float32(1.5), "speedup_ci95": (np.float64(1.0), 2), "runtime": "torch", "iterations": 7}
    before = record("a", metrics=metrics, ratios={"model.4": np.float64(0.25)})
    after = TrialRecord.from_json(json.loads(json.dumps(before.to_json())))
    assert after == before
    assert after.metrics["speedup_ci95"] == [1.0, 2]
    assert after.metrics["iterations"] == 7


@pytest.mark.parametrize(
    ("fidelity", "epochs", "label"),
    [("refit", 0, "refit only"), ("epochs", 1, "1 epoch"), ("epochs", 5, "5 epochs"), ("full", 50, "full fine-tuning")],
)
def test_fidelity_in_words(record: Build, fidelity: str, epochs: int, label: str) -> None:
    assert record("a", fidelity=fidelity, epochs=epochs).fidelity_label == label


def test_unknown_and_missing_fields_are_named(record: Build) -> None:
    content = record("a").to_json()
    with pytest.raises(RecordError, match="there is no field 'colour'"):
        TrialRecord.from_json({**content, "colour": "red"})
    del content["epochs"]
    with pytest.raises(RecordError, match="the field 'epochs' is missing"):
        TrialRecord.from_json(content)


def test_records_come_back_in_order_from_another_store(record: Build, tmp_path: Path) -> None:
    path = tmp_path / "run" / "trials.jsonl"
    assert RecordStore(path).read() == []
    records = [record(f"t{index}", 0.5 + index / 100) for index in range(3)]
    store = RecordStore(path)
    for item in records:
        store.append(item)
    assert RecordStore(path).read() == records
    assert path.read_bytes().count(b"\n") == 3


def test_a_repeated_trial_is_refused_also_after_a_restart(record: Build, tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    store = RecordStore(path)
    store.append(record("a"))
    for again in (store, RecordStore(path)):
        with pytest.raises(DuplicateTrialError, match="already holds trial 'a'"):
            again.append(record("a", 0.7))
    assert [item.metrics["map50_95"] for item in store.read()] == [0.5]


def test_two_stores_on_one_file_see_each_other(record: Build, tmp_path: Path) -> None:
    first, second = RecordStore(tmp_path / "trials.jsonl"), RecordStore(tmp_path / "trials.jsonl")
    first.append(record("a"))
    second.append(record("b"))
    with pytest.raises(DuplicateTrialError):
        first.append(record("b"))
    assert [item.trial_id for item in first.read()] == ["a", "b"]


def test_a_last_line_torn_anywhere_is_skipped_and_then_repaired(record: Build, tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    RecordStore(path).append(record("a"))
    whole = path.read_bytes()
    torn = json.dumps(record("b").to_json()).encode()
    for length in (1, len(torn) // 2, len(torn) - 1):
        path.write_bytes(whole + torn[:length])
        store = RecordStore(path)
        assert [item.trial_id for item in store.read()] == ["a"]
        store.append(record("b"))
        assert [item.trial_id for item in RecordStore(path).read()] == ["a", "b"]


def test_a_last_line_that_only_lost_its_newline_is_kept(record: Build, tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    RecordStore(path).append(record("a"))
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    store = RecordStore(path)
    assert [item.trial_id for item in store.read()] == ["a"]
    with pytest.raises(DuplicateTrialError):
        store.append(record("a"))
    store.append(record("b"))
    assert [item.trial_id for item in store.read()] == ["a", "b"]


def test_blank_lines_are_passed_over_wherever_they_are(record: Build, tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    lines = [json.dumps(record(name).to_json()) for name in ("a", "b")]
    path.write_text(f"\n{lines[0]}\n  \n{lines[1]}\n\n\n")
    store = RecordStore(path)
    assert [item.trial_id for item in store.read()] == ["a", "b"]
    store.append(record("c"))
    assert [item.trial_id for item in RecordStore(path).read()] == ["a", "b", "c"]
    path.write_text(f"{lines[0]}\n\n{lines[1][:40]}\n\n{lines[1]}\n")
    with pytest.raises(StoreError, match="line 3"):
        RecordStore(path).read()


def test_what_was_read_is_read_again_only_after_a_change(record: Build, tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "trials.jsonl")
    store.append(record("a"))
    first = store.read()
    first.clear()  # the caller's own list
    assert [item.trial_id for item in store.read()] == ["a"]
    RecordStore(store.path).append(record("b"))
    assert [item.trial_id for item in store.read()] == ["a", "b"]


def test_zeros_left_by_a_power_cut_are_a_torn_tail(record: Build, tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    RecordStore(path).append(record("a"))
    path.write_bytes(path.read_bytes() + b"\0" * 64 + b"\n")
    assert [item.trial_id for item in RecordStore(path).read()] == ["a"]
    RecordStore(path).append(record("b"))
    assert [item.trial_id for item in RecordStore(path).read()] == ["a", "b"]


def test_a_torn_middle_line_is_an_error_with_its_number(record: Build, tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    for name in "abc":
        RecordStore(path).append(record(name))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:40] + b"\n" + lines[2])
    with pytest.raises(StoreError, match=r"trials.jsonl line 2: not a whole JSON record") as caught:
        RecordStore(path).read()
    assert caught.value.line_number == 2
    with pytest.raises(StoreError, match="line 2"):
        RecordStore(path).append(record("d"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[1]", "must be a JSON object, but got list"),
        (b'{"schema_version": 99}', "schema_version 4, but got 99: read it with the paretoprune that wrote it"),
        (b"{}", "schema_version 4, but got None"),
    ],
)
def test_a_whole_line_that_is_no_record_is_an_error_even_at_the_end(line: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    path.write_bytes(line + b"\n")
    with pytest.raises(StoreError, match=f"line 1: .*{message}"):
        RecordStore(path).read()


def test_nan_written_by_somebody_else_is_refused_on_reading(record: Build, tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    text = json.dumps(record("a").to_json()).replace("0.5", "NaN")
    path.write_text(text + "\n")
    with pytest.raises(StoreError, match=r"line 1: metrics\[map50_95\] must be a finite number, but got nan"):
        RecordStore(path).read()


def test_a_doubled_trial_in_the_file_is_an_error_with_its_line(record: Build, tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    line = json.dumps(record("a").to_json()) + "\n"
    path.write_text(line * 2)
    with pytest.raises(StoreError, match="line 2: trial 'a' has a second record"):
        RecordStore(path).read()


def test_the_schema_version_error_is_told_apart(record: Build) -> None:
    with pytest.raises(SchemaVersionError) as caught:
        TrialRecord.from_json({**record("a").to_json(), "schema_version": 0})
    assert caught.value.got == 0


def test_files_of_schema_version_1_still_load() -> None:
    records = RecordStore(FIXTURES / "run_v1" / "trials.jsonl").read()
    assert [(item.trial_id, item.state.value) for item in records] == [
        ("t0000", "completed"),
        ("t0001", "stopped"),
        ("t0002", "failed"),
    ]
    assert records[0].ratios == {"model.4.cv1.conv": 0.25}
    assert records[0].metrics["speedup_ci95"] == [1.32, 1.36]
    assert records[2].error == "worker died (signal 9); its log is beside its plan"


def test_a_prediction_of_older_runs_gets_the_name_of_one() -> None:
    """They gave its interval the name of a measured one's. Measured ones keep theirs."""
    folder = RunFolder(FIXTURES / "run_foretold")
    measured, predicted = folder.read_records()
    assert speedup_interval(measured.metrics) == (1.32, 1.36)
    assert speedup_interval(measured.metrics, PI95) is None
    assert speedup_interval(predicted.metrics) is None
    assert predicted.metrics["speedup_pi95"] == [1.22, 1.28]
    assert TrialRecord.from_json(predicted.to_json()) == predicted
    (pick,) = folder.read_selected()
    assert pick.before == predicted.metrics
    frame = trials_frame([measured, predicted], {"metrics": {}})
    columns = frame[["speedup_low", "speedup_high", "speedup_predicted_low", "speedup_predicted_high"]].to_numpy()
    assert columns[0, :2].tolist() == [1.32, 1.36]
    assert columns[1, 2:].tolist() == [1.22, 1.28]
    assert math.isnan(columns[0, 2])
    assert math.isnan(columns[1, 0])
    at = point("t0001", predicted.metrics, 12.5, "refit only", "stopped")
    assert at is not None
    assert (at.speedup_ci95, at.speedup_pi95) == (None, (1.22, 1.28))
    assert at.latency_interval_ms == (12.5 / 1.28, 12.5 / 1.22)


def test_a_record_of_version_1_is_read_and_has_no_history(record: Build) -> None:
    content = record("a").to_json()
    del content["history"]
    old = TrialRecord.from_json({**content, "schema_version": 1})
    assert old == record("a")
    assert old.history == []


def test_a_record_of_version_2_has_the_runs_size_and_all_branches(record: Build) -> None:
    new = record("a", imgsz=256, branches_removed=["model.2.m.0"])
    content = json.loads(json.dumps(new.to_json()))
    assert TrialRecord.from_json(content) == new
    del content["imgsz"], content["branches_removed"]
    old = TrialRecord.from_json({**content, "schema_version": 2})
    assert (old.imgsz, old.branches_removed) == (None, [])
    frame = trials_frame([new, old.changed(trial_id="b")], {"metrics": {}, "imgsz": 320})
    assert frame["imgsz"].tolist() == [256, 320]
    assert frame["branches_removed"].tolist() == ["model.2.m.0", ""]


def test_a_rectangle_is_a_list_in_a_record_and_text_in_a_table(record: Build) -> None:
    wide, square = record("a", imgsz=(64, 128)), record("b")
    content = json.loads(json.dumps(wide.to_json()))
    assert content["imgsz"] == [64, 128]
    assert TrialRecord.from_json(content) == wide == record("a", imgsz=[64, 128]) != record("a", imgsz=[128, 64])
    assert record("c", imgsz=[64, 64]).imgsz == 64
    for own, texts in (((96, 160), ["64,128", "96,160"]), (160, ["64,128", "160"])):
        frame = trials_frame([wide, square], {"metrics": {}, "imgsz": own})
        assert frame["imgsz"].tolist() == texts
    assert trials_frame([wide, square], {"metrics": {}})["imgsz"].isna().tolist() == [False, True]
    with pytest.raises(RecordError, match=r"the image size must be a side in pixels, .*, but got \[1, 2, 3\]"):
        record("a", imgsz=[1, 2, 3])


def test_history_comes_back_and_must_rise(record: Build) -> None:
    rows = [{"epochs": 0, "map50_95": 0.4}, {"epochs": 1, "map50_95": 0.5}]
    kept = record("a", history=rows)
    assert TrialRecord.from_json(json.loads(json.dumps(kept.to_json()))).history == rows
    for wrong in ([rows[1], rows[0]], [rows[0], rows[0]], [{"map50_95": 0.4}], [{"epochs": 0.5}]):
        with pytest.raises(RecordError, match="epochs in history must be whole numbers that rise"):
            record("a", history=wrong)
    with pytest.raises(RecordError, match=r"history\[1\]\[map50_95\] must be a finite number"):
        record("a", history=[rows[0], {"epochs": 1, "map50_95": math.nan}])
