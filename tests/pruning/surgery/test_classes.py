"""Removal of classes: what is left gives the kept ones the scores that they had, and is a stock network of so many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from ultralytics.nn.tasks import DetectionModel, RTDETRDetectionModel, SegmentationModel, SemanticSegmentationModel

from paretoprune.pruning.errors import NotEquivalentError, PruningError
from paretoprune.pruning.surgery import classes
from paretoprune.pruning.surgery.classes import class_numbers, with_classes
from paretoprune.pruning.yolo.output_distribution import raw_outputs
from paretoprune.pruning.yolo.saving import save_checkpoint
from tests.pruning.output_oracle import CASES, tensors
from tests.pruning.recovery_material import stock_model
from tests.pruning.tiny import tiny_model

KEPT = [1, 4, 5]
HEADS = [case for case in CASES if case != "a class of each pixel"]


def network(kind: type[Any], yaml: str, nc: int = 7) -> nn.Module:
    torch.manual_seed(0)
    model = kind(yaml, nc=nc, verbose=False).eval()
    model.names = {number: f"class {number}" for number in range(nc)}
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", HEADS)
@torch.no_grad()
def test_kept_classes_have_the_scores_that_they_had(case: str) -> None:
    kind, yaml, _ = CASES[case]
    model = network(kind, yaml)
    kept = with_classes(model, KEPT)
    images = torch.rand(2, 3, 64, 64)
    raw = raw_outputs(model, images)
    whole, rest = tensors(raw), tensors(raw_outputs(kept, images, raw))
    assert whole.keys() == rest.keys()
    narrower = 0
    for name, before in whole.items():
        dims = [dim for dim in range(before.ndim) if before.shape[dim] != rest[name].shape[dim]]
        narrower += len(dims)
        for dim in dims:
            assert (before.shape[dim], rest[name].shape[dim]) == (7, 3)
            before = before.index_select(dim, torch.tensor(KEPT))
        assert torch.allclose(before, rest[name], rtol=1e-5, atol=1e-5), name
    assert narrower == (2 if case in ("queries", "one-to-one with bins") or "26" in yaml else 1)
    assert kept.names == {0: "class 1", 1: "class 4", 2: "class 5"}
    assert kept.yaml["nc"] == 3  # type: ignore[index]
    assert model.names[6] == "class 6"  # type: ignore[index]
    assert model.yaml["nc"] == 7  # type: ignore[index]


@pytest.mark.parametrize(
    ("kind", "yaml"),
    [
        (DetectionModel, "yolov10n.yaml"),
        (SegmentationModel, "yolo26n-seg.yaml"),
        (RTDETRDetectionModel, "rtdetr-l.yaml"),
    ],
)
def test_what_is_left_can_be_trained(kind: type[Any], yaml: str) -> None:
    """Also by what only training has: one-to-one heads, semantic masks, denoising by an embedding of classes."""
    from ultralytics.cfg import get_cfg

    kept: Any = with_classes(network(kind, yaml), KEPT).train()
    kept.args, kept.nc = get_cfg(), 3  # as a trainer sets them
    batch = {
        "img": torch.rand(2, 3, 64, 64),
        "batch_idx": torch.tensor([0.0, 1.0]),
        "cls": torch.tensor([[0.0], [2.0]]),
    }
    batch |= {"bboxes": torch.full((2, 4), 0.5), "masks": torch.ones(2, 16, 16), "sem_masks": torch.ones(2, 16, 16)}
    loss = kept.loss(batch)[0].sum()
    loss.backward()
    assert torch.isfinite(loss)


def test_a_kept_network_is_stock(tmp_path: Path) -> None:
    from ultralytics import YOLO

    kept = with_classes(tiny_model(), [0, 2])
    save_checkpoint(kept, tmp_path / "kept.pt")
    save_checkpoint(kept, tmp_path / "undated.pt", date="")
    save_checkpoint(kept, tmp_path / "again.pt", date="")
    assert (tmp_path / "undated.pt").read_bytes() != (tmp_path / "kept.pt").read_bytes()
    stock: Any = stock_model(tmp_path / "kept.pt")
    assert (stock.names, stock.yaml["nc"]) == ({0: "square", 1: "bar"}, 2)
    assert (stock.model[-1].nc, stock.model[-1].no) == (2, 2 + 4 * 16)
    exported = YOLO(tmp_path / "kept.pt").export(format="torchscript", imgsz=64, verbose=False)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(torch.jit.load(exported)(images), stock(images)[0], atol=1e-4)


def test_classes_are_meant_by_name_or_number() -> None:
    model = tiny_model()
    assert class_numbers(model, ["bar", 0]) == class_numbers(model, ["Bar", "square", "0"]) == [0, 2]
    for wanted, message in (
        (["squares"], "must be of the model's 3, by name or number, but got 'squares'; near ones are square"),
        (["3"], "but got '3'; it has square, disc, bar$"),
        ([], "must name one class at least, but got none"),
    ):
        with pytest.raises(PruningError, match=message):
            class_numbers(model, wanted)
    model.names = {0: "a", 1: "a", 2: "b"}  # type: ignore[assignment]
    with pytest.raises(PruningError, match="'a' is the name of 0, 1; give its number"):
        class_numbers(model, ["a"])


def test_a_head_without_a_row_for_each_class_is_refused() -> None:
    with pytest.raises(PruningError, match="but the model has SemanticSegment: leave `classes` out"):
        with_classes(SemanticSegmentationModel("yolo26n-sem.yaml", verbose=False), [0, 1])
    model: Any = tiny_model()
    model.args = {"single_cls": True}
    with pytest.raises(PruningError, match="all classes as one"):
        with_classes(model, [0])
    model.args = {}
    model.model[-1].cv3[0][-1] = nn.Conv2d(16, 5, 1)
    with pytest.raises(PruningError, match=r"a row for each of the 3 classes, but got Conv2d\(16, 5"):
        with_classes(model, [0])


def test_scores_that_differ_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = classes._keep_rows
    monkeypatch.setattr(classes, "_keep_rows", lambda layer, rows, before: stock(layer, rows - 1, before))
    with pytest.raises(NotEquivalentError, match="the scores must be the same, but they differ by"):
        with_classes(tiny_model(), [1, 2])
