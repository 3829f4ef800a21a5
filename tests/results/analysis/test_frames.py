"""The data frame of trials and the rows of `front`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paretoprune.results.analysis.frames import front_frame, front_rows, trials_frame
from paretoprune.results.selection.selection import best_under, fastest_within_drop, front, knee
from paretoprune.results.store.bounds import Bounds
from paretoprune.results.store.records import TrialRecord
from paretoprune.results.store.run_folder import RunFolder

Build = Callable[..., TrialRecord]
KEYS = {"trial_id", "map50_95", "latency_ms", "latency_ratio", "params_m", "gflops", "plan", "checkpoint"}


def test_every_record_is_a_row(records: list[TrialRecord], baseline: dict[str, Any]) -> None:
    frame = trials_frame(records, baseline)
    assert list(frame["trial_id"]) == [record.trial_id for record in records]
    assert set(frame.loc[frame["on_front"], "trial_id"]) == {record.trial_id for record in front(records)}
    assert frame.loc[frame["state"] == "failed", "map50_95"].isna().all()
    completed = frame[frame["state"] == "completed"]
    assert (completed["map50_95_drop"] + completed["map50_95"]).to_numpy() == pytest.approx(0.612)
    assert (completed["speedup_low"] < completed["speedup"]).all()
    assert frame["seconds_total"].to_numpy() == pytest.approx(87.8)


def test_a_frame_without_trials_has_the_same_columns(records: list[TrialRecord], baseline: dict[str, Any]) -> None:
    assert list(trials_frame([], baseline).columns) == list(trials_frame(records, baseline).columns)


def test_front_rows_have_the_promised_keys_and_paths_that_exist(
    records: list[TrialRecord], make_run: Callable[..., RunFolder]
) -> None:
    rows = front_rows(make_run(records))
    assert [row["trial_id"] for row in rows] == [record.trial_id for record in front(records)]
    for row in json.loads(json.dumps(rows, allow_nan=False)):
        assert row.keys() >= KEYS | {"speedup", "speedup_ci95", "speedup_pi95", "fidelity", "epochs", "on_front"}
        assert Path(row["plan"]).is_file()
        assert Path(row["checkpoint"]).is_file()
        assert row["on_front"]
        assert row["finetuned_map50_95"] is None


def test_a_lost_checkpoint_is_not_promised(records: list[TrialRecord], make_run: Callable[..., RunFolder]) -> None:
    folder = make_run(records)
    first = front(records)[0].trial_id
    folder.trial_checkpoint(first).unlink()
    assert front_rows(folder)[0]["checkpoint"] is None


def test_bounds_and_picks(
    records: list[TrialRecord], make_run: Callable[..., RunFolder], baseline: dict[str, Any]
) -> None:
    folder = make_run(records)
    members = front(records)
    slow = [row["trial_id"] for row in front_rows(folder, Bounds(max_latency_ms=8.0))]
    assert slow == [item.trial_id for item in members if item.metrics["latency_ms"] <= 8.0]
    close = [row["trial_id"] for row in front_rows(folder, Bounds(max_drop=0.1))]
    assert close == [item.trial_id for item in members if item.metrics["map50_95"] >= 0.612 - 0.1]
    (best,) = front_rows(folder, Bounds(max_latency_ms=8.0), ["1"])
    (bend,) = front_rows(folder, picks=["1"])
    found_best, found_fastest = best_under(records, max_latency_ms=8.0), fastest_within_drop(records, baseline, 0.1)
    found_knee = knee(records)
    assert found_best and found_fastest and found_knee  # noqa: PT018
    assert (best["trial_id"], best["chosen_as"]) == (found_best.trial_id, "most accurate with at most 8 ms")
    (fastest,) = front_rows(folder, Bounds(max_drop=0.1), ["1"])
    expected = (found_fastest.trial_id, "fastest with an accuracy at most 0.1 below the baseline's")
    assert (fastest["trial_id"], fastest["chosen_as"]) == expected
    assert (bend["trial_id"], bend["chosen_as"]) == (found_knee.trial_id, "knee")
    assert len({row["trial_id"] for row in front_rows(folder, Bounds(max_drop=0.3, max_latency_ms=9.0), ["4"])}) == 4
    assert front_rows(folder, Bounds(max_latency_ms=0.001), ["2"]) == []


def test_rows_of_another_fidelity_stay_out_even_if_a_bound_leaves_only_them(
    record: Build, make_run: Callable[..., RunFolder]
) -> None:
    records = [record("a", 0.5, 8.0), record("b", 0.5, 9.0), record("far", 0.6, 2.0, epochs=9, fidelity="epochs")]
    assert front_rows(make_run(records), Bounds(max_latency_ms=3.0)) == []


def test_free_moves_stand_behind_the_trials_and_mark_those_that_they_beat(record: Build, make_run: Any) -> None:
    folder = make_run([record("good", 0.6, 8.0), record("beaten", 0.57, 7.0), record("other", 0.4, 6.0)])
    plain = front_rows(folder)
    assert {row["beaten_by_free_move"] for row in plain} == {None}
    folder.write_free_move(224, {"map50_95": 0.58, "latency_ms": 6.5, "latency_ratio": 6.5 / 12.4, "gflops": 1.0})
    folder.write_free_move(288, {"map50_95": 0.605, "latency_ms": 10.5, "params_m": 3.0})
    rows = front_rows(folder)
    assert [row["trial_id"] for row in rows] == ["good", "beaten", "other", "unpruned@288", "unpruned@224"]
    assert [row["kind"] for row in rows] == ["trial"] * 3 + ["free move"] * 2
    assert [row["beaten_by_free_move"] for row in rows] == [None, "unpruned@224", None, None, None]
    assert [row["imgsz"] for row in rows[3:]] == [288, 224]
    assert {tuple(row) for row in rows} == {tuple(plain[0])}  # the same keys
    assert rows[-1]["gflops"] == 1.0
    assert rows[-1]["plan"] is None
    assert rows[-1]["latency_ratio"] == 6.5 / 12.4
    assert [row["trial_id"] for row in front_rows(folder, Bounds(max_latency_ms=7.0))][-1:] == ["unpruned@224"]
    assert [row["kind"] for row in front_rows(folder, picks=["knee"])] == ["trial"]
    frame = front_frame(folder)
    assert list(frame["kind"]) == [row["kind"] for row in rows]


def test_a_finished_pick_is_told_in_its_row(records: list[TrialRecord], make_run: Callable[..., RunFolder]) -> None:
    bend = knee(records)
    assert bend is not None
    folder = make_run(records, {bend.trial_id: "knee"})
    (row,) = [row for row in front_rows(folder) if row["trial_id"] == bend.trial_id]
    assert row["finetuned_map50_95"] > row["map50_95"]
    assert Path(row["finetuned_checkpoint"]).name == "best.pt"


def test_the_csv_frame_is_flat(records: list[TrialRecord], make_run: Callable[..., RunFolder]) -> None:
    frame = front_frame(make_run(records))
    assert len(frame) == len(front(records))
    assert (frame["speedup_low"] < frame["speedup_high"]).all()
    assert "speedup_ci95" not in frame


def test_the_csv_frame_of_an_empty_run_has_a_header(make_run: Callable[..., RunFolder]) -> None:
    assert list(front_frame(make_run([])).columns)[:4] == ["trial_id", "kind", "map50_95", "latency_ms"]


def test_objectives_of_masks_stand_in_the_tables(records: list[TrialRecord], baseline: dict[str, Any]) -> None:
    masked = [
        record.changed(metrics={**record.metrics, "map50_95_box": 0.7}) if record.metrics else record
        for record in records
    ]
    frame = trials_frame(masked, baseline, ("map50_95_box", "latency_ms"))
    assert set(frame.loc[frame.state == "completed", "map50_95_box"]) == {0.7}
    assert "map50_95_box" not in trials_frame(records, baseline).columns
