"""Augmented calibration images: those of training, made of the right ones, where the training images are few."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from paretoprune.pruning.data.calibration import TrainingImages, load_calibration
from paretoprune.pruning.workbench import Workbench
from paretoprune.pruning.yolo.saving import save_checkpoint
from tests.pruning.masking import build
from tests.pruning.recovery_material import shapes_dataset
from tests.pruning.yolo.test_classifiers import colours_dataset

NONE = dict.fromkeys("hsv_h hsv_s hsv_v degrees translate scale shear perspective flipud fliplr bgr".split(), 0.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes_dataset(tmp_path_factory.mktemp("augmentation") / "shapes", train=18, size=96)


def trained_with(arguments: dict[str, float], yaml: str = "yolov8n") -> nn.Module:
    model: Any = build(yaml)
    model.args = arguments
    return model


@pytest.mark.parametrize("yaml", ["yolov8n", "rtdetr-l"])
def test_the_training_arguments_of_the_model_hold(data: Path, yaml: str) -> None:
    """Nothing changed, they are the calibration images of the same files; mirrored always, they are mirrored."""
    same, mirrored = (trained_with({**NONE, "fliplr": chance}, yaml) for chance in (0.0, 1.0))
    plain = load_calibration(str(data), same, 96, 10)
    source = TrainingImages(str(data), same, 96)
    assert source.count == 18
    numbers = [source.files.index(file) for file in plain.files]
    assert len(set(numbers)) == 10
    assert torch.allclose(source.take(numbers, 0), plain.images, atol=1 / 255)
    half = plain.spread(5)
    assert torch.allclose(source.take(map(source.files.index, half.files), 1), half.images, atol=1 / 255)
    turned = TrainingImages(str(data), mirrored, 96).take(numbers, 0)
    assert torch.allclose(turned, plain.images.flip(3), atol=1 / 255)


def test_equal_seeds_give_equal_images_and_the_callers_random_numbers_go_on(data: Path) -> None:
    source = TrainingImages(str(data), trained_with({}), 64)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002 - the state that Ultralytics draws from
    torch.manual_seed(1)
    first = source.take(range(6), seed=3)
    drawn = random.random(), np.random.rand(), float(torch.rand(()))  # noqa: NPY002
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    assert drawn == (random.random(), np.random.rand(), float(torch.rand(())))  # noqa: NPY002
    assert torch.equal(first, source.take(range(6), seed=3))
    assert not torch.equal(first, source.take(range(6), seed=4))
    assert first.shape == (6, 3, 64, 64)
    assert first.dtype == torch.float32
    assert 0 <= float(first.min()) < float(first.max()) <= 1


@pytest.mark.parametrize("yaml", ["yolov8n-seg", "yolo11n-obb"])
def test_other_tasks_have_them_too(tmp_path: Path, yaml: str) -> None:
    data = shapes_dataset(tmp_path / "shapes", train=3, size=96, polygons=True)
    assert TrainingImages(str(data), trained_with({}, yaml), 64).take([0, 2], 0).shape == (2, 3, 64, 64)


def test_a_classifiers_images_are_of_its_classes(tmp_path: Path) -> None:
    data = colours_dataset(tmp_path / "colours", train=4)
    model: Any = trained_with({**NONE, "scale": 0.0}, "yolov8n-cls")
    found = TrainingImages(str(data), model, 32).take(range(8), 0)
    assert found.shape == (8, 3, 32, 32)
    assert 0 <= float(found.min()) < float(found.max()) <= 1


def test_a_recovery_looks_at_as_many_images_as_it_was_told(data: Path, tmp_path: Path) -> None:
    """The criterion at training images alone."""
    save_checkpoint(build("yolov8n"), tmp_path / "model.pt", {"imgsz": 64})
    few = Workbench(str(tmp_path / "model.pt"), str(data), 64, calibration_images=18)
    many = Workbench(str(tmp_path / "model.pt"), str(data), 64, calibration_images=30)
    assert torch.equal(few.images, many.calibration.images)
    assert torch.equal(few.scored_images.images, many.scored_images.images)
    assert len(many.images) == 30
    assert torch.equal(many.images[:18], few.images)
    assert len({image.numpy().tobytes() for image in many.images}) == 30
