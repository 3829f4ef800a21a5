"""Recovery without a gradient step: refit what consumes pruned channels to the unpruned network's responses.

While the pruned network runs once over the calibration images, every convolution is stopped at before it computes: its
weights are solved by ridge least squares so that, fed with what the pruned network gives it now (errors of the layers
before included), it reproduces the unpruned network's pre-activation responses on the channels it kept. Then it runs
with the new weights, so the layer after it sees the corrected input. One forward pass and one solve per layer.

After He, Zhang and Sun 2017, "Channel pruning for accelerating very deep neural networks" (arXiv:1707.06168, eq. 5,
the asymmetric reconstruction), without its channel selection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from pruning.layers import LayerTable
from pruning.least_squares import Moments, solve_ridge

_CHUNK = 4096  # positions observed at once
_UNCHANGED = 1e-5  # share of variance below which an input has not changed (float32 noise stays under it)


@dataclass(frozen=True)
class RefitSettings:
    """How much evidence a solve sees, and how far it may go.

    Attributes:
        positions: sampled output positions per convolution, over all calibration images.
        ridge: penalty on the change of the weights, relative to the mean diagonal of the inputs' second moments.
    """

    positions: int = 20_000
    ridge: float = 1e-2


@dataclass(frozen=True)
class Sample:
    """Where one convolution is observed, and what the unpruned network answers there.

    Attributes:
        places: int64 (positions, 3): image, row, column of the output.
        answers: float32 (positions, out channels): the convolution's output before batch norm.
    """

    places: torch.Tensor
    answers: torch.Tensor


Targets = dict[str, Sample]


def record_targets(
    baseline: nn.Module,
    table: LayerTable,
    images: torch.Tensor,
    settings: RefitSettings,
    seed: int = 0,
    chunk: int = 16,
) -> Targets:
    """Run the unpruned network over the images and keep its convolutions' answers at random positions.

    Args:
        baseline: on any device, eval mode; `images` (N, C, H, W) are moved there chunk by chunk.
    """
    device = next(baseline.parameters()).device
    rng = np.random.default_rng(seed)
    places: dict[tuple[int, int], torch.Tensor] = {}  # one draw per resolution: layers with one input share their sums
    answers: dict[str, list[torch.Tensor]] = {}
    shapes: dict[str, tuple[int, int]] = {}

    def see(name: str, start: int, output: torch.Tensor) -> None:
        shape = shapes[name] = (output.shape[2], output.shape[3])
        if shape not in places:
            places[shape] = _draw(rng, len(images), *shape, settings.positions).to(device)
        mine = places[shape][(places[shape][:, 0] >= start) & (places[shape][:, 0] < start + len(output))]
        answers.setdefault(name, []).append(output[mine[:, 0] - start, :, mine[:, 1], mine[:, 2]])

    for start in range(0, len(images), chunk):
        with torch.no_grad(), _Hooks() as hooks:
            for name in table.convs:
                module = baseline.get_submodule(name)
                if isinstance(module, nn.Conv2d):
                    hooks.after(module, partial(see, name, start))
            baseline(images[start : start + chunk].to(device))
    return {name: Sample(places[shapes[name]], torch.cat(parts)) for name, parts in answers.items()}


def refit(
    pruned: nn.Module,
    table: LayerTable,
    kept: Mapping[str, tuple[int, ...]],
    images: torch.Tensor,
    targets: Targets,
    settings: RefitSettings,
) -> dict[str, float]:
    """Refit every convolution of `pruned`, in place, in execution order.

    Args:
        pruned: eval mode, on the device to compute on.
        kept: per convolution that lost outputs, the indices it kept (see `Plan.kept`).
        images: the ones `targets` were recorded on, (N, C, H, W).

    Returns:
        Per convolution, the share of the answers' variance that the refitted weights still miss, in [0, inf).
    """
    device = next(pruned.parameters()).device
    missed: dict[str, float] = {}
    shared = _SharedSums()

    def stop_at(name: str, conv: nn.Conv2d, source: torch.Tensor) -> None:
        if name not in missed:
            rows = list(kept[name]) if name in kept else slice(None)
            sample = Sample(targets[name].places, targets[name].answers[:, rows])
            missed[name] = _refit_one(conv, _norm_of(pruned, name), source, sample, settings, shared)

    with torch.no_grad(), _Hooks() as hooks:
        for name in table.convs:
            module = pruned.get_submodule(name)
            if isinstance(module, nn.Conv2d) and name in targets and _can_refit(module, _norm_of(pruned, name)):
                hooks.before(module, partial(stop_at, name, module))
        pruned(images.to(device))
    return missed


@dataclass
class _SharedSums:
    """The inputs' second moments of the last input: layers that read the same tensor alike need them once."""

    source: torch.Tensor | None = None
    geometry: tuple[object, ...] = ()
    moments: Moments | None = None


def _refit_one(
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d | None,
    source: torch.Tensor,
    sample: Sample,
    settings: RefitSettings,
    shared: _SharedSums,
) -> float:
    depthwise = conv.groups > 1
    flat = conv.weight.flatten(2) if depthwise else conv.weight.flatten(1)[None]  # (systems, outputs, unknowns)
    constant = conv.bias if conv.bias is not None else torch.zeros(conv.out_channels, device=source.device)
    moments = _observe(conv, source, sample, depthwise, shared)
    solution = solve_ridge(moments, flat.transpose(1, 2), constant.reshape(len(flat), 1, -1), settings.ridge)
    if solution.missed_before < _UNCHANGED:
        return solution.missed_before  # nothing upstream changed
    conv.weight.copy_(solution.weights.transpose(1, 2).reshape(conv.weight.shape))
    intercept = solution.intercept.flatten().to(conv.weight.dtype)
    if conv.bias is not None:
        conv.bias.copy_(intercept)
    elif norm is not None and norm.running_mean is not None:
        norm.running_mean -= intercept  # a convolution without bias: its batch norm subtracts the rest
    return solution.missed


def _observe(conv: nn.Conv2d, source: torch.Tensor, sample: Sample, depthwise: bool, shared: _SharedSums) -> Moments:
    """Accumulate what the convolution sees and what it should answer, a chunk of positions at a time."""
    pad_y, pad_x = (int(p) for p in conv.padding)
    rows = F.pad(source, (pad_x, pad_x, pad_y, pad_y)).permute(0, 2, 3, 1).contiguous()
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, id(sample.places))
    again = shared.source is source and shared.geometry == geometry and shared.moments is not None
    moments: Moments | None = None
    for start in range(0, len(sample.places), _CHUNK):
        stop = start + _CHUNK
        patches = gather_patches(rows, conv, sample.places[start:stop])
        answers = sample.answers[start:stop]
        x = patches.permute(2, 0, 1) if depthwise else patches.transpose(1, 2).flatten(1)[None]
        y = answers.T[:, :, None] if depthwise else answers[None]
        moments = moments or Moments.about(x, y)
        moments.add(x, y, with_xx=not again)
    assert moments is not None  # a target has at least one position
    if again and shared.moments is not None:
        moments.xx = shared.moments.xx
    shared.source, shared.geometry, shared.moments = source, geometry, moments
    return moments


def gather_patches(rows: torch.Tensor, conv: nn.Conv2d, places: torch.Tensor) -> torch.Tensor:
    """What the convolution sees at the given output places.

    Args:
        rows: the padded input with channels last, (N, H, W, in).
        places: int64 (positions, 3): image, row, column of the output.

    Returns:
        (positions, kernel area, in channels)
    """
    image, row, column = places.unbind(1)
    top, left = row * conv.stride[0], column * conv.stride[1]
    taps = [
        rows[image, top + dy * conv.dilation[0], left + dx * conv.dilation[1]]
        for dy in range(conv.kernel_size[0])
        for dx in range(conv.kernel_size[1])
    ]
    return torch.stack(taps, dim=1)


def _norm_of(pruned: nn.Module, name: str) -> nn.BatchNorm2d | None:
    norm: Any = getattr(pruned.get_submodule(name.rpartition(".")[0]), "bn", None)
    return norm if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None else None


def _can_refit(conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> bool:
    """Plain or depthwise, and able to take up an intercept: the one that is not (DFL's) decodes, it learns nothing."""
    return conv.groups in (1, conv.in_channels) and (conv.bias is not None or norm is not None)


def recalibrate_batch_norm(pruned: nn.Module, images: torch.Tensor, chunk: int = 16) -> None:
    """Replace the batch norms' running statistics by the averages over the images, in place."""
    norms = [m for m in pruned.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [n.momentum for n in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    device = next(pruned.parameters()).device
    with torch.no_grad():
        for start in range(0, len(images), chunk):
            pruned(images[start : start + chunk].to(device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def _draw(rng: np.random.Generator, images: int, height: int, width: int, count: int) -> torch.Tensor:
    total = images * height * width
    flat = np.sort(rng.permutation(total)[:count] if total <= 4 * count else rng.integers(0, total, count))
    return torch.from_numpy(np.stack([flat // (height * width), flat // width % height, flat % width], axis=1))


class _Hooks:
    """Forward hooks that are gone when the block ends."""

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def __enter__(self) -> _Hooks:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def before(self, module: nn.Module, see: Callable[[torch.Tensor], None]) -> None:
        self._handles.append(module.register_forward_pre_hook(lambda _, inputs: see(inputs[0])))

    def after(self, module: nn.Module, see: Callable[[torch.Tensor], None]) -> None:
        self._handles.append(module.register_forward_hook(lambda _, __, output: see(output)))
