"""Classifiers: read from folders of classes, validated as stock Ultralytics does, fine-tuned without growing back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from paretoprune.pruning.data.calibration import load_calibration
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.evaluation.evaluator import check_dataset, evaluate
from paretoprune.pruning.importance import CRITERIA, Evidence, score
from paretoprune.pruning.surgery.layer_table import build_layer_table
from paretoprune.pruning.surgery.surgery import prune, resolve
from paretoprune.pruning.training.finetune import finetune
from paretoprune.pruning.training.settings import FinetuneResult, FinetuneSettings
from paretoprune.pruning.workbench import Workbench
from paretoprune.pruning.yolo.loading import load_model
from paretoprune.pruning.yolo.saving import save_checkpoint
from tests.pruning.masking import build
from tests.pruning.recovery_material import same_weights, weights, widths

pytestmark = pytest.mark.slow

NAMES = ("ball", "cube", "disc")
QUICK = FinetuneSettings(epochs=2, imgsz=32, batch=8, lr=2e-3)


def colours_dataset(root: Path, train: int = 8, val: int = 4, names: tuple[str, ...] = NAMES) -> Path:
    """A folder with train/<class>/ and val/<class>/: the class is the colour channel that is bright."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for channel, name in enumerate(names):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 60, (40, 40, 3), dtype=np.uint8)
                pixels[8:32, 8:32, channel % 3] = 220
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colours_dataset(tmp_path_factory.mktemp("colours"))


def half(name: str = "yolov8n-cls") -> nn.Module:
    model: Any = build(name)
    model.names = dict(enumerate(NAMES))
    table = build_layer_table(model)
    scores = np.random.default_rng(0).random(table.class_count)
    return prune(model, table, resolve(table, {"*": 0.75}), scores)[0]


@pytest.mark.parametrize("name", ["yolov8n-cls", "yolo11n-cls", "yolo26n-cls"])
def test_a_pruned_classifier_is_trained_and_stays_pruned(name: str, data: Path, tmp_path: Path) -> None:
    start = half(name)
    held = weights(start)
    heard: list[set[str]] = []
    result = finetune(start, str(data), QUICK, tmp_path / "run", on_epoch=lambda _, m: bool(heard.append(set(m))))
    assert widths(result.model) == widths(start)
    assert same_weights(weights(start), held)
    assert heard == [{"top1", "top5"}] * 2
    assert result.metrics["top1"] >= result.start_metrics["top1"]
    save_checkpoint(result.model, tmp_path / "better.pt")
    loaded = load_model(tmp_path / "better.pt")
    assert widths(loaded) == widths(start)
    assert evaluate(loaded, str(data), 32, "cpu") == result.metrics


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> FinetuneResult:
    """A classifier that has learned something: what an untrained one answers hardly depends on the image."""
    settings = FinetuneSettings(epochs=16, imgsz=32, batch=4, lr=5e-3, seed=1)
    return finetune(half(), str(data), settings, tmp_path_factory.mktemp("training"))


def test_it_learns(trained: FinetuneResult) -> None:
    assert trained.metrics["top1"] > trained.start_metrics["top1"]
    assert trained.best_epoch > 0


def test_an_interrupted_training_goes_on(data: Path, tmp_path: Path) -> None:
    def dies(epoch: int, metrics: dict[str, float]) -> bool:
        if epoch == 2:
            raise KeyboardInterrupt
        return False

    settings = FinetuneSettings(epochs=3, imgsz=32, batch=8, lr=5e-3)
    whole = finetune(half(), str(data), settings, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        finetune(half(), str(data), settings, tmp_path / "torn", on_epoch=dies)
    again = finetune(half(), str(data), settings, tmp_path / "torn")
    assert [row["train/loss"] for row in again.history] == [row["train/loss"] for row in whole.history]
    assert again.metrics == whole.metrics


def test_figures_are_those_of_stock_val(data: Path, tmp_path: Path, stock_python: Any) -> None:
    save_checkpoint(half(), tmp_path / "pruned.pt")
    code = """
        import json, sys
        from ultralytics import YOLO
        found = YOLO(sys.argv[1]).val(data=sys.argv[2], imgsz=32, device="cpu", plots=False, verbose=False)
        print("FIGURES" + json.dumps({"top1": found.top1, "top5": found.top5}))
        """
    printed = stock_python(code, tmp_path / "pruned.pt", data).stdout
    assert evaluate(load_model(tmp_path / "pruned.pt"), str(data), 32, "cpu") == json.loads(printed.split("FIGURES")[1])


def test_a_class_is_the_same_number_whatever_folders_come_first(data: Path, tmp_path: Path) -> None:
    """The stock trainer numbers the training folders alphabetically, whatever the network calls its classes."""
    settings = FinetuneSettings(epochs=16, imgsz=32, batch=4, lr=5e-3, seed=1)
    model: Any = half()
    model.names = dict(enumerate(("disc", "ball", "cube")))
    result: Any = finetune(model, str(data), settings, tmp_path / "run").model
    assert result.names == model.names
    images = load_calibration(str(data), result, 32, 24)
    assert sorted(images.batch["cls"].tolist()) == [0] * 8 + [1] * 8 + [2] * 8
    reds = images.images[images.batch["cls"] == 1]  # "ball", the first folder
    assert (reds[:, 0, 16, 16] > 0.8).all()
    assert evaluate(result, str(data), 32, "cpu")["top1"] > 0.6


def test_calibration_is_what_validation_sees(data: Path) -> None:
    found = load_calibration(str(data), half(), 32, 10)
    assert found.images.shape == (10, 3, 32, 32)
    assert 0 <= float(found.images.min()) < float(found.images.max()) <= 1
    again = load_calibration(str(data), half(), 32, 10)
    assert torch.equal(found.images, again.images)
    pieces = list(found.chunks(4))
    assert [len(piece["img"]) for piece in pieces] == [len(piece["cls"]) for piece in pieces] == [4, 4, 2]


def test_refit_brings_the_answers_back(trained: FinetuneResult, data: Path, tmp_path: Path) -> None:
    save_checkpoint(trained.model, tmp_path / "whole.pt")
    bench = Workbench(str(tmp_path / "whole.pt"), str(data), 32, calibration_images=24, importance="l2")
    images = bench.calibration.images
    far = []
    for how in ("none", "refit"):
        pruned, plan = bench.prune({"*": 0.5})
        bench.recover(pruned, plan, how)
        with torch.no_grad():
            far.append(float((pruned(images)[1] - bench.model(images)[1]).square().mean()))
    assert far[1] < 0.5 * far[0]


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_every_criterion_works_on_classes_without_boxes(name: str, data: Path) -> None:
    model = half()
    table = build_layer_table(model)
    evidence = Evidence(model, table, load_calibration(str(data), model, 32, 6))
    found = score(name, evidence)
    assert found.shape == (table.class_count,)
    assert np.isfinite(found).all()


class TestCheckDataset:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        return colours_dataset(tmp_path / "set", train=1, val=1)

    def refusal(self, data: Path | str, names: tuple[str, ...] = NAMES) -> str:
        model: Any = build("yolov8n-cls", len(names))
        model.names = dict(enumerate(names))
        with pytest.raises(PruningError) as caught:
            check_dataset(data, model)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_good_ones(self, root: Path) -> None:
        check_dataset(root, half())
        unnamed: Any = half()
        unnamed.names = {i: str(i) for i in range(3)}
        check_dataset(root, unnamed)
        (root / "val").rename(root / "validation")
        check_dataset(root, half())

    def test_not_a_folder(self, root: Path) -> None:
        assert "is not there" in self.refusal(root / "none")
        (root / "data.yaml").write_text("names: []")
        assert "is a file" in self.refusal(root / "data.yaml")

    @pytest.mark.parametrize("split", ["train", "val"])
    def test_missing_parts(self, root: Path, split: str) -> None:
        shutil.rmtree(root / split / "ball")
        for image in list((root / split).glob("*/*")):
            image.unlink()
        assert f"'{root / split}' must hold images" in self.refusal(root)
        shutil.rmtree(root / split)
        assert f"has no {split}/" in self.refusal(root)
        assert not (root.parent / "set_split").exists()  # Ultralytics would make one

    def test_other_classes(self, root: Path) -> None:
        assert "has 3 and the model 2" in self.refusal(root, ("ball", "cube"))
        assert "has 'disc', which the model does not know" in self.refusal(root, ("ball", "cube", "cone"))

    def test_a_classifier_learns_from_a_teacher(self, root: Path, tmp_path: Path) -> None:
        whole: Any = build("yolov8n-cls")
        whole.names = dict(enumerate(NAMES))
        settings = FinetuneSettings(epochs=2, imgsz=32, batch=8, distill=True)
        result = finetune(half(), str(root), settings, tmp_path / "run", teacher=whole)
        first, last = (row["train/divergence"] for row in result.history)
        assert 0 < last < first
