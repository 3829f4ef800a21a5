"""A dataset's labels are kept in a file of ours; a pickle that lies there is neither read nor touched."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ultralytics.data import dataset as stock

from paretoprune.pruning.data.calibration import load_calibration
from paretoprune.pruning.evaluation.evaluator import evaluate
from paretoprune.pruning.yolo.label_cache import load_labels, own_file, save_labels
from paretoprune.pruning.yolo.ultralytics_logging import quiet_ultralytics
from tests.pruning.recovery_material import shapes_dataset
from tests.pruning.tiny import tiny_model


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.target),)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*.cache")}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return shapes_dataset(tmp_path / "data", train=3, val=2)


def test_a_hostile_cache_is_neither_read_nor_touched(data: Path, tmp_path: Path) -> None:
    model, target = tiny_model(), tmp_path / "made"
    for split in ("train", "val"):
        with (data.parent / "labels" / f"{split}.cache").open("wb") as stream:
            np.save(stream, np.array({"version": Evil(target)}, dtype=object), allow_pickle=True)
    before = contents(data.parent)
    assert len(before) == 2
    images = load_calibration(str(data), model, 64, 2, 0).images
    metrics = evaluate(model, str(data), 64, "cpu")
    assert torch.equal(load_calibration(str(data), model, 64, 2, 0).images, images)
    assert evaluate(model, str(data), 64, "cpu") == metrics
    assert not target.exists()
    assert contents(data.parent) == before
    assert np.load(next(iter(before)), allow_pickle=True)
    assert target.exists(), "the cache was none: this test shows nothing"


def test_labels_are_read_once(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, scans = tiny_model(), []
    scan = stock.verify_image_label
    monkeypatch.setattr(stock, "verify_image_label", lambda *given: (scans.append(given), scan(*given))[1])
    first = load_calibration(str(data), model, 64, 3, 0).batch
    assert len(scans) == 3
    second = load_calibration(str(data), model, 64, 3, 0).batch
    assert len(scans) == 3
    assert all(torch.equal(first[key], second[key]) for key in ("img", "bboxes", "cls", "batch_idx"))
    (data.parent / "labels" / "train" / "0.txt").write_text("0 0.5 0.5 0.25 0.25\n")
    assert len(load_calibration(str(data), model, 64, 3, 0).batch["cls"]) == len(first["cls"]) - 1
    assert len(scans) == 6


def same(one: Any, two: Any) -> bool:
    if isinstance(one, np.ndarray):
        return one.dtype == two.dtype and np.array_equal(one, two)
    if isinstance(one, (list, tuple)):
        return type(one) is type(two) and len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(value, two[key]) for key, value in one.items())
    return type(one) is type(two) and bool(one == two)


@pytest.mark.parametrize("task", ["detect", "segment", "pose"])
def test_what_comes_back_is_what_was_read(task: str, tmp_path: Path) -> None:
    from PIL import Image

    lines = {"detect": "1 .5 .5 .25 .25\n", "segment": "1 .1 .1 .5 .1 .5 .5\n0 .2 .2 .6 .2 .6 .6 .3 .9\n",
             "pose": "1 .5 .5 .25 .25 .4 .4 2 .6 .6 1\n"}  # fmt: skip
    for number, text in enumerate((lines[task], "", lines[task] * 3)):
        for folder in ("images", "labels"):
            (tmp_path / folder).mkdir(exist_ok=True)
        Image.new("RGB", (40 + number, 32)).save(tmp_path / "images" / f"{number}\u00e9.png")
        (tmp_path / "labels" / f"{number}\u00e9.txt").write_text(text)
    (tmp_path / "images" / "broken.png").write_bytes(b"none")
    content = {"names": {0: "a", 1: "b"}, "kpt_shape": (2, 3), "channels": 3}
    options: dict[str, Any] = {"data": content, "task": task, "imgsz": 32, "augment": False}
    cache = tmp_path / "labels.cache"
    with quiet_ultralytics():
        first = stock.YOLODataset(str(tmp_path / "images"), **options)
        assert any("broken.png" in line for line in load_labels(cache)["msgs"])
        second = stock.YOLODataset(str(tmp_path / "images"), **options)
        assert same(first.labels, second.labels)
        assert same(second.cache_labels(cache), load_labels(cache))
    assert not cache.exists()


def test_a_cache_of_ours_that_is_damaged_or_hostile_is_made_anew(tmp_path: Path) -> None:
    target = tmp_path / "made"
    cache = tmp_path / "labels.cache"
    deep = b"[" * 100_000
    for content in (
        {"text": np.array([Evil(target)], dtype=object)},
        {"text": np.frombuffer(deep, np.uint8)},
        {"text": np.frombuffer(b'{"array": ["f4", 0, 1000000000, 1000000]}', np.uint8), "f4": np.zeros(1, "f4")},
        {},
    ):
        np.savez(own_file(cache), **content)
        with pytest.raises((ValueError, KeyError, RecursionError)):
            load_labels(cache)
    np.savez_compressed(own_file(cache), text=np.zeros(2**24, np.uint8))
    with pytest.raises(ValueError, match="unpacks to more than it holds"):
        load_labels(cache)
    own_file(cache).write_bytes(b"PK")
    with pytest.raises(ValueError, match="zip"):
        load_labels(cache)
    with zipfile.ZipFile(own_file(cache), "w") as archive, archive.open("text.npy", "w") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": (2**50,)})
    with pytest.raises(ValueError, match="longer than its bytes"):
        load_labels(cache)
    assert not target.exists()
    save_labels("", tmp_path / "objects.cache", {"labels": [np.array([None])]}, "1")
    assert not own_file(tmp_path / "objects.cache").exists()
    save_labels("", cache, {"labels": [], "hash": "h", "results": (1, 2), "msgs": []}, "1")
    assert load_labels(cache) == {"labels": [], "hash": "h", "results": (1, 2), "msgs": [], "version": "1"}


def test_a_folder_that_cannot_be_written_costs_the_next_reading_only(tmp_path: Path) -> None:
    save_labels("", tmp_path / "file" / "labels.cache", {"labels": []}, "1")
    (tmp_path / "other").write_text("")
    save_labels("", tmp_path / "other" / "labels.cache", {"labels": []}, "1")
    assert not own_file(tmp_path / "other" / "labels.cache").exists()
