"""Reading and writing a run folder's files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paretoprune.base import atomic
from paretoprune.base.errors import UserError
from paretoprune.results.errors import ObjectiveError, RecordError, RunFolderError, SchemaVersionError
from paretoprune.results.store.records import TrialRecord
from paretoprune.results.store.run_folder import RunFolder

FIXTURES = Path(__file__).parent.parent / "fixtures"


def test_the_paths_are_those_of_a_run_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    found = [
        folder.config,
        folder.baseline,
        folder.trials_file,
        folder.study,
        folder.trial_plan("t1"),
        folder.trial_checkpoint("t1"),
        folder.selected_checkpoint("t1"),
        folder.front_csv,
        folder.report_html,
        folder.report_dir,
    ]
    names = "config.yaml baseline.json trials.jsonl study.journal trials/t1/plan.json trials/t1/pruned.pt"
    names += " selected/t1/best.pt front.csv report.html report"
    assert [str(path.relative_to(tmp_path)) for path in found] == names.split()
    assert list(tmp_path.iterdir()) == []


def test_baseline_comes_back_with_its_schema_version(tmp_path: Path, baseline: dict[str, Any]) -> None:
    folder = RunFolder(tmp_path / "new")
    folder.write_baseline(baseline)
    assert folder.read_baseline() == {"schema_version": 1, **baseline}


def test_what_is_wrong_with_a_baseline_is_said(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(RunFolderError, match=r"holds baseline.json, but .* does not: give the folder"):
        folder.read_baseline()
    folder.baseline.write_text('{"schema_version": 1, "metr')
    with pytest.raises(RunFolderError, match="must be JSON"):
        folder.read_baseline()
    folder.baseline.write_text("[]")
    with pytest.raises(RunFolderError, match="must hold a JSON object, but got list"):
        folder.read_baseline()
    folder.baseline.write_text('{"schema_version": 3}')
    with pytest.raises(SchemaVersionError, match="schema_version 1, but got 3"):
        folder.read_baseline()
    folder.baseline.write_text('{"schema_version": 1, "metrics": {"map50_95": 0.5}}')
    with pytest.raises(RecordError, match=r"must hold the metrics map50_95 \(or top1\) and latency_ms"):
        folder.read_baseline()


def test_objectives_come_from_the_config(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.objectives() == ("map50_95", "latency_ms")
    folder.config.write_text("search: {objectives: [map50_95, params_m]}")
    assert folder.objectives() == ("map50_95", "params_m")
    folder.config.write_text("search: {objectives: [map50_95, joy]}")
    with pytest.raises(ObjectiveError, match="'joy'"):
        folder.objectives()
    folder.config.write_text("search: [")
    with pytest.raises(RunFolderError, match="must be YAML"):
        folder.objectives()


def test_a_pick_without_metrics_is_still_in_work(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.read_selected() == []
    folder.selected_dir("t2").mkdir(parents=True)
    assert folder.read_selected() == []
    folder.write_selected("t1", {"before": {}, "after": {"map50_95": 0.6}, "epochs": 30, "chosen_as": "knee"})
    (found,) = folder.read_selected()
    assert (found.trial_id, found.chosen_as, found.epochs, found.best_epoch) == ("t1", "knee", 30, None)
    assert found.directory == folder.selected_dir("t1")
    folder.write_selected("t2", {"after": {}})
    with pytest.raises(RecordError, match=r"must hold `after` with the metric map50_95 \(or top1\)"):
        folder.read_selected()


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "front.csv"
    atomic.write_text(path, "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        atomic.write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_with_nan_is_refused_and_files_are_readable_by_others(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics.json must hold finite numbers only"):
        atomic.write_json(tmp_path / "metrics.json", {"map50_95": math.nan})
    path = atomic.write_json(tmp_path / "a" / "b.json", {"x": 1})
    assert json.loads(path.read_text()) == {"x": 1}
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_free_moves_are_added_one_by_one_and_come_back_as_trials(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.read_free_moves() == []
    for imgsz, accuracy in ((224, 0.5), (288, 0.6), (224, 0.55)):
        folder.write_free_move(imgsz, {"map50_95": accuracy, "latency_ms": 5.0})
    moves = folder.read_free_moves()
    assert [(move.trial_id, move.imgsz, move.metrics["map50_95"]) for move in moves] == [
        ("unpruned@288", 288, 0.6),
        ("unpruned@224", 224, 0.55),
    ]
    for size in ((256, 384), (192, 256)):  # in the order of their areas
        folder.write_free_move(size, {"map50_95": 0.5, "latency_ms": 5.0})
    names = ["unpruned@256,384", "unpruned@288", "unpruned@224", "unpruned@192,256"]
    assert [(move.trial_id, move.imgsz) for move in folder.read_free_moves()] == list(
        zip(names, ((256, 384), 288, 224, (192, 256)), strict=True)
    )
    folder.free_moves.write_text('{"schema_version": 1, "moves": [{"imgsz": 224, "metrics": {"map50_95": 0.5}}]}')
    with pytest.raises(RecordError, match=r"free_moves.json: the metrics at 224 px must hold latency_ms; restore it"):
        folder.read_free_moves()


def test_files_of_schema_version_1_still_load(record: Callable[..., TrialRecord]) -> None:
    folder = RunFolder(FIXTURES / "run_v1")
    assert folder.read_baseline()["metrics"]["map50_95"] == 0.612
    assert [item.trial_id for item in folder.read_selected()] == ["t0000"]
    assert folder.read_selected()[0].after["speedup"] == 1.33
