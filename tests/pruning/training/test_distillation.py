"""Learning the unpruned network's outputs without a label: nearer on images that were held out, or nothing changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.plan import Plan
from paretoprune.pruning.training.distillation import distil
from paretoprune.pruning.workbench import Workbench
from tests.pruning.masking import build


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    torch.manual_seed(0)
    return build("yolov8n").eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    coarse = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(coarse, size=64, mode="bilinear")


def damaged(teacher: nn.Module, by: float) -> nn.Module:
    student, draws = copy.deepcopy(teacher), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in student.parameters():
            if p.ndim == 4 and p.shape[1] > 1:
                p += by * p.std() * torch.randn(p.shape, generator=draws)
    return student


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_damaged_network_comes_nearer(teacher: nn.Module, images: torch.Tensor) -> None:
    student, before_teacher = damaged(teacher, 0.1), copy.deepcopy(teacher)
    start, lines = copy.deepcopy(student), list[str]()
    before, after = distil(student, teacher, images, steps=12, report=lines.append)
    assert after < 0.9 * before
    assert not same(student, start)
    assert same(teacher, before_teacher)
    norms = [m for m in student.modules() if isinstance(m, nn.BatchNorm2d)]
    kept = [m for m in start.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(torch.equal(x.running_mean, y.running_mean) for x, y in zip(norms, kept, strict=True))
    assert "step 12 of 12" in lines[-1]
    again = damaged(teacher, 0.1)
    assert distil(again, teacher, images, steps=12) == (before, after)
    assert same(again, student)


def test_the_teacher_itself_stays(teacher: nn.Module, images: torch.Tensor) -> None:
    student = copy.deepcopy(teacher)
    assert distil(student, teacher, images, steps=3) == (0.0, 0.0)
    assert same(student, teacher)


def test_what_does_harm_is_not_kept(teacher: nn.Module, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    student = damaged(teacher, 0.01)
    start = copy.deepcopy(student)
    monkeypatch.setattr("paretoprune.pruning.training.distillation.taught_rate", lambda step: 0.3)
    before, after = distil(student, teacher, images, steps=4)
    assert after == before
    assert same(student, start)


def test_a_single_image_is_held_out_and_nothing_is_learned(teacher: nn.Module, images: torch.Tensor) -> None:
    student = damaged(teacher, 0.1)
    start = copy.deepcopy(student)
    before, after = distil(student, teacher, images[:1])
    assert before == after > 0
    assert same(student, start)


def test_a_head_whose_outputs_are_unknown_is_one_line(teacher: nn.Module) -> None:
    bench = Workbench("unread.pt", imgsz=64)
    bench.model = copy.deepcopy(teacher)
    bench.model.model[-1].register_forward_hook(lambda _, __, output: (output[0], {}))  # type: ignore[index, union-attr]
    with pytest.raises(PruningError, match=r"^distillation needs a head whose outputs are known, but Detect gives"):
        bench.recover(copy.deepcopy(teacher), Plan({}), "refit+distill")
