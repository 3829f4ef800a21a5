"""Some of a dataset's classes: the same as a copy whose labels somebody mapped by hand, and the user's left alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from paretoprune.pruning.data.calibration import load_calibration
from paretoprune.pruning.data.class_subset import class_subset, moved_subset, source_of
from paretoprune.pruning.data.dataset import check_dataset
from paretoprune.pruning.data.identity import differences, identify
from paretoprune.pruning.data.sampling import sampled_dataset
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.evaluation.evaluator import evaluate
from paretoprune.pruning.surgery.classes import with_classes
from paretoprune.pruning.training.finetune import finetune
from paretoprune.pruning.training.settings import FinetuneSettings
from tests.pruning.masking import build
from tests.pruning.recovery_material import NAMES, shapes_dataset, write_yaml
from tests.pruning.tiny import tiny_model
from tests.pruning.yolo.test_classifiers import colours_dataset

KEPT = [0, 2]


def mapped_by_hand(data: Path, root: Path) -> Path:
    """A copy of the dataset with the kept classes' objects alone, numbered anew."""
    shutil.copytree(data.parent, root, ignore=shutil.ignore_patterns("*.npz", "data*"))
    for label in (root / "labels").rglob("*.txt"):
        rows = [line.split(None, 1) for line in label.read_text().splitlines()]
        label.write_text("\n".join(f"{KEPT.index(int(row[0]))} {row[1]}" for row in rows if int(row[0]) in KEPT))
    return write_yaml(root, tuple(NAMES[number] for number in KEPT))


def objects(data: Path | str, model: nn.Module) -> dict[str, torch.Tensor]:
    """What the training images of a dataset show, as a training sees it."""
    batch = load_calibration(str(data), model, 96, 8).batch
    return {name: batch[name] for name in ("cls", "bboxes", "batch_idx", "masks") if name in batch}


@pytest.mark.parametrize("polygons", [False, True])
def test_labels_are_those_of_a_copy_mapped_by_hand(polygons: bool, tmp_path: Path) -> None:
    data = shapes_dataset(tmp_path / "whole", polygons=polygons)
    copy = mapped_by_hand(data, tmp_path / "copy")
    before = {path: path.read_bytes() for path in data.parent.rglob("*") if path.is_file()}
    model = tiny_model() if not polygons else build("yolov8n-seg")
    model.names = dict(enumerate(NAMES)) if not polygons else model.names  # type: ignore[assignment]
    if polygons:
        model = with_classes(model, [0, 1, 2])
        model.names = dict(enumerate(NAMES))  # type: ignore[assignment]
    whole = objects(data, model)
    subset = class_subset(data, model, KEPT, tmp_path / "subset")
    kept = with_classes(model, KEPT)
    assert source_of(Path(subset)) == str(data)
    assert check_dataset(subset, kept) == []
    ours, theirs = objects(subset, kept), objects(copy, kept)
    assert len(ours["cls"])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    caches = {path: path.read_bytes() for path in data.parent.rglob("*.npz")}
    assert all(torch.equal(value, whole[name]) for name, value in objects(data, model).items())
    assert {path: path.read_bytes() for path in data.parent.rglob("*.npz")} == caches  # it was good for both
    assert {path: path.read_bytes() for path in before} == before


def test_it_is_validated_and_trained_on_like_the_copy(tmp_path: Path) -> None:
    data = shapes_dataset(tmp_path / "whole")
    copy, model = mapped_by_hand(data, tmp_path / "copy"), tiny_model()
    subset, kept = class_subset(data, model, KEPT, tmp_path / "subset"), with_classes(model, KEPT)
    settings = FinetuneSettings(epochs=1, imgsz=64, batch=4, lr=1e-3)
    tuned = [finetune(kept, str(its), settings, tmp_path / str(n)) for n, its in enumerate((subset, copy))]
    assert tuned[0].history[0].keys() == tuned[1].history[0].keys()
    for name in ("box_loss", "cls_loss", "train/cls_loss"):
        assert tuned[0].history[0].get(name) == tuned[1].history[0].get(name)
    assert evaluate(tuned[0].model, subset, 64, "cpu") == evaluate(tuned[0].model, str(copy), 64, "cpu")


def test_stock_ultralytics_refuses_it(tmp_path: Path) -> None:
    """It would take class 2 of the labels for the third of two."""
    from ultralytics.data.utils import check_det_dataset

    subset = class_subset(shapes_dataset(tmp_path / "whole"), tiny_model(), KEPT, tmp_path)
    with pytest.raises(SyntaxError, match="'names' length 2 and 'nc: 3' must match"):
        check_det_dataset(subset)


def test_its_identity_sample_and_place(tmp_path: Path) -> None:
    model = tiny_model()
    data = shapes_dataset(tmp_path / "whole")
    subset = class_subset(data, model, KEPT, tmp_path / "subset")
    identity, rows, kinds = identify(subset, "detect")
    assert identity.classes == ["square", "bar"]
    assert {kind for its in kinds["train"] for kind in its} == {"0", "2"}
    other = identify(class_subset(data, model, [0, 1], tmp_path / "other"), "detect")
    assert any("label_numbers differs" in line for line in differences(identity, other[0], rows, other[1]))
    sample = sampled_dataset(subset, "detect", {"train": [row[0] for row in rows["train"][:3]]}, tmp_path / "sample")
    few = load_calibration(sample, with_classes(model, KEPT), 64, 8)
    assert len(few.files) == 3
    assert set(few.batch["cls"].flatten().tolist()) <= {0.0, 1.0}
    # It may be some of some, and lie elsewhere
    bar = class_subset(subset, with_classes(model, KEPT), [1], tmp_path / "bar")
    assert identify(bar, "detect")[0].about["label_numbers"] == [2]
    elsewhere = Path(shutil.copytree(data.parent, tmp_path / "moved")) / "data.yaml"
    elsewhere.write_text(elsewhere.read_text().replace(str(data.parent), str(elsewhere.parent)))
    moved = moved_subset(Path(subset), elsewhere)
    assert moved != subset
    assert source_of(Path(moved)) == str(elsewhere)
    assert differences(identity, identify(moved, "detect")[0], {}, {}) == []


def test_what_it_lacks_is_said(tmp_path: Path) -> None:
    model: Any = tiny_model()
    data = shapes_dataset(tmp_path / "whole")
    for label in (data.parent / "labels" / "val").iterdir():
        label.write_text("0 0.5 0.5 0.1 0.1")
    subset = class_subset(data, model, [1, 2], tmp_path / "subset")
    with pytest.raises(
        PruningError, match=r"labels of 'val' .* must hold objects, but all 4 .* without one of disc, bar"
    ):
        check_dataset(subset, with_classes(model, [1, 2]))
    with pytest.raises(PruningError, match=r"classes must be the model's, but .* has 3 and the model 2"):
        class_subset(data, with_classes(model, [1, 2]), [0], tmp_path)


def test_a_classifiers_folder_keeps_its_place(tmp_path: Path) -> None:
    data = colours_dataset(tmp_path / "whole")
    model: Any = build("yolov8n-cls")
    model = with_classes(model, [0, 1, 2])
    model.names = {0: "disc", 1: "cube", 2: "ball"}  # in another order than the folders
    subset = class_subset(data, model, [0, 2], tmp_path / "subset")
    kept = with_classes(model, [0, 2])
    assert check_dataset(subset, kept) == []
    found = load_calibration(subset, kept, 32, 100)
    assert {
        (Path(file).parent.name, int(label)) for file, label in zip(found.files, found.batch["cls"], strict=True)
    } == {
        ("disc", 0),
        ("ball", 1),
    }
    assert sorted(path.name for path in data.iterdir()) == ["train", "val"]
    assert identify(subset, "classify")[0].classes == ["ball", "disc"]
    assert 0 <= evaluate(kept, subset, 32, "cpu")["top1"] <= 1
    assert moved_subset(Path(subset), shutil.copytree(data, tmp_path / "moved")) != subset
