"""Exports of every kind of head against their checkpoint; and each part of an answer that is not the checkpoint's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paretoprune.pruning.builtin.dataset import build_dataset
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.export.check import EXACT, check_export
from paretoprune.pruning.export.exporter import export_model
from paretoprune.pruning.export.outputs import Array, Layout, differences
from paretoprune.pruning.yolo.saving import save_checkpoint
from tests.pruning.masking import build

SIZE = 64
NAMES = (
    "yolov8n", "yolov8n-seg", "yolov8n-pose", "yolov8n-obb", "yolov8n-cls", "yolov10n", "yolo26n", "yolo26n-seg",
    "yolo26n-pose", "yolo26n-obb",
)  # fmt: skip
WAYS = [(name, "onnx") for name in NAMES]
WAYS += [(name, "torchscript") for name in ("yolov8n-seg", "yolov8n-cls", "yolo26n-pose")]
WAYS += [(name, "openvino") for name in ("yolov8n-pose", "yolov8n-cls", "yolo26n-seg")]
NEEDS = {"onnx": "onnxruntime", "openvino": "openvino"}
MORE = {"seg": "cv4", "pose": "cv4", "obb": "cv4"}  # the head's branch for what a task adds to boxes


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_dataset(tmp_path_factory.mktemp("data") / "digits", train=1, val=2))


def sure(name: str) -> Any:
    """A network with random weights that sees objects: the scores' bias of a fresh head lets it see none."""
    model: Any = build(name)
    for branch in ("cv3", "one2one_cv3"):
        for scale in getattr(model.model[-1], branch, None) or ():
            scale[-1].bias.data.fill_(-0.5)
    return model


def saved(model: Any, path: Path) -> Path:
    save_checkpoint(model, path, {"imgsz": SIZE})
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form"), WAYS)
def test_an_export_answers_like_its_checkpoint(name: str, form: str, tmp_path: Path, data: str) -> None:
    if form in NEEDS:
        pytest.importorskip(NEEDS[form], reason=f"{NEEDS[form]} is not installed: nothing was exported")
    model = sure(name)
    path = saved(model, tmp_path / f"{name}.pt")
    exported = export_model(path, form)
    found = check_export(exported, path, SIZE, data=data)
    assert found.ok, found
    if form != "openvino":  # which may compute in 16 bits by itself
        assert max(found.score_difference, found.box_difference) <= EXACT, found
    if not name.endswith("cls"):
        assert found.objects > 0, "nothing was compared"
    task = name.rpartition("-")[2]
    changed = copy.deepcopy(model)
    for module in changed.model[-1].modules() if task not in MORE else branches(changed.model[-1], MORE[task]):
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.weight.data.mul_(-3.0)
    other = check_export(exported, saved(changed, tmp_path / "other.pt"), SIZE, data=data)
    assert not other.ok, other


def branches(head: Any, name: str) -> list[Any]:
    """The modules of a branch, of the end-to-end one too."""
    found = (getattr(head, prefix + name, None) for prefix in ("", "one2one_"))
    return [module for branch in found if branch is not None for module in branch.modules()]


def raw(*rows: list[float]) -> Array:
    """Boxes of a head that is not end-to-end, one row each, in the shape it gives them."""
    return np.asarray(rows, np.float32).T[None]


def sorted_rows(*rows: list[float]) -> Array:
    return np.asarray(rows, np.float32)[None]


BOX = [80.0, 80.0, 40.0, 40.0]


class TestDifferences:
    def test_boxes_of_objects_and_all_scores(self) -> None:
        layout = Layout("detect", 2, size=(160, 160))
        ours = raw([*BOX, 0.0, 0.0], [*BOX, 0.9, 0.0])
        theirs = raw([99.0, *BOX[1:], 0.0, 0.25], [88.0, *BOX[1:], 0.9, 0.0])  # the first is one that nobody sees
        assert differences([ours], [theirs], layout) == (1, 0.25, pytest.approx(8 / 160))

    def test_other_shapes_are_one_line(self) -> None:
        layout = Layout("segment", 1)
        boxes, prototypes = raw([*BOX, 0.9, 1.0]), np.zeros((1, 1, 4, 4), np.float32)
        with pytest.raises(PruningError, match=r"both must answer alike, but the checkpoint gives \(1, 6, 1\)"):
            differences([boxes, prototypes], [boxes[:, :5], prototypes], layout)
        with pytest.raises(PruningError, match=r"gives 2 outputs, the export 1"):
            differences([boxes, prototypes], [boxes], layout)

    def test_keypoints_are_places_and_their_visibility_a_score(self) -> None:
        layout = Layout("pose", 1, keypoints=(2, 3), size=(160, 160))
        points = [10.0, 10.0, 0.5, 20.0, 20.0, 0.5]
        moved = [10.0, 26.0, 0.5, 20.0, 20.0, 0.3]
        found = differences([raw([*BOX, 0.9, *points])], [raw([*BOX, 0.9, *moved])], layout)
        assert found == (1, pytest.approx(0.2), pytest.approx(0.1))
        flat = Layout("pose", 1, keypoints=(2, 2), size=(160, 160))
        assert differences([raw([*BOX, 0.9, 1.0, 1.0, 9.0, 9.0])], [raw([*BOX, 0.9, 1.0, 1.0, 9.0, 17.0])], flat) == (
            1, 0.0, pytest.approx(0.05),
        )  # fmt: skip

    def test_a_turn_counts_by_what_it_moves(self) -> None:
        layout = Layout("obb", 1, size=(160, 160))
        ours = raw([*BOX, 0.9, 0.0])
        same = differences([ours], [raw([*BOX, 0.9, np.pi])], layout)[2]
        turned = differences([ours], [raw([*BOX, 0.9, -0.5])], layout)[2]
        assert same == pytest.approx(0, abs=1e-6)
        assert turned == pytest.approx(0.5 * np.hypot(20, 20) / 160)

    def test_masks_are_compared_within_their_box(self) -> None:
        layout = Layout("segment", 1, size=(160, 160))
        prototypes = np.zeros((1, 2, 4, 4), np.float32)
        prototypes[0, 0] = 10.0
        prototypes[0, 1, 0, 0] = 100.0  # outside the box
        ours = [raw([*BOX, 0.9, 1.0, 0.0]), prototypes]
        assert differences(ours, [raw([*BOX, 0.9, 1.0, -1.0]), prototypes], layout)[1] == pytest.approx(0, abs=1e-6)
        assert differences(ours, [raw([*BOX, 0.9, -1.0, 0.0]), prototypes], layout)[1] > 0.99
        assert differences(ours, [ours[0], -prototypes], layout)[1] > 0.99

    def test_rows_that_changed_places_are_the_same_answer(self) -> None:
        layout = Layout("detect", 3, end_to_end=True, size=(160, 160))
        one, two = [10.0, 10.0, 50.0, 50.0, 0.8001, 1.0], [90.0, 90.0, 140.0, 140.0, 0.8, 2.0]
        faint = [0.0, 0.0, 9.0, 9.0, 0.01, 0.0]
        swapped = sorted_rows([*two[:4], 0.8001, 2.0], [*one[:4], 0.8, 1.0], faint)
        objects, score, place = differences([sorted_rows(one, two, faint)], [swapped], layout)
        assert (objects, score, place) == (2, pytest.approx(1e-4, rel=0.01), 0.0)

    @pytest.mark.parametrize(
        "row",
        [
            [10.0, 10.0, 50.0, 58.0, 0.8, 1.0],  # elsewhere
            [10.0, 10.0, 50.0, 50.0, 0.8, 2.0],  # of another class
            [10.0, 10.0, 50.0, 50.0, 0.4, 1.0],  # less sure
            [10.0, 10.0, 50.0, 50.0, 0.0, 1.0],  # not there
        ],
    )
    def test_a_row_that_has_no_like_is_found(self, row: list[float]) -> None:
        layout = Layout("detect", 3, end_to_end=True, size=(160, 160))
        ours, theirs = sorted_rows([10.0, 10.0, 50.0, 50.0, 0.8, 1.0]), sorted_rows(row)
        for pair in ((ours, theirs), (theirs, ours)):
            _, score, place = differences([pair[0]], [pair[1]], layout)
            assert score > 0.1 or place > 0.02

    def test_what_has_no_boxes_is_compared_as_it_is(self) -> None:
        ours = np.asarray([[0.1, 0.9]], np.float32)
        assert differences([ours, ours], [ours - 0.25], Layout("")) == (0, pytest.approx(0.25), 0.0)
