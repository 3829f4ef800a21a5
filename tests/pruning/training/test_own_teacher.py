"""A teacher of the user's own, learned beside the labels: its loss, what it may be, and a training by it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel

from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.training.finetune import finetune
from paretoprune.pruning.training.settings import FinetuneSettings
from paretoprune.pruning.training.single_device import _identity
from paretoprune.pruning.training.stock_baseline import AS_PICKS, train_native
from paretoprune.pruning.training.teacher import TaughtModel, check_own_teacher, objects, own_teacher
from paretoprune.pruning.yolo.output_distribution import output_divergence, output_terms, raw_outputs
from paretoprune.pruning.yolo.saving import plain_copy, save_checkpoint
from tests.pruning.output_oracle import CASES, detections
from tests.pruning.recovery_material import same_weights, shapes_dataset, stock_model, weights
from tests.pruning.tiny import _YAML, tiny_model

HEADS = [case for case in CASES if case not in ("a class of each pixel", "queries")]
SETTINGS = FinetuneSettings(epochs=1, imgsz=64, batch=4, lr=1e-3, taught_by="wider")


def wider(names: tuple[str, ...] = ("square", "disc", "bar")) -> nn.Module:
    """A detector with more channels than the tiny one."""
    torch.manual_seed(1)
    backbone = [[f, n, kind, [2 * args[0], *args[1:]]] for f, n, kind, args in _YAML["backbone"]]
    yaml = {**_YAML, "nc": len(names), "backbone": backbone, "yaml_file": "wider.yaml"}
    model = DetectionModel(cfg=yaml, nc=len(names), verbose=False)
    model.names = dict(enumerate(names))
    return model.eval()


def labelled() -> dict[str, torch.Tensor]:
    batch = {
        "img": torch.rand(2, 3, 64, 64),
        "batch_idx": torch.tensor([0.0, 1.0]),
        "cls": torch.tensor([[0.0], [2.0]]),
    }
    return {**batch, "bboxes": torch.tensor([[0.3, 0.3, 0.4, 0.4], [0.6, 0.5, 0.3, 0.5]])}


def test_the_loss_is_the_labels_and_nats_per_object() -> None:
    teacher, student, batch = wider(), tiny_model(), labelled()
    student.args = get_cfg()  # type: ignore[assignment]
    taught = TaughtModel(teacher, student, labels=True).train()
    assert student.training
    assert not teacher.training
    loss, items = taught(batch)
    alone = plain_copy(student).train()
    alone.args = student.args
    by_labels, _ = alone.loss(batch)  # type: ignore[operator]
    with torch.no_grad():
        told, said = raw_outputs(teacher, batch["img"]), plain_copy(student).train()(batch["img"])
    reach = told["scores"].sigmoid().amax(1).sum()
    expected = detections(told, said) / reach.clamp_min(1) * 2
    assert float(loss.detach()) == pytest.approx(float(by_labels.sum().detach() + expected), rel=1e-3)
    assert list(items) == ["box_loss", "cls_loss", "dfl_loss", "teacher"]
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert not any("teacher" in name for name, _ in taught.named_parameters())


@pytest.mark.parametrize("case", HEADS)
@torch.no_grad()
def test_a_training_students_outputs_are_compared_with_a_judged_teachers(case: str) -> None:
    kind, yaml, _ = CASES[case]
    model = kind(yaml, verbose=False).eval()
    check_own_teacher(model, plain_copy(model), 64)
    student, images = plain_copy(model).train(), torch.rand(2, 3, 64, 64)
    told, said = raw_outputs(model, images), student(images)
    head = model.model[-1]
    terms = output_terms(head, (told, said), torch.Generator())
    assert all(term.values[0].shape == term.values[1].shape for term in terms)
    apart = output_divergence(head, told, said, torch.Generator()) / objects(told)
    assert torch.isfinite(apart)
    assert apart > 0


def test_what_cannot_teach_is_refused_in_one_line() -> None:
    def network(case: str) -> Any:
        kind, yaml, _ = CASES[case]
        return kind(yaml, verbose=False).eval()

    model = network("boxes with bins")
    for case, message in (
        ("without bins", r"has boxes of other bins \(reg_max 1\) than the model \(reg_max 16\)"),
        ("one-to-one with bins", "is end-to-end and the model is not"),
        ("masks", "is for 'segment' and the model for 'detect'"),
    ):
        with pytest.raises(PruningError, match=message):
            check_own_teacher(network(case), model, 64)
    queries = network("queries")
    with pytest.raises(PruningError, match="RT-DETR learns from the unpruned network alone"):
        check_own_teacher(queries, queries, 64)
    with pytest.raises(PruningError, match=r"knows 3 classes \(square, disc, ball\) and the model 3 classes"):
        check_own_teacher(wider(("square", "disc", "ball")), tiny_model(), 64)
    with pytest.raises(PruningError, match=r"gives outputs of shape .* and the model of"):
        check_own_teacher(one_scale(), tiny_model(), 64)
    with pytest.raises(PruningError, match="is one that is given"):
        finetune(tiny_model(), "nowhere.yaml", SETTINGS, Path("nowhere"))


def one_scale() -> nn.Module:
    model = DetectionModel(
        cfg={**_YAML, "head": [[[3], 1, "Detect", ["nc"]]], "yaml_file": "one.yaml"}, nc=3, verbose=False
    )
    model.names = dict(enumerate(("square", "disc", "bar")))
    return model.eval()


def test_a_training_learns_from_it_and_leaves_nothing_of_it(tmp_path: Path) -> None:
    data = str(shapes_dataset(tmp_path / "shapes", train=8, val=4))
    teacher, start = wider(), tiny_model()
    held = weights(teacher)
    result = finetune(start, data, SETTINGS, tmp_path / "taught", teacher=teacher)
    assert same_weights(weights(teacher), held)
    assert result.history[0]["train/teacher"] > 0
    assert result.history[0]["train/box_loss"] > 0
    alone = finetune(start, data, replace(SETTINGS, taught_by=""), tmp_path / "alone", teacher=teacher)
    assert "train/teacher" not in alone.history[0]
    save_checkpoint(result.model, tmp_path / "taught.pt")
    assert {name.split(".")[0] for name in stock_model(tmp_path / "taught.pt").state_dict()} == {"model"}
    # A training that died goes on with the same teacher only
    assert _identity(start, data, SETTINGS)["taught_by"] == "wider"
    assert "taught_by" not in _identity(start, data, replace(SETTINGS, taught_by=""))


def test_a_teacher_of_more_classes_teaches_those_of_the_model(tmp_path: Path) -> None:
    save_checkpoint(wider(("bar", "square", "disc", "ball", "bar 2")), tmp_path / "five.pt")
    model: Any = tiny_model()
    with pytest.raises(PruningError, match=r"knows 3 classes \(bar, square, disc\)"):  # in another order
        own_teacher(tmp_path / "five.pt", model, 64)
    model.names = {0: "bar", 1: "square", 2: "disc"}
    assert own_teacher(tmp_path / "five.pt", model, 64).names == model.names


def test_a_native_model_is_taught_too_where_it_can_be(tmp_path: Path) -> None:
    data = str(shapes_dataset(tmp_path / "shapes", train=8, val=4))
    save_checkpoint(wider(), tmp_path / "wider.pt")
    save_checkpoint(one_scale(), tmp_path / "one.pt")
    own = (tmp_path / "wider.pt", False)
    for native, recipe in (("wider.pt", AS_PICKS), ("one.pt", f"{AS_PICKS}, but without their teacher")):
        result = train_native(tmp_path / native, data, SETTINGS, tmp_path / f"as {native}", teacher=own)
        assert result.recipe == recipe
