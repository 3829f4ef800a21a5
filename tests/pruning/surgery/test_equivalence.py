"""A network that computes something else than the masked original is stopped, with the block that begins it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from paretoprune.pruning.errors import ModelError, NotEquivalentError
from paretoprune.pruning.graph.layers import LayerTable
from paretoprune.pruning.plan import Plan
from paretoprune.pruning.surgery.equivalence import EquivalenceCheck, channel_error
from paretoprune.pruning.surgery.layer_table import build_layer_table
from paretoprune.pruning.surgery.surgery import prune, resolve
from tests.pruning.tiny import tiny_model


class Scaled(nn.Module):
    """A parameter that is broadcast along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 16).view(16, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


class Halved(nn.Module):
    """A slice with a fixed number."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:, :6], 2 * x[:, 6:]], 1)


class ByWidth(nn.Module):
    """A number taken from the shape."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / x.shape[1] ** 0.5


class ByWidthInTraining(ByWidth):
    """The same in training only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if self.training else x


class Written(nn.Module):
    """A write into a slice, in place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[:, 4:8] = 0.5
        return x


class Numpy(nn.Module):
    """A function of another library, over all channels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.sort(x.numpy(), axis=1)[:, ::-1].copy())


class Gate(nn.Module):
    """A gate over all channels, in a function that no mode sees through."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * scripted_gate(x)


@torch.jit.script
def scripted_gate(x: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(x.mean(1, keepdim=True))


class Shifted(nn.Module):
    """Not 0 at 0."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cos(x)


class TwoSizes(nn.Module):
    """Another computation on one image size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.shape[2] > 16 else x - x.mean(1, keepdim=True)


KINDS = (Scaled, Halved, ByWidth, ByWidthInTraining, Written, Numpy, Gate, Shifted, TwoSizes)


def halved(model: nn.Module, table: LayerTable | None = None) -> tuple[nn.Module, Plan]:
    table = table or build_layer_table(model)
    return prune(model, table, resolve(table, {"*": 0.5}, 1), np.random.default_rng(0).random(table.class_count))


@pytest.mark.parametrize("kind", KINDS)
def test_a_misread_module_is_stopped(kind: type[nn.Module]) -> None:
    """The layer table is of the network without the module: as if it had been taken to keep the channels apart."""
    model: Any = tiny_model()
    table = build_layer_table(model)
    model.model[1].act = nn.Sequential(nn.SiLU(), kind())
    pruned, plan = halved(model, table)
    with pytest.raises(NotEquivalentError, match=r"differ first in block model\.1 \(Conv\)") as error:
        EquivalenceCheck(model, 64).check(pruned, plan.kept)
    assert "\n" not in str(error.value)
    assert ("in training" in str(error.value)) == (kind is ByWidthInTraining)


def test_a_scripted_module_takes_part_although_it_takes_no_hooks() -> None:
    model: Any = tiny_model()
    model.model[1].act = torch.jit.script(nn.SiLU())
    pruned, plan = halved(model)
    EquivalenceCheck(model, 64).check(pruned, plan.kept)
    assert len(plan.ratios) > 3
    model.model[1].act = torch.jit.script(nn.Sequential(nn.SiLU(), Shifted()))
    with pytest.raises(NotEquivalentError, match=r"differ first in block model\.1 \(Conv\)"):
        EquivalenceCheck(model, 64).check(pruned, plan.kept)


@pytest.mark.parametrize(
    ("conv", "block"),
    [("model.1.conv", 1), ("model.2.m.0.cv2.conv", 2), ("model.3.conv", 3), ("model.4.cv3.1.0.conv", 4)],
)
def test_columns_in_another_order_are_stopped(conv: str, block: int) -> None:
    model = tiny_model()
    table = build_layer_table(model)
    channels = table.convs[conv]
    swapped = channels.inputs.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    wrong = replace(table, convs={**table.convs, conv: replace(channels, inputs=swapped)})
    scores = np.full(table.class_count, 0.5)
    scores[channels.inputs[:2]] = 0.0, 1.0  # the second stays: in the wrong table the first one's column does
    pruned, plan = prune(model, table, resolve(table, {"*": 0.5}, 1), scores)
    EquivalenceCheck(model, 64).check(pruned, plan.kept)
    wrongly, same = prune(model, wrong, resolve(wrong, {"*": 0.5}, 1), scores)
    assert same.kept == plan.kept
    with pytest.raises(NotEquivalentError, match=rf"block model\.{block} "):
        EquivalenceCheck(model, 64).check(wrongly, plan.kept)


@pytest.mark.parametrize("name", ["model.0.conv", "model.2.cv1.conv", "model.4.cv2.0.0.conv"])
def test_other_channels_than_the_plan_says_are_stopped(name: str) -> None:
    model = tiny_model()
    pruned, plan = halved(model)
    kept = list(plan.kept[name])
    other = next(i for i in range(100) if i not in kept)
    wrong = {**plan.kept, name: tuple(sorted([*kept[1:], other]))}
    with pytest.raises(NotEquivalentError, match=rf"block model\.{name.split('.')[1]} "):
        EquivalenceCheck(model, 64).check(pruned, wrong)


def test_a_convolution_that_never_runs_is_not_taken_for_checked() -> None:
    model: Any = tiny_model()
    model.model[1].spare = nn.Conv2d(16, 16, 1)
    pruned, plan = halved(model)
    with pytest.raises(NotEquivalentError, match=r"model\.1\.spare: its convolution lost channels, and no forward"):
        EquivalenceCheck(model, 64).check(pruned, {**plan.kept, "model.1.spare": (0, 1)})


class Restless(nn.Module):
    """What makes two forward passes of one network differ: drops, draws, counts, normalises by the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout2d(0.5)
        self.norm = nn.BatchNorm2d(16, momentum=1.0)
        self.conv = nn.Conv2d(16, 16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(self.drop(x)))
        if self.training:
            keep = x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(0.5)
            x = x * keep * random.random() * float(np.random.rand())  # noqa: NPY002
        return x


def test_stochastic_parts_stand_still_and_nothing_is_disturbed() -> None:
    model: Any = tiny_model()
    model.model[1].act = Restless()
    pruned, plan = halved(model)
    pruned.train()
    model.model[3].bn.train()
    states = [{k: v.clone() for k, v in m.state_dict().items()} for m in (model, pruned)]
    modes = [[m.training for m in each.modules()] for each in (model, pruned)]
    attributes = [[set(vars(m)) for m in each.modules()] for each in (model, pruned)]
    seeds = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index] # noqa: NPY002
    EquivalenceCheck(model, 64).check(pruned, plan.kept)
    assert torch.equal(torch.get_rng_state(), seeds[0])
    assert random.getstate() == seeds[1]
    assert (np.random.get_state()[1] == seeds[2]).all()  # type: ignore[index] # noqa: NPY002
    assert [[m.training for m in each.modules()] for each in (model, pruned)] == modes
    assert [[set(vars(m)) for m in each.modules()] for each in (model, pruned)] == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for each in (model, pruned) for m in each.modules())
    for each, before in zip((model, pruned), states, strict=True):
        assert all(torch.equal(before[k], v) for k, v in each.state_dict().items())


class OnlyLarge(nn.Module):
    """Runs at the size the network is meant for."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.rand(1, 1, side, side))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.place


def test_a_network_for_one_size_only_is_run_at_that_size() -> None:
    model: Any = tiny_model()
    model.model[1].act = nn.Sequential(nn.SiLU(), OnlyLarge(160 // 4))
    pruned: Any = tiny_model()
    pruned.model[1].act = model.model[1].act
    EquivalenceCheck(model, 160).check(pruned, {})
    with pytest.raises(ModelError, match="must run on images of 64 or 128 or 96 pixels, but it fails with"):
        EquivalenceCheck(model, 96).check(pruned, {})


@pytest.mark.parametrize(
    ("got", "error"),
    [
        (lambda x: x, 0.0),
        (lambda x: x + torch.tensor([0.0, 1e-6]).view(1, 2, 1), 1e-3),  # the small channel is off by its thousandth
        (lambda x: x[:, :1], float("inf")),
        (lambda x: x * float("nan"), float("inf")),
    ],
)
def test_a_channel_is_measured_by_its_own_size(got: Callable[[torch.Tensor], torch.Tensor], error: float) -> None:
    expected = torch.tensor([[[1.0, -2.0], [1e-3, 0.0]]])
    assert channel_error(expected, got(expected)) == pytest.approx(error, rel=1e-3)
    broken = torch.tensor([[[float("nan"), 1.0], [2.0, 3.0]]])
    assert channel_error(broken, broken.clone()) == 0.0
