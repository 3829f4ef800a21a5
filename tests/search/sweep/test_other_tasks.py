"""Searches on what is no detector of boxes, and with other strategies: the whole command line, with Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paretoprune.pruning.yolo.saving import save_checkpoint
from paretoprune.pruning.yolo.tasks import metric_keys
from paretoprune.results.store.records import TrialState
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.cli import run
from paretoprune.search.errors import ConfigError
from paretoprune.search.sweep.preflight import objectives_of, prepare
from tests.pruning.masking import build
from tests.pruning.recovery_material import shapes_dataset
from tests.pruning.tiny import tiny_model
from tests.pruning.yolo.test_classifiers import NAMES, colours_dataset
from tests.search.fakes import make_config

Captured = pytest.CaptureFixture[str]
QUICK = ["--set", "recover.calibration_images=8", "--set", "latency.max_seconds=0.3", "--set", "trial.batch=8"]
DETECT, CLASSIFY, SEGMENT, POSE = (tuple(metric_keys(k)) for k in ("detect", "classify", "segment", "pose"))


class TestObjectives:
    def test_the_usual_ones_in_the_words_of_the_task(self) -> None:
        assert objectives_of(make_config(), DETECT) == ["map50_95", "latency_ms"]
        assert objectives_of(make_config(), SEGMENT) == ["map50_95", "latency_ms"]
        assert objectives_of(make_config(), CLASSIFY) == ["top1", "latency_ms"]

    def test_those_that_were_given_must_be_the_tasks(self) -> None:
        for wanted, accuracies in (
            (["map50_95_mask", "latency_ms"], SEGMENT),
            (["map50_95_pose", "map50_95_box", "gflops"], POSE),
            (["top5", "params_m"], CLASSIFY),
            (["latency_ms", "params_m"], CLASSIFY),
        ):
            assert objectives_of(make_config(**{"search.objectives": wanted}), accuracies) == wanted

    @pytest.mark.parametrize(
        ("wanted", "accuracies", "line"),
        [
            (["map50_95", "latency_ms"], CLASSIFY, "this model's task has top1, top5, but got map50_95"),
            (["top1", "latency_ms"], DETECT, "this model's task has map50_95, map50, but got top1"),
            (["map50_95_mask", "latency_ms"], POSE, "but got map50_95_mask"),
        ],
    )
    def test_others_are_refused(self, wanted: list[str], accuracies: tuple[str, ...], line: str) -> None:
        with pytest.raises(ConfigError, match=line):
            objectives_of(make_config(**{"search.objectives": wanted}), accuracies)


@pytest.mark.parametrize("setting", ["trial.distill", "finetune.distill"])
def test_a_teacher_for_what_cannot_be_taught_is_refused_before_any_trial(
    tmp_path: Path, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ultralytics.nn.modules.head import Classify

    model: Any = build("yolov8n-cls")
    model.names = dict(enumerate(NAMES))
    save_checkpoint(model, tmp_path / "classifier.pt")
    data = colours_dataset(tmp_path / "colours", train=1, val=1)
    settings = {"model.path": str(tmp_path / "classifier.pt"), "data.path": str(data), "model.imgsz": 32}
    others = {"trial.distill": False, "finetune.distill": False, setting: True}
    monkeypatch.setattr(Classify, "forward", lambda self, x: ("answer", ["other things"]))
    with pytest.raises(
        ConfigError, match=r"whose outputs are known, but Classify gives .* distill off \(--no-distill\)"
    ):
        prepare(make_config(**settings, **others), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
class TestWholeSearch:
    def test_a_classifier_goes_by_top_1(self, tmp_path: Path, capsys: Captured) -> None:
        model: Any = build("yolov8n-cls")
        model.names = dict(enumerate(NAMES))
        save_checkpoint(model, tmp_path / "classifier.pt")
        data, folder = colours_dataset(tmp_path / "colours"), RunFolder(tmp_path / "run")
        command = ["search", str(tmp_path / "classifier.pt"), str(data), "--run", str(folder.path), "--imgsz", "32"]
        command += ["--trials", "2", "--epochs", "1", *QUICK]
        assert run(command) == 0
        printed = capsys.readouterr()
        assert "top1" in printed.out.splitlines()[0]
        assert "top-1 accuracy 0." in printed.err
        assert folder.objectives() == ("top1", "latency_ms")
        assert set(folder.read_baseline()["metrics"]) >= {"top1", "top5", "latency_ms", "params_m"}
        for record in folder.read_records():
            assert record.state is TrialState.COMPLETED, record.error
            assert 0 <= record.metrics["top1_refit"] <= record.metrics["top1"] <= 1
            assert not any(name.startswith("map") for name in record.metrics)
        again = {"model.path": str(tmp_path / "classifier.pt"), "data.path": str(data), "model.imgsz": 32}
        settings = {"recover.calibration_images": 8, "latency.max_seconds": 0.3, "trial.batch": 8, "trial.epochs": 1}
        prepared = prepare(make_config(**again, **settings, **{"search.trials": 9}), folder.path)
        assert prepared.config.search.objectives == ["top1", "latency_ms"]  # the same settings: it would go on
        capsys.readouterr()
        assert run(["front", str(folder.path), "--max-drop", "1", "--format", "json"]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert all(0 <= row["top1"] <= 1 and row["map50_95"] is None for row in rows)
        assert run(["finetune", str(folder.path), "--pick", "1", "--epochs", "1", "--distill"]) == 0
        (selected,) = folder.read_selected()
        assert selected.after["top1"] >= selected.before["top1"] - 1e-6
        assert run(["report", str(folder.path)]) == 0
        page = folder.report_html.read_text().split("<script>")[0]
        assert "top-1 accuracy" in page
        assert "mAP" not in page

    def test_masks_latency_and_size_are_three_objectives_at_once(self, tmp_path: Path, capsys: Captured) -> None:
        model = build("yolov8n-seg")
        model.names = dict(enumerate(("square", "disc", "bar")))
        save_checkpoint(model, tmp_path / "masks.pt")
        data, folder = shapes_dataset(tmp_path / "polygons", polygons=True), RunFolder(tmp_path / "run")
        command = ["search", str(tmp_path / "masks.pt"), str(data), "--run", str(folder.path), "--imgsz", "64"]
        command += ["--trials", "3", "--epochs", "0", *QUICK]
        command += ["--set", "search.objectives=[map50_95_mask, latency_ms, size_mb]"]
        assert run([*command, "--set", "recover.importance=l2", "--set", "space.granularity=block"]) == 0
        assert folder.objectives() == ("map50_95_mask", "latency_ms", "size_mb")
        records = folder.read_records()
        assert [record.state for record in records] == [TrialState.COMPLETED] * 3, [r.error for r in records]
        sizes = [record.metrics["size_mb"] for record in records]
        written = [folder.trial_checkpoint(record.trial_id).stat().st_size / 1e6 for record in records]
        assert np.argsort(sizes).tolist() == np.argsort(written).tolist()
        assert max(sizes) < folder.read_baseline()["metrics"]["size_mb"]
        assert all(0 <= record.metrics["map50_95_mask"] <= 1 for record in records)
        capsys.readouterr()
        assert run(["front", str(folder.path), "--format", "json"]) == 0
        front = [row["trial_id"] for row in json.loads(capsys.readouterr().out)]
        losses = {
            r.trial_id: (-r.metrics["map50_95_mask"], r.metrics["latency_ms"], r.metrics["size_mb"]) for r in records
        }
        dominated = {
            one for one, mine in losses.items()
            if any(o != mine and all(a <= b for a, b in zip(o, mine, strict=True)) for o in losses.values())
        }  # fmt: skip
        assert set(front) == losses.keys() - dominated
        assert run(["report", str(folder.path)]) == 0
        page = folder.report_html.read_text().split("<script>")[0]
        assert "mask mAP50-95" in page
        assert "size" in page

    def test_sequences_of_sessions_are_searched_and_resumed(self, tmp_path: Path, capsys: Captured) -> None:
        save_checkpoint(tiny_model(), tmp_path / "tiny.pt")
        data, folder = shapes_dataset(tmp_path / "shapes"), RunFolder(tmp_path / "run")
        command = ["search", str(tmp_path / "tiny.pt"), str(data), "--run", str(folder.path), "--imgsz", "64"]
        command += ["--trials", "2", "--epochs", "3", "--strategy", "sequential", "--set", "space.round_to=2", *QUICK]
        assert run(command) == 0
        assert run(["resume", str(folder.path), "--trials", "3"]) == 0
        records = folder.read_records()
        assert [record.state for record in records] == [TrialState.COMPLETED] * 3, [r.error for r in records]
        for record in records:
            assert record.metrics["strategy"] == "sequential"
            blocks = [layer.split(".")[1] for layer in record.ratios]
            sessions = list(folder.trial_dir(record.trial_id).glob("strategy/session-*.pt"))
            assert len(sessions) == len(set(blocks)) > 0
        assert len({record.plan_hash for record in records}) == 3
        capsys.readouterr()
