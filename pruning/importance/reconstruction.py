"""A criterion that knows of the refit: what removing a channel costs after its readers' weights were refitted to it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from pruning.elimination import Reader, removal_losses
from pruning.importance.base import Evidence, criterion
from pruning.importance.gradients import loss_model
from pruning.importance.output_fisher import output_probe
from pruning.layers import LayerTable
from pruning.refit import gather_patches, output_size, padded_rows

_CHUNK = 8  # images per pass
_POSITIONS = 20_000  # sampled positions per tensor, over all calibration images
_RIDGE = 1e-2  # relative to the mean second moment: keeps the inverse regular, as the refit's ridge does
_ROUNDS = 32  # removals per group with a new look at the costs
_LARGEST = 2400  # unknowns of one problem: memory grows with their square, time with their cube


@criterion("reconstruction", needs_data=True)
def reconstruction(evidence: Evidence) -> np.ndarray:
    """Change of the network's answer if a class leaves and all convolutions that read it are refitted, second order.

    Per group, classes are given up one round after the other, the cheapest first (`pruning.elimination`), so two
    channels that stand in for each other are not both thought free. A squared error of a convolution's output weighs
    as the curvature of the outputs' divergence there (`output_fisher`); no label is looked at. Where a convolution
    reads more than `_LARGEST` values, its kernel's taps are taken as uncorrelated: the problem is then as small as its
    channels.
    """
    assert evidence.calibration is not None
    readers = _readers(evidence, output_weights(evidence))
    scores = np.zeros(evidence.table.class_count)
    for group in evidence.table.groups:
        evidence.calibration.pause()
        members = set(np.concatenate(group.parts).tolist())
        mine = [reader for read in readers if (reader := read.of(members)) is not None]
        losses = removal_losses(mine, group.parts, _ROUNDS)
        order = np.arange(1, len(losses) + 1) / len(losses)
        values = np.array(list(losses.values()))
        scores[list(losses)] = values + 1e-9 * values.max() * order  # equal losses: in the order they were given up
    return scores


def output_weights(evidence: Evidence) -> dict[str, torch.Tensor]:
    """Per layer that the outputs depend on: half the curvature of their divergence by its outputs, mean over images.

    Shape (out channels,), float64; summed over positions. One probe an image (`output_probe`).
    """
    assert evidence.calibration is not None
    model = loss_model(evidence.model, evidence.device)
    generator = torch.Generator().manual_seed(evidence.seed)
    sums: dict[str, torch.Tensor] = {}

    def see(name: str, _: Any, __: Any, output: torch.Tensor) -> None:
        def add(grad: torch.Tensor) -> None:
            sums[name] = sums.get(name, 0) + grad.square().transpose(0, 1).flatten(1).sum(1).double()

        if output.requires_grad:
            output.register_hook(add)

    for name in _reading(model, evidence.table):
        model.get_submodule(name).register_forward_hook(partial(see, name))
    for batch in evidence.calibration.chunks(_CHUNK):
        output_probe(model, batch["img"].to(evidence.device), generator).backward()
        model.zero_grad(set_to_none=True)
    return {name: total / (2 * len(evidence.calibration.images)) for name, total in sums.items()}


@dataclass
class _Read:
    """A tensor as convolutions of one geometry read it: classes and moments of their unknowns, and their weights.

    Attributes:
        classes: of the tensor's channels, shape (channels,).
        taps: unknowns per channel.
    """

    classes: np.ndarray
    taps: int
    weights: list[torch.Tensor] = field(default_factory=list)
    count: int = 0
    reference: torch.Tensor | None = None
    sums: torch.Tensor | None = None
    squares: torch.Tensor | None = None
    inverse: torch.Tensor | None = None

    def add(self, seen: torch.Tensor) -> None:
        """Take in values of the unknowns, shape (positions, channels x taps)."""
        if self.reference is None or self.sums is None or self.squares is None:
            self.reference = seen.mean(0)  # sums of differences from it stay small, so float32 holds them
            self.sums, self.squares = torch.zeros_like(seen[0]), seen.new_zeros(seen.shape[1], seen.shape[1])
        values = seen - self.reference
        self.count += len(values)
        self.sums += values.sum(0)
        self.squares.addmm_(values.T, values)

    def of(self, members: set[int]) -> Reader | None:
        """A reader of its own for a group's classes; None where this tensor holds none of them."""
        channels = [k for k, name in enumerate(self.classes.tolist()) if name in members]
        if not channels:
            return None
        if self.inverse is None:
            assert self.sums is not None, "something was read"
            assert self.squares is not None
            mean = self.sums.double() / self.count
            moments = self.squares.double() / self.count - torch.outer(mean, mean)
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


def _readers(evidence: Evidence, weights: dict[str, torch.Tensor]) -> list[_Read]:
    """Run the network once and keep the second moments of everything that a convolution with a weight reads."""
    assert evidence.calibration is not None
    model = copy.deepcopy(evidence.model).to(evidence.device).eval()
    rng = np.random.default_rng(evidence.seed)
    share = max(1, _POSITIONS // len(evidence.calibration.images))
    by_reader: dict[str, _Read] = {}  # by the first convolution that reads it
    present: list[tuple[torch.Tensor, object, _Read]] = []  # of this chunk; held, so that no address comes twice

    def see(name: str, conv: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        source, whole = inputs[0], isinstance(conv, nn.Conv2d) and conv.weight[0].numel() <= _LARGEST
        geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation) if whole else None
        read = next((read for tensor, shape, read in present if tensor is source and shape == geometry), None)
        if read is None:
            taps = conv.weight[0, 0].numel() if whole else 1
            read = by_reader.setdefault(name, _Read(reading[name], taps))
            present.append((source, geometry, read))
            read.add(_sampled(source, conv if whole else None, rng, share * len(source)))
        if name in waiting:  # its weights, once
            waiting.remove(name)
            read.weights.append(_scaled_weights(conv, weights[name].sqrt().float(), whole))

    reading = _reading(model, evidence.table)
    waiting = {name for name in reading if name in weights}
    for name in list(waiting):
        reader: Any = model.get_submodule(name)
        reader.register_forward_pre_hook(lambda module, inputs, name=name: see(name, module, inputs))
    with torch.no_grad():
        for batch in evidence.calibration.chunks(_CHUNK):
            model(batch["img"].to(evidence.device))
            present.clear()
    return list(by_reader.values())


def _sampled(source: torch.Tensor, conv: nn.Conv2d | None, rng: np.random.Generator, count: int) -> torch.Tensor:
    """What a convolution sees of (N, C, H, W) at random places, shape (places, C x taps); the channels, without one.

    `count` places, or every place once where that many would draw each of them twice. All of what a linear layer sees,
    (N, C).
    """
    if source.ndim == 2:
        return source
    sides = [int(n) for n in source.shape[2:]]
    if conv is not None:
        sides = [output_size(conv, side, axis) for axis, side in enumerate(sides)]
    shape = (len(source), *sides)
    if count >= 2 * np.prod(shape):
        drawn = list(np.indices(shape).reshape(3, -1))
    else:
        drawn = [rng.integers(0, n, count) for n in shape]
    places = torch.from_numpy(np.stack(drawn, axis=1)).to(source.device)
    if conv is None:
        return source[places[:, 0], :, places[:, 1], places[:, 2]]
    return gather_patches(padded_rows(source, conv), conv, places).transpose(1, 2).flatten(1)


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
