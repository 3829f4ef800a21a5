"""Modules as people write them, one small one of each kind: what is prunable is exact, what is not says why."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from ultralytics.nn.modules.conv import Conv
from ultralytics.nn.tasks import DetectionModel

from paretoprune.pruning.errors import ModelError
from paretoprune.pruning.graph.geometry_reading import read_geometry
from paretoprune.pruning.graph.layers import LayerTable
from paretoprune.pruning.surgery.equivalence import EquivalenceCheck
from paretoprune.pruning.surgery.layer_table import build_layer_table
from paretoprune.pruning.surgery.surgery import choose_kept, kept_indices, nearest_width, remove
from paretoprune.pruning.yolo.loading import model_stats
from tests.pruning.masking import randomise_batch_norm

WIDE = 16
_YAML: dict[str, Any] = {
    "nc": 3,
    "backbone": [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [WIDE, 3, 2]], [-1, 1, "Conv", [WIDE, 1, 1]]],
    "head": [[-1, 1, "Conv", [24, 3, 2]], [[3], 1, "Detect", ["nc"]]],
}


def network(module: nn.Module | None = None, block: int = 2) -> nn.Module:
    """A small detector with `module` as one of its blocks, and batch norms that do something."""
    torch.manual_seed(0)
    model = DetectionModel(cfg=_YAML | {"yaml_file": "tiny.yaml"}, nc=3, verbose=False)
    blocks: Any = model.model
    if module is not None:
        module.i, module.f, module.type = block, -1, type(module).__name__  # type: ignore[assignment]
        blocks[block] = module
    randomise_batch_norm(model)
    return model.eval()


def assert_exact(model: nn.Module, table: LayerTable) -> None:
    """Random plans, each compared with the masked original channel by channel, in inference and in training."""
    check = EquivalenceCheck(model, 64)
    for seed in range(2):
        rng = np.random.default_rng(seed)
        widths = {g.id: nearest_width(g, rng.uniform(0.1, 0.8), 1) for g in table.groups}
        stays = choose_kept(table, widths, rng.random(table.class_count))
        check.check(remove(model, table, stays), kept_indices(table, stays))


class Between(nn.Module):
    """Convolution, a function of the module and what the convolution gave, convolution."""

    def __init__(self, function: Callable[[Any, torch.Tensor], torch.Tensor], wide: int = WIDE, **own: Any) -> None:
        super().__init__()
        self.conv, self.out, self.function = Conv(WIDE, WIDE, 3), Conv(wide, WIDE, 3), function
        for name, value in own.items():
            setattr(self, name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.out(self.function(self, self.conv(x)))
        return found


def per_channel(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.5)


def shift(m: Any, x: torch.Tensor, part: int) -> torch.Tensor:
    """Writes a part of the channels one place further into a new tensor."""
    y = torch.zeros_like(x)
    y[:, :part, :, 1:] = x[:, :part, :, :-1]
    y[:, part:] = x[:, part:]
    return y


def copied_view(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros_like(x)
    y[:, : WIDE // 2].copy_(x[:, WIDE // 2 :])
    return y


def raw_memory(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Fills a new tensor through memory that is none of torch's business."""
    y = torch.empty_like(x)
    y.numpy()[...] = x.numpy()[:, ::-1]
    return y


class Reversed(torch.autograd.Function):
    """Turns channels around where no traced function sees it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(x.numpy()[:, ::-1]))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.flip(1)


@torch.jit.script
def scripted_swish(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x * scale)


@torch.jit.script
def scripted_gate(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x.mean(1, keepdim=True))


class PartialConv(nn.Module):
    """A convolution of some channels only, as many as two attributes say."""

    def __init__(self) -> None:
        super().__init__()
        self.some, self.rest = WIDE // 4, WIDE - WIDE // 4
        self.conv, self.part, self.out = Conv(WIDE, WIDE, 1), Conv(WIDE // 4, WIDE // 4, 3), Conv(WIDE, WIDE, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = torch.split(self.conv(x), [self.some, self.rest], dim=1)
        found: torch.Tensor = self.out(torch.cat(tensors=(self.part(a), b), dim=1))
        return found


class SqueezeExcite(nn.Module):
    """A gate over pooled channels, through linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down, self.up = Conv(WIDE, WIDE, 3), nn.Linear(WIDE, 4), nn.Linear(4, WIDE, bias=False)
        self.out = Conv(WIDE, WIDE, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        b, c, _, _ = x.size()
        gate = self.up(self.down(F.adaptive_avg_pool2d(x, 1).view(b, c)).relu()).sigmoid().view(b, c, 1, 1)
        found: torch.Tensor = self.out(x * gate.expand_as(x))
        return found


def simam(m: Any, x: torch.Tensor) -> torch.Tensor:
    d = (x - x.mean(dim=[2, 3], keepdim=True)).pow(2)
    return x * torch.sigmoid(d / (4 * (d.mean(dim=(2, 3), keepdim=True) + 1e-4)) + 0.5)


def shuffled(m: Any, x: torch.Tensor) -> torch.Tensor:
    b, c, h, w = x.shape
    return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


class GroupNormed(nn.Module):
    """Convolution, group norm, activation, convolution, as in light shared heads."""

    def __init__(self, groups: int, affine: bool = True) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(WIDE, WIDE, 3, padding=1), nn.GroupNorm(groups, WIDE, affine=affine)
        self.out = Conv(WIDE, WIDE, 3)
        if affine:
            self.norm.weight, self.norm.bias = per_channel(WIDE), per_channel(WIDE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.out(F.silu(self.norm(self.conv(x))))
        return found


PRUNABLE: dict[str, Callable[[], nn.Module]] = {
    "gamma (C, 1, 1)": lambda: Between(lambda m, x: m.g * x, g=per_channel(WIDE, 1, 1)),
    "gamma (C,) unsqueezed": lambda: Between(lambda m, x: m.g[:, None, None] * x, g=per_channel(WIDE)),
    "gamma (1, C, 1, 1) in a list": lambda: Between(
        lambda m, x: x * m.g[0].exp(), g=nn.ParameterList([per_channel(1, WIDE, 1, 1)])
    ),
    "gamma behind a permutation": lambda: Between(
        lambda m, x: (x.permute(0, 2, 3, 1) * m.g).permute(0, 3, 1, 2), g=per_channel(WIDE)
    ),
    "PReLU(C)": lambda: Between(lambda m, x: m.act(x), act=nn.PReLU(WIDE)),
    "split by attributes": PartialConv,
    "slices by the shape": lambda: Between(
        lambda m, x: torch.cat([2 * x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]], 1)
    ),
    "channel shuffle": lambda: Between(shuffled),
    "pixel shuffle": lambda: Between(lambda m, x: F.pixel_shuffle(x, 2), wide=WIDE // 4),
    "interleaved slices of space": lambda: Between(
        lambda m, x: torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2]], 1), wide=2 * WIDE
    ),
    "loop over images": lambda: Between(lambda m, x: torch.stack([i / (1 + i.amax((1, 2), keepdim=True)) for i in x])),
    "scripted activation": lambda: Between(lambda m, x: scripted_swish(x, m.g), g=torch.ones(1)),
    "squeeze and excite": SqueezeExcite,
    "SimAM": lambda: Between(simam),
    "keywords": lambda: Between(
        lambda m, x: torch.add(input=x, other=torch.cat(torch.chunk(input=x, chunks=2, dim=1), dim=1), alpha=2)
    ),
    "F.conv2d by keyword": lambda: Between(
        lambda m, x: F.conv2d(input=x, weight=m.more.weight, bias=m.more.bias), more=nn.Conv2d(WIDE, WIDE, 1)
    ),
}


@pytest.mark.parametrize("name", PRUNABLE)
def test_what_keeps_channels_apart_is_pruned_exactly(name: str) -> None:
    model = network(PRUNABLE[name]())
    table = build_layer_table(model)
    assert table.by_name["model.2.conv"].prunable
    assert_exact(model, table)


@pytest.mark.parametrize(("groups", "affine"), [(4, True), (8, False), (WIDE, True)])
def test_groups_of_a_group_norm_leave_as_a_whole(groups: int, affine: bool) -> None:
    model = network(GroupNormed(groups, affine))
    table = build_layer_table(model)
    assert_exact(model, table)
    rng = np.random.default_rng(0)
    widths = {g.id: nearest_width(g, 0.5, 1) for g in table.groups}
    stays = choose_kept(table, widths, rng.random(table.class_count))
    pruned: Any = remove(model, table, stays)
    block, kept = pruned.model[2], np.array(kept_indices(table, stays)["model.2.conv"])
    assert (block.norm.num_groups, block.norm.num_channels) == (groups // 2, WIDE // 2)
    assert block.conv.weight.shape[0] == block.out.conv.weight.shape[1] == WIDE // 2
    size = WIDE // groups
    assert all(len(set(kept[i : i + size] // size)) == 1 for i in range(0, len(kept), size))


FROZEN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "split by a stored number": (
        lambda: Between(lambda m, x: torch.cat([2 * y for y in x.split(WIDE // 4, 1)][::-1], 1)), "stored in a number",
    ),
    "slice by a stored number": (lambda: Between(lambda m, x: shift(m, x, 4)), "`getitem` in model.2 (Between) has"),
    "channels turned": (lambda: Between(lambda m, x: x.roll(1, 1)), "reads other channels when narrower"),
    "copied into a view": (lambda: Between(copied_view), "writes into a part of another tensor"),
    "number of the width": (lambda: Between(lambda m, x: x / math.sqrt(x.size(1))), "number that depends on its width"),
    "number of the size": (lambda: Between(lambda m, x: x * (x.numel() / 1e4)), "a number that depends on its width"),
    "another way at another width": (
        lambda: Between(lambda m, x: 2 * x if x.shape[1] == WIDE else x), "computes otherwise",
    ),
    "tensor with a number per channel": (
        lambda: Between(lambda m, x: x * m.g[0], g=[torch.rand(1, WIDE, 1, 1)]), "a number for each of them",
    ),
    "numpy": (lambda: Between(lambda m, x: torch.from_numpy(x.numpy()[:, ::-1].copy())), "`numpy` in model.2"),
    "memory written from outside": (lambda: Between(raw_memory), "`numpy` in model.2"),
    "autograd function": (lambda: Between(lambda m, x: Reversed.apply(x)), "`numpy` in model.2"),
    "another library's tensor": (
        lambda: Between(lambda m, x: torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(x)).flip(1)),
        "computes with what tracing does not see",
    ),
    "scripted gate": (lambda: Between(lambda m, x: scripted_gate(x)), "`mean` in model.2 (Between), which goes"),
    "shifted": (lambda: Between(lambda m, x: x + 3), "where a removed channel would not be zero"),
    "hardtanh": (lambda: Between(lambda m, x: F.hardtanh(x, 0.2, 2.0)), "where a removed channel would not be zero"),
    "constant padding": (
        lambda: Between(lambda m, x: F.pad(x, (1, 1, 1, 1), value=0.5)), "where a removed channel would not be zero",
    ),
    "gate over all channels": (
        lambda: Between(lambda m, x: x * torch.sigmoid(x.amax(1, keepdim=True))), "goes over all of them",
    ),
    "group norm of one group": (lambda: GroupNormed(1), "enter `group_norm`"),
    "group norm by a number": (lambda: Between(lambda m, x: F.group_norm(x, 4)), "enter `group_norm`"),
    "layer norm": (lambda: Between(lambda m, x: F.layer_norm(x, x.shape[1:])), "enter `layer_norm`"),
    "own weight": (
        lambda: Between(lambda m, x: F.conv2d(x, m.w, padding=1), w=per_channel(WIDE, WIDE, 3, 3)),
        "a weight that is no convolution's own",
    ),
    "weight norm": (
        lambda: Between(
            lambda m, x: m.more(x), more=nn.utils.parametrizations.weight_norm(nn.Conv2d(WIDE, WIDE, 1))
        ),
        "a weight that is no convolution's own",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FROZEN)
def test_what_does_not_stays_whole_and_says_why(name: str) -> None:
    make, words = FROZEN[name]
    model = network(make())
    table = build_layer_table(model)
    layer = table.by_name["model.2.conv"]
    assert not layer.prunable
    assert words in layer.reason
    assert "\n" not in layer.reason
    assert table.by_name["model.0"].prunable
    assert_exact(model, table)


class Shared(nn.Module):
    """Two convolutions behind one norm; one convolution at two places, with a norm for each."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(WIDE, WIDE, 1, bias=False), nn.Conv2d(WIDE, WIDE, 3, padding=1, bias=False)
        self.norm, self.first, self.second = (nn.BatchNorm2d(WIDE) for _ in range(3))
        self.twice = nn.Conv2d(2 * WIDE, 2 * WIDE, 1)
        self.out = Conv(2 * WIDE, WIDE, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.cat([F.silu(self.norm(self.a(x))), F.silu(self.norm(self.b(x)))], 1)
        found: torch.Tensor = self.out(F.relu(self.twice(F.relu(self.twice(y)))))
        return found


def test_one_norm_or_convolution_at_two_places() -> None:
    model = network(Shared())
    table = build_layer_table(model)
    assert table.by_name["model.2.a"].group == table.by_name["model.2.b"].group
    assert_exact(model, table)


class Focus(nn.Module):
    """A stem whose convolution reads more channels than the image has."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.conv = nn.PixelUnshuffle(2), Conv(12, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.conv(self.down(x))
        return found


def test_a_stem_that_rearranges_the_image() -> None:
    model = network(Focus(), block=0)
    table = build_layer_table(model)
    assert table.by_name["model.0.conv"].prunable
    assert_exact(model, table)


def test_a_model_that_cannot_run_is_one_clear_line() -> None:
    model = network(Between(lambda m, x: x + torch.zeros(5)))
    with pytest.raises(
        ModelError, match=r"the network must run on an image.*but it does not: model\.2 \(Between\) fails"
    ) as error:
        build_layer_table(model)
    assert "\n" not in str(error.value)


def test_a_fault_of_the_tracer_is_not_said_to_be_the_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr("paretoprune.pruning.graph.trace.call", fails)
    with pytest.raises(ModelError, match=r"in model\.0\.conv \(Conv2d\) .*IndexError.*the network runs") as error:
        build_layer_table(network(Between(lambda m, x: x)))
    assert "\n" not in str(error.value)


def test_the_geometry_counts_what_leaves_with_the_channels() -> None:
    for make in (SqueezeExcite, PRUNABLE["PReLU(C)"], PRUNABLE["gamma (C, 1, 1)"]):
        model = network(make())
        table = build_layer_table(model)
        rng = np.random.default_rng(0)
        stays = choose_kept(
            table, {g.id: nearest_width(g, 0.5, 1) for g in table.groups}, rng.random(table.class_count)
        )
        pruned = remove(model, table, stays)
        ratios = {n: 1 - stays[p].mean() for n, g in table.group_of.items() for p in g.parts[:1]}
        geometry = read_geometry(model, table, 64)
        params, _ = geometry.costs(geometry.shares([ratios]))
        assert params[0] == pytest.approx(model_stats(pruned, 64).params_m, rel=1e-12)
