"""A criterion that knows of the refit: what removing a channel costs after its readers' weights were refitted to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from paretoprune.pruning.graph.layers import LayerTable
from paretoprune.pruning.graph.patches import gather_patches, output_size, padded_rows
from paretoprune.pruning.importance.base import Evidence, criterion
from paretoprune.pruning.importance.elimination import Reader, removal_errors
from paretoprune.pruning.importance.gradients import loss_model
from paretoprune.pruning.importance.output_fisher import curvature_at, output_probe, position_weights

_CHUNK = 8  # images per pass
_POSITIONS = 20_000  # sampled positions per tensor, over all calibration images
_RIDGE = 1e-2  # relative to the mean second moment: keeps the inverse regular, as the refit's ridge does
_ROUNDS = 32  # removals per group with a new look at the costs
_LARGEST = 2400  # unknowns of one problem: memory grows with their square, time with their cube


@criterion("reconstruction", needs_data=True)
def reconstruction(evidence: Evidence) -> np.ndarray:
    """Change of the network's answer if a class leaves and all convolutions that read it are refitted, second order.

    Per group, classes are given up one round after the other, the cheapest first (`pruning.importance.elimination`), so
    two channels that stand in for each other are not both thought free. A squared error of a convolution's output
    weighs as the curvature of the outputs' divergence there (`output_fisher`), by channel and, damped, by position; no
    label is looked at. Where a convolution reads more than `_LARGEST` values, its kernel's taps are taken as
    uncorrelated: the problem is then as small as its channels.
    """
    assert evidence.calibration is not None
    readers, _ = observe(evidence)
    scores = np.zeros(evidence.table.class_count)
    for group in evidence.table.groups:
        evidence.calibration.pause()
        members = set(np.concatenate(group.parts).tolist())
        mine = [reader for read in readers if (reader := read.of(members)) is not None]
        losses = removal_errors(mine, group.parts, _ROUNDS)
        order = np.arange(1, len(losses) + 1) / len(losses)
        values = np.array(list(losses.values()))
        scores[list(losses)] = values + 1e-9 * values.max() * order  # equal losses: in the order they were given up
    return scores


@dataclass
class _Call:
    """One pass of a layer: what it read, and the slope of the probe by what it gave, where there is one."""

    name: str
    layer: Any
    source: torch.Tensor
    slope: torch.Tensor | None = None

    @property
    def whole(self) -> bool:
        """Whether its kernel's taps are unknowns of one problem."""
        return isinstance(self.layer, nn.Conv2d) and self.layer.weight[0].numel() <= _LARGEST

    @property
    def geometry(self) -> object:
        """Calls of one geometry that read the same tensor have the same unknowns."""
        conv = self.layer
        own = (conv.kernel_size, conv.stride, conv.padding, conv.dilation) if self.whole else None
        return id(self.source), own


@dataclass
class _Read:
    """A tensor as convolutions of one geometry read it: classes and moments of their unknowns, and their weights.

    Attributes:
        classes: of the tensor's channels, shape (channels,).
        taps: unknowns per channel.
        layers: that read it so, by name, and whether their kernels' taps are unknowns.
    """

    classes: np.ndarray
    taps: int
    layers: dict[str, bool]
    weights: list[torch.Tensor] = field(default_factory=list)
    total: float = 0.0
    reference: torch.Tensor | None = None
    sums: torch.Tensor | None = None
    squares: torch.Tensor | None = None
    inverse: torch.Tensor | None = None

    def add(self, seen: torch.Tensor, weights: torch.Tensor) -> None:
        """Take in values of the unknowns, shape (positions, channels x taps), and what each position counts."""
        if self.reference is None or self.sums is None or self.squares is None:
            self.reference = seen.mean(0)  # sums of differences from it stay small, so float32 holds them
            self.sums, self.squares = torch.zeros_like(seen[0]), seen.new_zeros(seen.shape[1], seen.shape[1])
        values = seen - self.reference
        weighted = values * weights[:, None]
        self.total += float(weights.sum())
        self.sums += weighted.sum(0)
        self.squares.addmm_(weighted.T, values)

    def of(self, members: set[int]) -> Reader | None:
        """A reader of its own for a group's classes; None where this tensor holds none of them."""
        channels = [k for k, name in enumerate(self.classes.tolist()) if name in members]
        if not channels or not self.weights:
            return None
        if self.inverse is None:
            assert self.sums is not None, "something was read"
            assert self.squares is not None
            mean = self.sums.double() / self.total
            moments = self.squares.double() / self.total - torch.outer(mean, mean)
            moments.diagonal().add_(_RIDGE * moments.diagonal().mean() + 1e-9)
            self.inverse, self.squares = torch.cholesky_inverse(torch.linalg.cholesky(moments)).float(), None
        # Of an inverse, a Schur complement of some rows needs these rows only: what stays need not be carried along
        rows = torch.tensor(
            [k * self.taps + tap for k in channels for tap in range(self.taps)], device=self.inverse.device
        )
        places: dict[int, list[int]] = {}
        for place, k in enumerate(channels):
            places.setdefault(int(self.classes[k]), []).extend(range(place * self.taps, (place + 1) * self.taps))
        return Reader(self.inverse[rows][:, rows], torch.cat(self.weights, dim=1)[rows], places)


def observe(evidence: Evidence) -> tuple[list[_Read], dict[str, torch.Tensor]]:
    """Run the network once, forth and back: what its layers read, and how much their errors weigh.

    Returns:
        The second moments of everything that a convolution with a weight reads, and by layer half the curvature of the
        outputs' divergence by its outputs, summed over positions, mean over images: shape (out channels,), float64.
        One probe an image (`output_probe`).
    """
    assert evidence.calibration is not None
    model = loss_model(evidence.model, evidence.device)
    generator, classes = torch.Generator().manual_seed(evidence.seed), evidence.classes()
    rng = np.random.default_rng(evidence.seed)
    reading = _reading(model, evidence.table)
    share = max(1, _POSITIONS // len(evidence.calibration.images))
    reads: dict[str, _Read] = {}  # by the first convolution that reads it
    sums: dict[str, torch.Tensor] = {}
    calls: list[_Call] = []  # of this chunk; what they read is held, so that no identity comes twice

    def see(name: str, layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        call = _Call(name, layer, inputs[0])
        calls.append(call)
        if output.requires_grad:
            output.register_hook(partial(setattr, call, "slope"))

    for name in reading:
        model.get_submodule(name).register_forward_hook(partial(see, name))
    for batch in evidence.calibration.chunks(_CHUNK):
        output_probe(model, batch["img"].to(evidence.device), generator, classes).backward()
        model.zero_grad(set_to_none=True)
        for call in calls:
            if call.slope is not None:
                squares = call.slope.square().transpose(0, 1).flatten(1).sum(1).double()
                sums[call.name] = sums.get(call.name, 0) + squares
        alike: dict[object, list[_Call]] = {}
        for call in calls:
            alike.setdefault(call.geometry, []).append(call)
        for first, *others in alike.values():
            taps = first.layer.weight[0, 0].numel() if first.whole else 1
            new = _Read(reading[first.name], taps, {call.name: call.whole for call in (first, *others)})
            read = reads.setdefault(first.name, new)
            read.add(*_sampled(first, [call.slope for call in (first, *others)], rng, share * len(first.source)))
        calls.clear()
    halves = {name: total / (2 * len(evidence.calibration.images)) for name, total in sums.items()}
    unseen = set(halves)  # a layer's weights count once
    for read in reads.values():
        for name in [name for name in read.layers if name in unseen]:
            unseen.remove(name)
            scale = halves[name].sqrt().float()
            read.weights.append(_scaled_weights(model.get_submodule(name), scale, read.layers[name]))
    return list(reads.values()), halves


@torch.no_grad()
def _sampled(
    call: _Call, slopes: list[torch.Tensor | None], rng: np.random.Generator, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer sees at random places, shape (places, unknowns), and what each place counts, shape (places,).

    `count` places, or every place once where that many would draw each of them twice. All of what a linear layer sees,
    (N, C). `slopes`: of all the layers that see it so.
    """
    source, conv = call.source.detach(), call.layer
    if source.ndim == 2:
        return source, torch.ones(len(source), device=source.device)
    sides = int(source.shape[2]), int(source.shape[3])
    if call.whole:
        sides = output_size(conv, sides[0], 0), output_size(conv, sides[1], 1)
    shape = (len(source), *sides)
    if count >= 2 * np.prod(shape):
        drawn = list(np.indices(shape).reshape(3, -1))
    else:
        drawn = [rng.integers(0, n, count) for n in shape]
    places = torch.from_numpy(np.stack(drawn, axis=1)).to(source.device)
    weights = position_weights(curvature_at(places, slopes, sides))
    if not call.whole:
        return source[places[:, 0], :, places[:, 1], places[:, 2]], weights
    return gather_patches(padded_rows(source, conv), conv, places).transpose(1, 2).flatten(1), weights


def _scaled_weights(layer: Any, scale: torch.Tensor, whole: bool) -> torch.Tensor:
    """A layer's weights, shape (unknowns, outputs); each output channel times its scale.

    `whole`: the taps of a kernel are unknowns, else outputs of their own. A transposed convolution's output position
    has one tap (kernel and stride are equal in all of Ultralytics), so a tap gives its share of the positions.
    """
    weight: torch.Tensor = layer.weight.detach()
    if isinstance(layer, nn.ConvTranspose2d):
        taps = weight[0, 0].numel()
        return (weight * scale[None, :, None, None]).flatten(1) / taps**0.5
    scaled = (weight.flatten(1) * scale[:, None]).reshape(weight.shape)
    return scaled.flatten(1).T if whole else scaled.transpose(0, 1).flatten(1)


def _reading(model: nn.Module, table: LayerTable) -> dict[str, np.ndarray]:
    """Classes of the inputs of all layers that mix them; a depthwise convolution passes its channels on."""
    found = {}
    for name, channels in table.convs.items():
        conv: Any = model.get_submodule(name)
        if conv.groups == 1 and len(channels.inputs) == conv.in_channels:
            found[name] = channels.inputs
    return {**found, **table.linears}
