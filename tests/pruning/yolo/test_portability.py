"""Pruned checkpoints elsewhere: stock Ultralytics in a clean process, ONNX Runtime, more training, more pruning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from ultralytics.nn import tasks

from paretoprune.pruning.export.exporter import export_model
from paretoprune.pruning.surgery.layer_table import build_layer_table
from paretoprune.pruning.surgery.surgery import prune, resolve
from paretoprune.pruning.training.finetune import finetune
from paretoprune.pruning.training.settings import FinetuneSettings
from paretoprune.pruning.yolo.loading import load_model, model_stats
from paretoprune.pruning.yolo.saving import save_checkpoint
from tests.pruning.masking import build, relative_error, tensors
from tests.pruning.recovery_material import shapes_dataset, widths

pytestmark = pytest.mark.slow

FAMILIES = "yolov3-tiny yolov5n yolov6n yolov8n yolov9t yolov10n yolo11n yolo12n yolo26n rtdetr-l".split()
TASKS = "yolov8n-seg yolo11n-pose yolo26n-obb yolo11n-cls".split()
ONNX = (
    "yolov3-tiny yolov5n yolov6n yolov8n yolov9t yolov10n yolo11n yolo12n yolo26n yolov8n-seg yolov8n-pose yolo11n-obb "
    "yolo11n-cls"
).split()  # RT-DETR: see test_rtdetr
TRAINED = (  # the tables of families and tasks; poses and classifiers have other labels, RT-DETR a test of its own
    "yolov3-tiny yolov5n yolov6n yolov8n yolov9t yolov10n yolo11n yolo12n yolo26n yolov8n-seg yolo11n-seg yolo26n-seg "
    "yolov8n-obb yolo11n-obb yolo26n-obb"
).split()
IMGSZ = 128


def half(name: str, ratio: float = 0.5) -> nn.Module:
    """A network of the family, pruned at random."""
    return pruned_at_random(build(name), ratio)


def pruned_at_random(model: nn.Module, ratio: float) -> nn.Module:
    table = build_layer_table(model)
    scores = np.random.default_rng(0).random(table.class_count)
    return prune(model, table, resolve(table, {"*": ratio}), scores)[0]


def outputs(model: nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        return tensors(model(image))


def first_tensors(model: nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
    """What eval mode computes for people, raw maps left out: detections (and mask prototypes), or probabilities."""
    with torch.no_grad():
        output = model(image)[0]
    return list(output) if isinstance(output, tuple) else [output]


def test_stock_ultralytics_loads_every_family(tmp_path: Path, stock_python: Any) -> None:
    image = torch.rand(1, 3, IMGSZ, IMGSZ, generator=torch.Generator().manual_seed(0))
    expected = {}
    for name in FAMILIES + TASKS:
        pruned = half(name)
        save_checkpoint(pruned, tmp_path / f"{name}.pt", {"imgsz": IMGSZ})
        torch.save({"image": image, "outputs": outputs(pruned, image)}, tmp_path / f"{name}.oracle")
        stats = model_stats(pruned, IMGSZ)
        expected[name] = {
            "class": type(pruned).__name__,
            "params": round(stats.params_m * 1e6),
            "gflops": round(stats.gflops, 6),
            "equal": True,
        }
    done = stock_python(
        """
        import json, sys, pathlib, torch
        from ultralytics import YOLO
        def tensors(output):
            if isinstance(output, torch.Tensor):
                return [output]
            if isinstance(output, dict):
                return [t for key, value in output.items() if key != "feats" for t in tensors(value)]
            return [t for value in output or () for t in tensors(value)]
        for name in sys.argv[3:]:
            folder, imgsz = pathlib.Path(sys.argv[1]), int(sys.argv[2])
            model = YOLO(str(folder / f"{name}.pt")).model.float().eval()
            known = torch.load(folder / f"{name}.oracle")
            with torch.no_grad():
                got = tensors(model(known["image"]))
            info = model.info(imgsz=imgsz)
            row = {"class": type(model).__name__, "params": info[1], "gflops": round(info[3], 6)}
            row["equal"] = all(torch.equal(a, b) for a, b in zip(got, known["outputs"], strict=True))
            print("row", name, json.dumps(row))
        """,
        tmp_path, IMGSZ, *expected,
    )  # fmt: skip
    rows = [line.split(" ", 2) for line in done.stdout.splitlines() if line.startswith("row ")]
    assert {name: json.loads(row) for _, name, row in rows} == expected


def test_stock_val_and_predict_of_a_pruned_yolo11(tmp_path: Path, stock_python: Any) -> None:
    data = shapes_dataset(tmp_path / "shapes")
    save_checkpoint(half("yolo11n"), tmp_path / "pruned.pt")
    stock_python(
        """
        import sys
        from ultralytics import YOLO
        path, data, image = sys.argv[1:]
        assert YOLO(path).val(data=data, imgsz=96, batch=4, plots=False, verbose=False).box.map >= 0
        assert len(YOLO(path).predict(image, imgsz=96, verbose=False, save=False)) == 1
        """,
        tmp_path / "pruned.pt", data, data.parent / "images" / "val" / "0.png",
    )  # fmt: skip


@pytest.mark.parametrize("name", ONNX)
def test_onnx_runtime_computes_the_same(name: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    pruned = half(name)
    save_checkpoint(pruned, tmp_path / "pruned.pt")
    onnx_file = export_model(tmp_path / "pruned.pt", "onnx", IMGSZ)
    image = torch.rand(1, 3, IMGSZ, IMGSZ, generator=torch.Generator().manual_seed(0))
    session = runtime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    expected = first_tensors(pruned, image)
    assert [tuple(t.shape) for t in expected] == [t.shape for t in got]
    for a, b in zip(expected, got, strict=True):
        assert np.abs(a.numpy() - b).max() <= 1e-3 * np.abs(a.numpy()).max()
    # the file shrinks with the network: nothing was only masked
    assert onnx_file.stat().st_size < 4.4 * sum(p.numel() for p in pruned.parameters())


@pytest.mark.parametrize("name", TRAINED)
def test_a_pruned_file_is_trained_further_and_stays_pruned(name: str, tmp_path: Path) -> None:
    data = shapes_dataset(tmp_path / "shapes", 4, 2, polygons=name.endswith(("seg", "obb")))
    train_further(half(name), data, tmp_path)


@pytest.mark.parametrize("name", ["yolov8n", "yolo11n", "yolo26n"])
def test_a_pruned_pose_file_is_trained_further_and_stays_pruned(name: str, tmp_path: Path) -> None:
    data = shapes_dataset(tmp_path / "shapes", 4, 2)
    for label in data.parent.glob("labels/*/*.txt"):  # every keypoint in the middle of the object, visible
        rows = [line.split() for line in label.read_text().splitlines()]
        label.write_text("\n".join(" ".join([*row, *([row[1], row[2], "2"] * 17)]) for row in rows))
    data.write_text(data.read_text() + f"kpt_shape: [17, 3]\nflip_idx: {list(range(17))}\n")
    model = tasks.PoseModel(f"{name}-pose.yaml", nc=3, verbose=False).eval()
    train_further(pruned_at_random(model, 0.5), data, tmp_path)


def train_further(start: nn.Module, data: Path, folder: Path) -> None:
    save_checkpoint(start, folder / "pruned.pt")
    settings = FinetuneSettings(epochs=1, imgsz=64, batch=4, lr=1e-3)
    result = finetune(load_model(folder / "pruned.pt"), str(data), settings, folder / "run")
    assert widths(result.model) == widths(start)
    assert len(result.history) == 1
    save_checkpoint(result.model, folder / "better.pt")
    assert widths(load_model(folder / "better.pt")) == widths(start)


@pytest.mark.parametrize("name", ["yolo11n", "yolov9t"])
def test_a_pruned_file_is_pruned_again(name: str, tmp_path: Path) -> None:
    save_checkpoint(half(name, 0.25), tmp_path / "once.pt")
    once = load_model(tmp_path / "once.pt")
    table = build_layer_table(once)
    scores = np.random.default_rng(1).random(table.class_count)
    twice, plan = prune(once, table, resolve(table, {"*": 0.25}), scores)
    assert relative_error(once, twice, plan.kept, torch.rand(1, 3, 96, 96)) < 2e-5
    assert sum(p.numel() for p in twice.parameters()) < 0.7 * sum(p.numel() for p in once.parameters())
