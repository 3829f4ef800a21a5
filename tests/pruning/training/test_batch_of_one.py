"""Training by single images, and images of other channels than the model's: one line before any work, or handled."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from ultralytics.nn.tasks import ClassificationModel, DetectionModel

from paretoprune.pruning.data.dataset import check_dataset
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.training.batch_of_one import check_batch, lone_norm
from paretoprune.pruning.training.finetune import finetune
from paretoprune.pruning.training.settings import FinetuneSettings
from paretoprune.pruning.yolo.saving import save_checkpoint
from paretoprune.search.cli import run
from tests.pruning.recovery_material import shapes_dataset
from tests.pruning.tiny import _YAML as TINY
from tests.pruning.tiny import tiny_model
from tests.pruning.yolo.test_classifiers import NAMES, colours_dataset
from tests.pruning.yolo.test_image_size import dataset

pytestmark = pytest.mark.slow


def deep_model() -> Any:
    """Tiny with a stage of stride 64, whose map of a 64 px image is 1x1."""
    stage = [[-1, 1, "Conv", [24, 3, 2]] for _ in range(3)]
    cfg = {**TINY, "backbone": [*TINY["backbone"], *stage], "head": [[[2, 6], 1, "Detect", ["nc"]]]}
    torch.manual_seed(0)
    model: Any = DetectionModel(cfg=cfg, nc=3, verbose=False)
    model.names = dict(enumerate(("square", "disc", "bar")))
    return model.eval()


@pytest.mark.parametrize("imgsz", [64, 128])
def test_which_norm_has_one_value_is_what_torch_says(imgsz: int) -> None:
    model = deep_model()
    found = lone_norm(model, imgsz)
    assert found == ("model.6.bn" if imgsz == 64 else "")
    refused = pytest.raises(ValueError, match="more than 1 value per channel") if found else contextlib.nullcontext()
    with refused:
        model.train()(torch.rand(1, 3, imgsz, imgsz))


def test_a_batch_of_one_is_refused_where_the_model_cannot_be_trained_on_it() -> None:
    model = deep_model()
    with pytest.raises(PruningError, match=r"trial.batch is 1: the batch norm model.6.bn .*; set trial.batch to 2"):
        check_batch(model, 64, 1, 2, "trial.batch")
    with pytest.raises(PruningError, match=r"the training split has one image: .*; give more images"):
        check_batch(model, 64, 4, 1)
    check_batch(model, 64, 2, 2)
    check_batch(tiny_model(), 64, 1, 2)
    with pytest.raises(PruningError, match=r"Ultralytics needs at least 64 px for it"):
        check_batch(tiny_model(), 32, 1, 2)


def test_a_last_batch_of_one_is_left_out_where_it_must_be(tmp_path: Path) -> None:
    """Three images by batches of two: the third would be alone; with batches of one nothing is begun."""
    data = str(shapes_dataset(tmp_path / "data", train=3, val=1))
    settings = FinetuneSettings(epochs=1, imgsz=64, batch=2, workers=0, amp=False)
    deep = finetune(deep_model(), data, settings, tmp_path / "deep")
    assert "1 steps" in (tmp_path / "deep/train.log").read_text()
    assert all(bool(torch.isfinite(value).all()) for value in deep.model.state_dict().values())
    finetune(tiny_model(), data, settings, tmp_path / "tiny")
    assert "2 steps" in (tmp_path / "tiny/train.log").read_text()
    with pytest.raises(PruningError, match="batch is 1: the batch norm"):
        finetune(deep_model(), data, FinetuneSettings(epochs=1, imgsz=64, batch=1), tmp_path / "one")


def named(model: Any) -> nn.Module:
    model.names = dict(enumerate("abc"))
    return model.eval()


@pytest.mark.parametrize(("model", "data"), [(1, 3), (3, 1), (4, 3), (3, 4), (4, 1)])
def test_a_dataset_of_other_channels_than_the_models_is_refused(model: int, data: int, tmp_path: Path) -> None:
    network = named(DetectionModel(cfg=dict(TINY), ch=model, nc=3, verbose=False))
    with pytest.raises(PruningError, match=rf"has {data} and the model takes {model}: .* say `channels: {model}`"):
        check_dataset(dataset(tmp_path, data), network)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_dataset_of_the_models_channels_is_taken_but_not_one_that_only_says_so(channels: int, tmp_path: Path) -> None:
    network = named(DetectionModel(cfg=dict(TINY), ch=channels, nc=3, verbose=False))
    assert check_dataset(dataset(tmp_path / "right", channels), network) == []
    if channels == 4:
        data = Path(dataset(tmp_path / "wrong", 3))
        data.write_text(data.read_text().replace("channels: 3", "channels: 4"))
        with pytest.raises(PruningError, match=r"0.png' has 3 channels, not 4: correct it"):
            check_dataset(data, network)


def test_a_classifier_of_other_channels_is_refused(tmp_path: Path) -> None:
    model: Any = ClassificationModel("yolov8n-cls.yaml", ch=1, nc=len(NAMES), verbose=False)
    model.names = dict(enumerate(NAMES))
    with pytest.raises(PruningError, match="reads a classifier's images in colours, 3 channels, but the model takes 1"):
        check_dataset(colours_dataset(tmp_path), model)


def test_search_says_both_before_anything_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(shapes_dataset(tmp_path / "data", train=3, val=1))
    save_checkpoint(deep_model(), tmp_path / "deep.pt", {"imgsz": 64})
    command = ["search", str(tmp_path / "deep.pt"), data, "--run", str(tmp_path / "run"), "--imgsz", "64"]
    assert run([*command, "--set", "trial.batch=1"]) == 1
    assert "trial.batch is 1: the batch norm model.6.bn" in capsys.readouterr().err
    gray = named(DetectionModel(cfg=dict(TINY), ch=1, nc=3, verbose=False))
    gray.names = dict(enumerate(("square", "disc", "bar")))
    save_checkpoint(gray, tmp_path / "gray.pt", {"imgsz": 64})
    assert run(["search", str(tmp_path / "gray.pt"), *command[2:]]) == 1
    assert "has 3 and the model takes 1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
