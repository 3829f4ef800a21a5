"""Augmented calibration images: those of training, made of the right ones, where the training images are few."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from paretoprune.pruning.data.calibration import SPACING, augmented_images, load_calibration
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
    """Nothing changed, the copies are the images; mirrored always, they are mirrored."""
    same, mirrored = (trained_with({**NONE, "fliplr": chance}, yaml) for chance in (0.0, 1.0))
    plain = load_calibration(str(data), same, 96, 18).images
    copies = augmented_images(str(data), same, 96, range(18, 40))
    sources = []
    for number, copy in enumerate(copies, start=18):
        (source,) = [k for k, image in enumerate(plain) if torch.allclose(image, copy, atol=1 / 255)]
        assert source % SPACING == number % SPACING
        sources.append(source)
    assert len(set(sources)) == 16  # all but those that make no whole round
    turned = augmented_images(str(data), mirrored, 96, range(18, 22))
    assert torch.allclose(turned, copies[:4].flip(3), atol=1 / 255)


def test_equal_seeds_give_equal_images_and_the_callers_random_numbers_go_on(data: Path) -> None:
    model = trained_with({})
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002 - the state that Ultralytics draws from
    torch.manual_seed(1)
    first = augmented_images(str(data), model, 64, range(18, 24), seed=3)
    drawn = random.random(), np.random.rand(), float(torch.rand(()))  # noqa: NPY002
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    assert drawn == (random.random(), np.random.rand(), float(torch.rand(())))  # noqa: NPY002
    assert torch.equal(first, augmented_images(str(data), model, 64, range(18, 24), seed=3))
    assert not torch.equal(first, augmented_images(str(data), model, 64, range(18, 24), seed=4))
    assert first.shape == (6, 3, 64, 64)
    assert first.dtype == torch.float32
    assert 0 <= float(first.min()) < float(first.max()) <= 1


@pytest.mark.parametrize("yaml", ["yolov8n-seg", "yolo11n-obb"])
def test_other_tasks_have_them_too(tmp_path: Path, yaml: str) -> None:
    data = shapes_dataset(tmp_path / "shapes", train=3, size=96, polygons=True)
    assert augmented_images(str(data), trained_with({}, yaml), 64, range(3, 5)).shape == (2, 3, 64, 64)


def test_a_classifiers_images_are_of_its_classes(tmp_path: Path) -> None:
    data = colours_dataset(tmp_path / "colours", train=4)
    model: Any = trained_with({**NONE, "scale": 0.0}, "yolov8n-cls")
    found = augmented_images(str(data), model, 32, range(12, 20))
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
