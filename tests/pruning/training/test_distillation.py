"""Learning the unpruned network's outputs without a label: nearer on images that were held out, or nothing changes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

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


def learn(student: nn.Module, teacher: nn.Module, images: torch.Tensor, **given: Any) -> tuple[float, float]:
    """From all but each eighth, which are held out."""
    numbers = [k for k in range(len(images)) if k % 8]
    return distil(student, teacher, lambda chosen, seed: images[list(chosen)], numbers, images[::8], **given)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_damaged_network_comes_nearer(teacher: nn.Module, images: torch.Tensor) -> None:
    student, before_teacher = damaged(teacher, 0.1), copy.deepcopy(teacher)
    start, lines = copy.deepcopy(student), list[str]()
    before, after = learn(student, teacher, images, steps=12, report=lines.append)
    assert after < 0.9 * before
    assert not same(student, start)
    assert same(teacher, before_teacher)
    norms = [m for m in student.modules() if isinstance(m, nn.BatchNorm2d)]
    kept = [m for m in start.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(torch.equal(x.running_mean, y.running_mean) for x, y in zip(norms, kept, strict=True))
    assert "step 12 of 12" in lines[-1]
    again = damaged(teacher, 0.1)
    assert learn(again, teacher, images, steps=12) == (before, after)
    assert same(again, student)


def test_the_teacher_itself_stays(teacher: nn.Module, images: torch.Tensor) -> None:
    student = copy.deepcopy(teacher)
    assert learn(student, teacher, images, steps=3) == (0.0, 0.0)
    assert same(student, teacher)


def test_what_does_harm_is_not_kept(teacher: nn.Module, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    student = damaged(teacher, 0.01)
    start = copy.deepcopy(student)
    monkeypatch.setattr("paretoprune.pruning.training.distillation.taught_rate", lambda step: 0.3)
    before, after = learn(student, teacher, images, steps=4)
    assert after == before
    assert same(student, start)


def test_a_single_image_is_held_out_and_nothing_is_learned(teacher: nn.Module, images: torch.Tensor) -> None:
    student = damaged(teacher, 0.1)
    start = copy.deepcopy(student)
    before, after = learn(student, teacher, images[:1])
    assert before == after > 0
    assert same(student, start)


def test_the_images_are_drawn_with_a_seed_of_each_step_and_none_that_is_held_out(
    teacher: nn.Module, images: torch.Tensor
) -> None:
    asked: list[tuple[tuple[int, ...], int]] = []

    def take(numbers: Sequence[int], seed: int) -> torch.Tensor:
        asked.append((tuple(numbers), seed))
        return images[list(numbers)]

    distil(damaged(teacher, 0.1), teacher, take, range(4, 24), images[:4], steps=5)
    assert [len(numbers) for numbers, _ in asked] == [16] * 5
    assert len({seed for _, seed in asked}) == 5
    drawn = [number for numbers, _ in asked for number in numbers]
    assert set(drawn) == set(range(4, 24))
    assert max(drawn.count(number) for number in set(drawn)) == 4  # 80 of 20: each as often


def test_a_head_whose_outputs_are_unknown_is_one_line(teacher: nn.Module) -> None:
    bench = Workbench("unread.pt", imgsz=64)
    bench.model = copy.deepcopy(teacher)
    bench.model.model[-1].register_forward_hook(lambda _, __, output: (output[0], {}))  # type: ignore[index, union-attr]
    with pytest.raises(PruningError, match=r"^distillation needs a head whose outputs are known, but Detect gives"):
        bench.recover(copy.deepcopy(teacher), Plan({}), "refit+distill")
