"""The fast copy of a network, against `copy.deepcopy`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from paretoprune.pruning.surgery.cloning import Narrowed, clone
from tests.pruning.masking import build, tensors


def storages(model: nn.Module) -> set[int]:
    return {t.data_ptr() for t in [*model.parameters(), *model.buffers()] if t.numel()}


@pytest.mark.parametrize("name", ["yolov8n", "yolo11n-seg", "yolo12n", "yolo26n", "rtdetr-l"])
def test_equal_to_a_deepcopy_and_independent(name: str) -> None:
    model: Any = build(name)
    image = torch.rand(1, 3, 64, 64) if name != "rtdetr-l" else torch.rand(1, 3, 160, 160)
    model(image)  # leaves cached anchors
    slow, fast = copy.deepcopy(model), clone(model, {})
    for a, b in zip(slow.modules(), fast.modules(), strict=True):
        assert type(a) is type(b)
        assert vars(a).keys() == vars(b).keys()
        assert a.training == b.training
    states = zip(slow.state_dict().items(), fast.state_dict().items(), strict=True)
    assert all(ka == kb and torch.equal(a, b) for (ka, a), (kb, b) in states)
    assert [p.requires_grad for p in slow.parameters()] == [p.requires_grad for p in fast.parameters()]
    assert not storages(model) & storages(fast)
    for own in ("yaml", "names", "save", "args"):
        assert getattr(fast, own, None) == getattr(model, own, None)
    assert fast.yaml is not model.yaml  # type: ignore[union-attr]
    with torch.no_grad():
        before = tensors(model(image))
        for parameter in fast.parameters():
            parameter.zero_()
        assert all(torch.equal(a, b) for a, b in zip(before, tensors(model(image)), strict=True))


class Sharing(nn.Module):
    """What a copy must keep: one module under two names, one weight in two modules, a method bound to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.one = self.same = nn.Linear(2, 2)
        self.tied = nn.Linear(2, 2)
        self.tied.weight = self.one.weight
        self.forward = self.other  # type: ignore[method-assign]

    def other(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.tied(self.one(x))
        return found


def test_what_is_shared_stays_shared() -> None:
    model = Sharing()
    model.one.weight.grad = torch.ones(2, 2)
    copied: Any = clone(model, {})
    assert copied.one is copied.same
    assert copied.one is not model.one
    assert copied.tied.weight is copied.one.weight
    assert copied.one.weight.grad is None
    assert copied.forward.__self__ is copied
    assert torch.equal(copied(torch.ones(1, 2)), model(torch.ones(1, 2)))


class OwnWay(nn.Linear):
    """Decides itself how it is copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnWay:
        memo[id(self)] = made = OwnWay(1, 1)
        made.in_features = 77
        return made


def test_a_class_with_its_own_copy_is_asked() -> None:
    copied: Any = clone(nn.Sequential(OwnWay(2, 2)), {})
    assert copied[0].in_features == 77


def test_narrower_tensors_take_the_place_of_the_old() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ConvTranspose2d(6, 5, 2), nn.Linear(5, 2))
    before = copy.deepcopy(model)
    narrowed = Narrowed()
    narrowed.conv(model[0], torch.tensor([0, 2, 5]), torch.tensor([1, 3]), depthwise=False)
    narrowed.norm(model[1], torch.tensor([0, 2, 5]))
    narrowed.conv(model[2], torch.tensor([4]), torch.tensor([0, 2, 5]), depthwise=False)
    narrowed.linear(model[3], torch.tensor([1]), torch.tensor([4]))
    found: Any = narrowed.copy_of(model)
    assert torch.equal(found[0].weight, before[0].weight[[0, 2, 5]][:, [1, 3]])  # type: ignore[index]
    assert torch.equal(found[0].bias, before[0].bias[[0, 2, 5]])  # type: ignore[index]
    assert torch.equal(found[1].running_var, before[1].running_var[[0, 2, 5]])  # type: ignore[index]
    assert torch.equal(found[2].weight, before[2].weight[[0, 2, 5]][:, [4]])  # type: ignore[index]
    assert torch.equal(found[3].weight, before[3].weight[[1]][:, [4]])  # type: ignore[index]
    assert (found[0].in_channels, found[0].out_channels, found[1].num_features) == (2, 3, 3)
    assert (found[2].in_channels, found[2].out_channels, found[3].in_features) == (3, 1, 1)
    assert found[2](found[1](found[0](torch.rand(1, 2, 5, 5)))).shape == (1, 1, 4, 4)
    states = zip(before.state_dict().values(), model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states)


def test_a_depthwise_convolution_loses_groups() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4))
    model.requires_grad_(False)
    narrowed = Narrowed()
    narrowed.conv(model[0], torch.tensor([1, 2]), None, depthwise=True)
    found: Any = narrowed.copy_of(model)[0]  # type: ignore[index]
    assert (found.in_channels, found.out_channels, found.groups) == (2, 2, 2)
    assert found.weight.shape == (2, 1, 3, 3)
    assert not found.weight.requires_grad
