"""Labels and classes that would give figures of nothing are one line before the start, for every task that has some."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from paretoprune.pruning.data.calibration import load_calibration
from paretoprune.pruning.data.dataset import check_dataset, has_split
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.evaluation.evaluator import Evaluator
from paretoprune.pruning.training.finetune import finetune
from paretoprune.pruning.training.settings import FinetuneSettings
from paretoprune.pruning.yolo.loading import load_model
from tests.pruning.recovery_material import shapes_dataset
from tests.pruning.tiny import tiny_model

BOX = "0.5 0.5 0.4 0.4"
SQUARE = "0.3 0.3 0.7 0.3 0.7 0.7 0.3 0.7"
LINES = {"detect": BOX, "segment": SQUARE, "obb": SQUARE, "pose": f"{BOX} 0.4 0.4 2 0.6 0.6 2"}
MODELS = {"segment": "SegmentationModel", "obb": "OBBModel", "pose": "PoseModel"}
TASKS = pytest.mark.parametrize("task", sorted(LINES))


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    from ultralytics.nn import tasks

    made: dict[str, nn.Module] = {"detect": tiny_model()}
    for task, name in MODELS.items():
        keypoints = {"data_kpt_shape": (2, 3)} if task == "pose" else {}
        suffix = {"segment": "seg", "obb": "obb", "pose": "pose"}[task]
        model = getattr(tasks, name)(f"yolov8n-{suffix}.yaml", nc=3, verbose=False, **keypoints)
        model.names = dict(made["detect"].names)  # type: ignore[arg-type]
        made[task] = model
    return made


@pytest.fixture
def root(tmp_path: Path) -> Path:
    shapes_dataset(tmp_path, train=2, val=3, size=64)
    return tmp_path


def dataset_for(root: Path, task: str) -> Path:
    """The dataset in `root` with labels for `task`, one object an image, and a test split."""
    data = root / "data.yaml"
    shutil.copytree(root / "images" / "val", root / "images" / "test")
    shutil.copytree(root / "labels" / "val", root / "labels" / "test")
    data.write_text(data.read_text() + "test: images/test\n" + ("kpt_shape: [2, 3]\n" if task == "pose" else ""))
    write_labels(root, f"1 {LINES[task]}")
    return data


def write_labels(root: Path, line: str, split: str = "*") -> None:
    for path in (root / "labels").glob(f"{split}/*.txt"):
        path.write_text(line)


def refusal(data: Path, model: nn.Module) -> str:
    with pytest.raises(PruningError) as caught:
        check_dataset(data, model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@TASKS
def test_labels_of_the_task_are_taken(task: str, root: Path, models: dict[str, nn.Module]) -> None:
    data = dataset_for(root, task)
    assert check_dataset(data, models[task]) == []
    assert has_split(data, "test", models[task])


@TASKS
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_labels_is_refused(task: str, split: str, root: Path, models: dict[str, nn.Module]) -> None:
    data = dataset_for(root, task)
    labels = root / "labels" / split
    (labels / "0.txt").rename(labels / "zero.txt")
    for path in labels.glob("[0-9].txt"):
        path.unlink()
    said = refusal(data, models[task])
    assert f"labels of '{split}' of '{data}' must lie beside its images, but none of its " in said
    assert f"(there is 'zero.txt', which is no image's): put them at '{labels / '0.txt'}'" in said
    shutil.rmtree(labels)
    assert f"put them at '{labels / '0.txt'}'" in refusal(data, models[task])


@TASKS
def test_a_split_of_backgrounds_is_refused(task: str, root: Path, models: dict[str, nn.Module]) -> None:
    data = dataset_for(root, task)
    write_labels(root, "\n", "val")
    assert "labels of 'val' " in refusal(data, models[task])
    assert "must hold objects, but all 3 of them are empty" in refusal(data, models[task])


@TASKS
def test_a_test_split_without_labels_is_left_out_and_said(task: str, root: Path, models: dict[str, nn.Module]) -> None:
    data = dataset_for(root, task)
    shutil.rmtree(root / "labels" / "test")
    assert not has_split(data, "test", models[task])
    (line,) = check_dataset(data, models[task])
    assert line.startswith(f"labels of 'test' of '{data}' must lie beside its images")
    assert line.endswith("the test split is left out")


@TASKS
@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("9 {line}", "Label class 9 exceeds dataset class count 3"),
        ("-1 {line}", "negative label values"),
        ("1 {line} 0.9", "columns|inhomogeneous|cannot reshape"),
        ("1 0.5 0.5", "columns"),
        ("1 {pixels}", "non-normalized"),
        ("square {line}", "could not convert string"),
        ("0.5 {line}", "non-integer"),
    ],
)
def test_labels_that_are_all_unusable_are_refused_with_the_first_of_them(
    task: str, what: str, reason: str, root: Path, models: dict[str, nn.Module]
) -> None:
    import re

    data = dataset_for(root, task)
    pixels = " ".join(str(float(value) * 64) for value in LINES[task].split())
    write_labels(root, what.format(line=LINES[task], pixels=pixels), "val")
    said = refusal(data, models[task])
    first = re.escape(str(root / "labels" / "val" / "0.txt"))
    assert re.search(rf"labels of 'val' .* must be usable, but 3 of 3 are not, the first: {first}: .*({reason})", said)
    write_labels(root, f"1 {LINES[task]}", "val")
    (root / "labels" / "val" / "0.txt").write_text("corrupt")
    assert check_dataset(data, models[task]) == []  # one of several is passed over, as Ultralytics does


def test_images_that_are_all_unreadable_are_refused(root: Path, models: dict[str, nn.Module]) -> None:
    for image in (root / "images" / "val").iterdir():
        image.write_bytes(b"no image")
    first = root / "images" / "val" / "0.png"
    assert f"3 of 3 are not, the first: {first}: " in refusal(root / "data.yaml", models["detect"])


@pytest.mark.parametrize("task", ["obb", "segment"])
def test_boxes_for_a_task_of_outlines_are_refused(task: str, root: Path, models: dict[str, nn.Module]) -> None:
    assert f"must be outlines for the task '{task}', but got boxes" in refusal(root / "data.yaml", models[task])


def with_names(root: Path, *names: str) -> Path:
    data = root / "data.yaml"
    data.write_text(data.read_text().split("names:")[0] + f"names: {list(names)}\n")
    return data


class TestNames:
    """The model's are square, disc, bar."""

    @pytest.mark.parametrize(
        "names",
        [("Square", "DISC", "bar "), ("square", "disc", "b_a-r"), ("0", "1", "2"), ("class_1", "class_2", "class_3")],
    )
    def test_spelling_and_numbers_are_no_difference(
        self, names: tuple[str, ...], root: Path, models: dict[str, nn.Module]
    ) -> None:
        assert check_dataset(with_names(root, *names), models["detect"]) == []

    @pytest.mark.parametrize(
        "names",
        [("disc", "square", "bar"), ("Bar", "Square", "Disc"), ("star", "square", "bar"), ("square", "bar", "x")],
    )
    def test_another_order_is_refused_with_both_lists(
        self, names: tuple[str, ...], root: Path, models: dict[str, nn.Module]
    ) -> None:
        said = refusal(with_names(root, *names), models["detect"])
        assert f"has [{', '.join(names)}] and the model [square, disc, bar]" in said

    def test_other_names_are_taken_by_number_and_said(self, root: Path, models: dict[str, nn.Module]) -> None:
        data = with_names(root, "square", "Kreis", "Balken")
        (line,) = check_dataset(data, models["detect"])
        assert line.endswith("calls 1 'Kreis', the model 'disc' and 1 more")

    def test_numbers_in_another_order_are_an_order(self, root: Path) -> None:
        model: Any = tiny_model()
        model.names = {0: "0", 1: "1", 2: "2"}
        assert "has [1, 0, 2] and the model [0, 1, 2]" in refusal(with_names(root, "1", "0", "2"), model)

    def test_of_many_the_differing_ones_are_shown(self, root: Path) -> None:
        from ultralytics.nn.tasks import DetectionModel

        model: Any = DetectionModel("yolov8n.yaml", nc=80, verbose=False)
        names = [f"thing {chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(80)]
        model.names = dict(enumerate(names))
        names[7], names[70] = names[70], names[7]
        said = refusal(with_names(root, *names), model)
        assert "has {7: thing cs, 70: thing ah} and the model {7: thing ah, 70: thing cs}" in said


class TestSingleClass:
    """A model that was trained with `single_cls=True` on the three classes."""

    @pytest.fixture
    def model(self) -> nn.Module:
        from ultralytics.nn.tasks import DetectionModel

        from tests.pruning.tiny import _YAML

        torch.manual_seed(0)
        model: Any = DetectionModel(cfg={**_YAML, "nc": 1, "yaml_file": "tiny.yaml"}, nc=1, verbose=False)
        model.names, model.args = {0: "item"}, {"imgsz": 64, "task": "detect", "single_cls": True}
        found: nn.Module = model.eval()
        return found

    @pytest.mark.parametrize("names", [("square", "disc", "bar"), ("shape",)])
    def test_every_object_counts_in_all_that_looks_at_labels(
        self, names: tuple[str, ...], model: nn.Module, root: Path, tmp_path: Path
    ) -> None:
        data = str(with_names(root, *names))
        assert check_dataset(data, model) == []
        evaluator = Evaluator(data, 64, "cpu", 4)
        evaluator.run(model)
        labels = evaluator._loader.dataset.labels  # type: ignore[union-attr]
        evaluator.close()
        assert [len(label["cls"]) for label in labels] == [2, 2, 2]
        assert not any(label["cls"].any() for label in labels)
        batch = load_calibration(data, model, 64, 2).batch
        assert len(batch["cls"]) == 4
        assert not batch["cls"].any()
        result = finetune(model, data, FinetuneSettings(epochs=1, imgsz=64, batch=2), tmp_path / "run")
        assert result.model.args["single_cls"] is True  # type: ignore[index, union-attr]

    def test_it_is_judged_as_stock_judges_it(self, model: nn.Module, root: Path, tmp_path: Path) -> None:
        from ultralytics import YOLO

        from paretoprune.pruning.yolo.saving import save_checkpoint

        save_checkpoint(model, tmp_path / "one.pt")
        stock = YOLO(str(tmp_path / "one.pt"))
        box = stock.val(data=str(root / "data.yaml"), imgsz=64, device="cpu", plots=False, verbose=False).box
        ours = Evaluator(str(root / "data.yaml"), 64, "cpu").run(load_model(tmp_path / "one.pt"))
        assert ours["map50_95"] == pytest.approx(box.map, rel=1e-9)
        assert ours["recall"] == pytest.approx(box.mr, rel=1e-9)

    def test_without_the_flag_one_class_is_one_class(self, model: Any, root: Path) -> None:
        model.args = {"imgsz": 64, "single_cls": False}
        assert "has 3 and the model 1" in refusal(root / "data.yaml", model)


class TestClassifier:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        generator = np.random.default_rng(0)
        for split in ("train", "val", "test"):
            for name in ("ball", "cube"):
                place = tmp_path / split / name / "more"  # images may lie deeper
                place.mkdir(parents=True)
                Image.fromarray(generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(place / "0.png")
        return tmp_path

    @pytest.fixture
    def model(self) -> nn.Module:
        from ultralytics.nn.tasks import ClassificationModel

        model: Any = ClassificationModel("yolov8n-cls.yaml", nc=2, verbose=False)
        model.names = {0: "ball", 1: "cube"}
        found: nn.Module = model
        return found

    def test_unsorted_test_images_are_left_out_and_said(self, folder: Path, model: nn.Module) -> None:
        assert check_dataset(folder, model) == []
        assert has_split(folder, "test", model)
        for image in list((folder / "test").rglob("*.png")):
            image.rename(folder / "test" / f"{image.parent.parent.name}.png")
        shutil.rmtree(folder / "test" / "ball")
        shutil.rmtree(folder / "test" / "cube")
        assert not has_split(folder, "test", model)
        assert check_dataset(folder, model) == [
            f"'{folder / 'test'}' has no images in a folder a class; the test split is left out"
        ]

    def test_validation_of_other_classes_is_refused(self, folder: Path, model: Any) -> None:
        (folder / "val" / "ball").rename(folder / "val" / "boule")
        check_dataset(folder, model)  # one is known; the other's images are passed over, as stock does
        model.names = {0: "0", 1: "1"}  # numbered by the folders' order, which is no longer the training's
        assert "must have the classes of 'train', but it has boule, cube" in refusal(folder, model)
        model.names = {0: "ball", 1: "cube"}
        (folder / "val" / "cube").rename(folder / "val" / "dé")
        assert "must have the classes of 'train', but it has boule, dé" in refusal(folder, model)
