"""Evaluation gives stock Ultralytics' figures, touches nothing and says nothing; bad datasets are one line."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import math
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.evaluation.evaluator import Evaluator, check_dataset, evaluate, named_metrics
from paretoprune.pruning.yolo.saving import save_checkpoint
from tests.pruning.recovery_material import (
    CountingGate,
    blood_cells,
    files_below,
    fresh_yolov8n,
    halve_bottlenecks,
    same_weights,
    shapes_dataset,
    stock_model,
    weights,
)

pytestmark = pytest.mark.slow

KEYS = {"map50_95", "map50", "precision", "recall"}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes_dataset(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def untrained() -> nn.Module:
    return fresh_yolov8n()


def test_figures_are_those_of_stock_val(assets: Path, tmp_path: Path, stock_python: Any) -> None:
    data = blood_cells(assets, tmp_path / "cells", train=1, val=24)
    model = halve_bottlenecks(stock_model(assets / "weights" / "bccd_yolov8n.pt"))
    ours = evaluate(model, str(data), 160, "cpu")
    save_checkpoint(model, tmp_path / "pruned.pt")
    code = """
        import json, sys
        from ultralytics import YOLO
        box = YOLO(sys.argv[1]).val(data=sys.argv[2], imgsz=160, device="cpu", plots=False, verbose=False).box
        figures = {"map50_95": box.map, "map50": box.map50, "precision": box.mp, "recall": box.mr}
        print("FIGURES" + json.dumps({name: float(value) for name, value in figures.items()}))
        """
    printed = stock_python(code, tmp_path / "pruned.pt", data).stdout
    stock = json.loads(printed.split("FIGURES")[1])
    assert ours == pytest.approx(stock, rel=1e-9)
    assert 0.2 < ours["map50_95"] < ours["map50"] < 1  # it really detects something


def test_of_height_and_width_figures_are_those_of_stock_val_of_an_exported_file(
    tmp_path: Path, stock_python: Any
) -> None:
    """Stock `val` of a checkpoint would make a square of it; of a file it takes the file's shape."""
    from paretoprune.pruning.builtin import BASELINE
    from paretoprune.pruning.builtin.dataset import build_dataset
    from paretoprune.pruning.yolo.loading import load_model

    data = build_dataset(tmp_path / "digits", train=1, val=16)
    shutil.copyfile(BASELINE, tmp_path / "digits.pt")
    code = """
        import json, sys
        from ultralytics import YOLO
        path = YOLO(sys.argv[1]).export(format="torchscript", imgsz=[128, 96], device="cpu")
        box = YOLO(path).val(data=sys.argv[2], batch=1, device="cpu", plots=False, verbose=False).box
        figures = {"map50_95": box.map, "map50": box.map50, "precision": box.mp, "recall": box.mr}
        print("FIGURES" + json.dumps({name: float(value) for name, value in figures.items()}))
        """
    printed = stock_python(code, tmp_path / "digits.pt", data).stdout
    stock = json.loads(printed.split("FIGURES")[1])
    evaluator, model = Evaluator(str(data), (128, 96), "cpu", batch=1), load_model(BASELINE)
    shapes = []
    model.model[0].register_forward_pre_hook(lambda _, given: shapes.append(tuple(given[0].shape[2:])))
    for _ in range(2):  # the second time the loader is there already
        assert evaluator.run(model) == pytest.approx(stock, abs=1e-4)
    evaluator.close()
    assert evaluate(model, str(data), 128, "cpu") != pytest.approx(stock, abs=1e-2)


@pytest.mark.parametrize("stock", [False, True])
def test_a_machine_that_stands_still_costs_no_accuracy(
    stock: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 s pass between any two looks at the clock; stock validation then loses the detections of most images."""
    from paretoprune.pruning.builtin import BASELINE
    from paretoprune.pruning.builtin.dataset import build_dataset
    from paretoprune.pruning.yolo.loading import load_model

    model, data = load_model(BASELINE), str(build_dataset(tmp_path / "digits", train=1, val=16))
    calm = evaluate(model, data, 160, "cpu")
    hours = itertools.count(0, 100)
    monkeypatch.setattr("ultralytics.utils.nms.time", SimpleNamespace(time=lambda: float(next(hours))))
    if stock:
        monkeypatch.setattr("paretoprune.pruning.evaluation.evaluator._all_the_time_it_takes", contextlib.nullcontext)
        assert evaluate(model, data, 160, "cpu")["map50_95"] < 0.5 * calm["map50_95"]
    else:
        assert evaluate(model, data, 160, "cpu") == calm
    assert calm["map50_95"] > 0.5
    assert next(hours) > 0  # it was looked at


def test_kept_evaluator_gives_the_same_figures(assets: Path, tmp_path: Path) -> None:
    data = str(blood_cells(assets, tmp_path / "cells", train=1, val=12))
    path = assets / "weights" / "bccd_yolov8n.pt"
    models = [stock_model(path), halve_bottlenecks(stock_model(path)), stock_model(path)]
    evaluator = Evaluator(data, 160, "cpu")
    kept = [evaluator.run(model) for model in models]
    evaluator.close()
    assert kept[0] == kept[2] != kept[1]
    assert kept[:2] == [evaluate(model, data, 160, "cpu") for model in models[:2]]


def test_silent_and_without_a_trace(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from ultralytics.utils import SETTINGS

    monkeypatch.chdir(tmp_path)
    runs = Path(SETTINGS["runs_dir"])
    before = files_below(runs)
    model = fresh_yolov8n(3).train()
    held = weights(model)
    assert evaluate(model, str(shapes), 96, "cpu").keys() == KEYS
    assert capfd.readouterr() == ("", "")
    assert not files_below(tmp_path)
    assert files_below(runs) == before
    assert same_weights(weights(model), held)
    assert model.training
    assert "bn" in dict(model.model[0].named_children())  # type: ignore[index]  # it was a copy that was fused


def test_gate_is_entered_for_each_batch(shapes: Path, untrained: nn.Module) -> None:
    gate = CountingGate()
    evaluate(untrained, str(shapes), 96, "cpu", batch=3, gate=gate)
    # every image's loading, too: on a CPU it disturbs a measurement as a batch does
    assert (gate.entered, gate.inside) == (math.ceil(4 / 3) + 4, 0)


def test_gate_is_given_back_when_a_batch_fails(shapes: Path, untrained: nn.Module) -> None:
    (shapes.parent / "broken" / "images").mkdir(parents=True)
    root = shapes.parent / "broken"
    data = shapes_dataset(root / "set")

    class Failing(CountingGate):
        def using(self) -> Any:
            shutil.rmtree(root / "set" / "images" / "val")  # the images go while the gate is held
            return super().using()

    gate = Failing()
    with pytest.raises(FileNotFoundError):
        evaluate(untrained, str(data), 96, "cpu", gate=gate)
    assert (gate.entered, gate.inside) == (1, 0)


def test_train_split_can_be_asked_for(shapes: Path, untrained: nn.Module) -> None:
    gate = CountingGate()
    evaluate(untrained, str(shapes), 96, "cpu", batch=2, split="train", gate=gate)
    assert gate.entered == 4 + 8  # batches of two, and the loading of eight images


def test_segmentation_has_masks_and_boxes(tmp_path: Path) -> None:
    from ultralytics.nn.tasks import SegmentationModel

    data = shapes_dataset(tmp_path / "polygons", polygons=True)
    model = SegmentationModel("yolov8n-seg.yaml", nc=3, verbose=False).eval()
    boxes = {f"{key}_box" for key in KEYS}
    assert evaluate(model, str(data), 96, "cpu").keys() == KEYS | boxes | {"map50_95_mask", "map50_mask"}


def test_task_figure_is_the_tasks_own() -> None:
    stats = {
        f"metrics/{n}({s})": v
        for s, v in (("B", 0.2), ("M", 0.1))
        for n in ("mAP50-95", "mAP50", "precision", "recall")
    }
    assert named_metrics(stats, "segment")["map50_95"] == named_metrics(stats, "segment")["map50_95_mask"] == 0.1
    assert named_metrics(stats, "segment")["map50_95_box"] == 0.2
    assert named_metrics(stats, "detect")["map50_95"] == 0.2
    with pytest.raises(PruningError, match="map50 = nan"):
        named_metrics({**stats, "metrics/mAP50(B)": math.nan}, "detect")


def test_nan_weights_are_named(shapes: Path) -> None:
    model: Any = fresh_yolov8n()
    model.model[4].cv1.bn.running_var[0] = torch.nan
    with pytest.raises(PruningError, match=r"NaN or infinity in model\.4\.cv1\.bn\.running_var"):
        evaluate(model, str(shapes), 96, "cpu")


def test_a_task_that_is_not_known_is_refused(shapes: Path, untrained: nn.Module) -> None:
    model: Any = copy.deepcopy(untrained)
    model.task = "depth"
    with pytest.raises(PruningError, match="task 'depth': only its surgery works here"):
        evaluate(model, str(shapes), 96, "cpu")


class TestCheckDataset:
    @pytest.fixture
    def data(self, tmp_path: Path) -> Path:
        return shapes_dataset(tmp_path / "set", train=1, val=1)

    def refusal(self, data: Path | str, model: nn.Module) -> str:
        begin = time.monotonic()
        with pytest.raises(PruningError) as caught:
            check_dataset(data, model)
        assert "\n" not in str(caught.value)
        assert time.monotonic() - begin < 3
        return str(caught.value)

    def test_good_one(self, data: Path, untrained: nn.Module) -> None:
        check_dataset(data, untrained)
        check_dataset(data.parent, untrained)  # the folder with the yaml

    def test_list_of_images_in_a_text_file(self, data: Path, untrained: nn.Module) -> None:
        (data.parent / "val.txt").write_text("./images/val/0.png\n")
        data.write_text(data.read_text().replace("val: images/val", "val: val.txt"))
        check_dataset(data, untrained)
        (data.parent / "val.txt").write_text("./images/val/gone.png\n")
        assert "'val' of" in self.refusal(data, untrained)

    def test_no_file(self, tmp_path: Path, untrained: nn.Module) -> None:
        assert "there is no file" in self.refusal(tmp_path / "none.yaml", untrained)

    def test_not_yaml(self, data: Path, untrained: nn.Module) -> None:
        assert "is a data.yaml" in self.refusal(data.parent / "images" / "val" / "0.png", untrained)

    @pytest.mark.parametrize(
        "content", ["", "[1, 2", "just words", "train: images/train\nval: images/val\n", "names: 3"]
    )
    def test_unreadable_yaml(self, data: Path, untrained: nn.Module, content: str) -> None:
        data.write_text(content)
        assert str(data) in self.refusal(data, untrained)

    @pytest.mark.parametrize("split", ["train", "val"])
    def test_missing_images(self, data: Path, untrained: nn.Module, split: str) -> None:
        folder = data.parent / "images" / split
        shutil.rmtree(folder)
        assert str(folder) in self.refusal(data, untrained)
        folder.mkdir()
        assert f"'{split}' of '{data}' must hold images" in self.refusal(data, untrained)

    def test_missing_labels(self, data: Path, untrained: nn.Module) -> None:
        shutil.rmtree(data.parent / "labels" / "train")
        assert str(data.parent / "labels" / "train") in self.refusal(data, untrained)

    def test_download_script_of_a_yaml_is_not_run(self, data: Path, tmp_path: Path, untrained: nn.Module) -> None:
        shutil.rmtree(data.parent / "images" / "val")
        data.write_text(data.read_text() + f"download: open('{tmp_path}/ran', 'w').close()\n")
        self.refusal(data, untrained)
        assert not (tmp_path / "ran").exists()

    def test_other_classes(self, data: Path, untrained: nn.Module) -> None:
        data.write_text(data.read_text() + "  3: star\n")
        assert "has 4 and the model 3" in self.refusal(data, untrained)

    def test_other_keypoints(self, data: Path) -> None:
        from ultralytics.nn.tasks import PoseModel

        model = PoseModel("yolov8n-pose.yaml", nc=3, data_kpt_shape=(17, 3), verbose=False)
        data.write_text(data.read_text() + "kpt_shape: [5, 2]\n")
        assert "kpt_shape [5, 2] and the model has [17, 3]" in self.refusal(data, model)
