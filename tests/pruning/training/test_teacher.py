"""Learning the unpruned network's outputs: it cannot harm, it helps, and every kind of network can be taught."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.training.finetune import finetune
from paretoprune.pruning.training.settings import FinetuneResult, FinetuneSettings
from paretoprune.pruning.training.teacher import STEPS, TaughtModel, check_teacher
from paretoprune.pruning.yolo.output_distribution import output_divergence, raw_outputs
from paretoprune.pruning.yolo.saving import plain_copy
from tests.pruning.masking import build
from tests.pruning.recovery_material import same_weights, shapes_dataset, weights
from tests.pruning.tiny import tiny_model


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(shapes_dataset(tmp_path_factory.mktemp("shapes"), train=32))


def apart(teacher: nn.Module, student: nn.Module) -> float:
    """Nats per image, on images that nobody was trained on."""
    teacher, student = plain_copy(teacher).double(), plain_copy(student).double()
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(5)).double()
    with torch.no_grad():
        told = raw_outputs(teacher, images)
        said = raw_outputs(student, images, told)
        return float(output_divergence(teacher.model[-1], told, said, torch.Generator())) / 4  # type: ignore[index]


def last_epoch(start: nn.Module, data: str, place: Path, teacher: nn.Module | None, **settings: Any) -> nn.Module:
    """The network after the last epoch, better or not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("paretoprune.pruning.training.trainer.Job.consider", _keep_all)
        result: FinetuneResult = finetune(
            start,
            data,
            FinetuneSettings(imgsz=64, batch=4, distill=teacher is not None, **settings),
            place,
            teacher=teacher,
        )
    assert result.best_epoch == result.epochs
    return result.model


def _keep_all(job: Any, epoch: int, model: nn.Module, metrics: dict[str, float]) -> None:
    job.best, job.best_epoch, job.metrics, job.start_metrics = model, epoch, dict(metrics), dict(metrics)


def test_the_teacher_itself_stays_as_it_is_and_labels_would_move_it(shapes: str, tmp_path: Path) -> None:
    unpruned = tiny_model()
    taught = last_epoch(unpruned, shapes, tmp_path / "taught", unpruned, epochs=1, lr=0.01)
    labelled = last_epoch(unpruned, shapes, tmp_path / "labelled", None, epochs=1, lr=0.01)
    assert apart(unpruned, taught) < 1e-9 < 1e-4 < apart(unpruned, labelled)
    assert same_weights(weights(taught), weights(unpruned))


def test_a_network_comes_closer_to_its_teacher(shapes: str, tmp_path: Path) -> None:
    teacher = tiny_model()
    start = plain_copy(teacher)
    with torch.no_grad():
        for parameter in start.parameters():
            parameter *= 1 + 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    before = weights(start)
    taught = last_epoch(start, shapes, tmp_path, teacher, epochs=3, lr=1e-3)
    assert apart(teacher, taught) < 0.7 * apart(teacher, start)
    frozen = [name for name, value in before.items() if "running" in name]
    assert frozen
    assert all(torch.equal(weights(taught)[name], before[name]) for name in frozen)


def test_a_class_that_counts_nothing_is_not_learned(shapes: str, tmp_path: Path) -> None:
    """The one class whose scores are off counts 0, so there is nothing to learn at all."""
    teacher: Any = tiny_model()
    start: Any = plain_copy(teacher)
    with torch.no_grad():
        for branch in start.model[-1].cv3:
            branch[-1].bias[1] += 0.5
    classes = torch.ones(len(teacher.names))
    settings = FinetuneSettings(imgsz=64, batch=4, epochs=1, lr=0.01, distill=True)
    moved = {}
    for name, counts in (("alike", classes), ("not", classes.scatter(0, torch.tensor([1]), 0.0))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("paretoprune.pruning.training.trainer.Job.consider", _keep_all)
            found = finetune(start, shapes, settings, tmp_path / name, teacher=teacher, classes=counts)
        moved[name] = not same_weights(weights(found.model), weights(start))
    assert moved == {"alike": True, "not": False}


@pytest.mark.parametrize(
    "name", ["yolov8n", "yolo26n", "yolov8n-seg", "yolov8n-pose", "yolo26n-obb", "yolov8n-cls", "rtdetr-l"]
)
def test_every_kind_has_no_gradient_where_it_is_its_own_teacher(name: str) -> None:
    torch.manual_seed(0)
    model = build(name)
    check_teacher(model, 64)
    taught = TaughtModel(plain_copy(model), plain_copy(model)).train()
    loss, items = taught({"img": torch.rand(2, 3, 64, 64)})
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(items["divergence"]) == pytest.approx(0.0, abs=1e-3)
    gradients = [p.grad for p in taught.parameters() if p.grad is not None]
    assert gradients
    assert not any(bool(g.any()) for g in gradients)


def test_a_head_whose_outputs_are_not_known_does_not_teach() -> None:
    model: Any = tiny_model()
    model.model[-1].forward = lambda x: ("answer", ["other things"])
    with pytest.raises(
        PruningError, match=r"distillation needs a head whose outputs are known, but Detect gives others"
    ) as caught:
        check_teacher(model, 64)
    assert "\n" not in str(caught.value)


def test_the_nearer_to_the_teacher_the_shorter_the_steps_that_do_good() -> None:
    """And looking for them leaves the weights as they are."""
    teacher, found = tiny_model(), []
    for noise in (0.0, 1e-4, 0.1):
        student = plain_copy(teacher)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter *= 1 + noise * torch.randn(parameter.shape, generator=generator)
        before, taught = weights(student), TaughtModel(plain_copy(teacher), student)
        taught({"img": torch.rand(8, 3, 64, 64, generator=generator)})
        found.append(taught.longest_step())
        assert same_weights(weights(student), before)
    assert found[0] == STEPS[0]
    assert STEPS[0] <= found[1] < found[2]
