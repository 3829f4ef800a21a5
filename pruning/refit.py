"""Recovery without a gradient step: refit what consumes pruned channels to the unpruned network's responses.

While the pruned network runs once over the calibration images, every convolution is stopped at before it computes: its
weights are solved by ridge least squares so that, fed with what the pruned network gives it now (errors of the layers
before included), it reproduces the unpruned network's pre-activation responses on the channels it kept. Then it runs
with the new weights, so the layer after it sees the corrected input. One forward pass and one solve per layer.

After He, Zhang and Sun 2017, "Channel pruning for accelerating very deep neural networks" (arXiv:1707.06168, eq. 5,
the asymmetric reconstruction), without its channel selection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from pruning.layers import LayerTable


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
    baseline: nn.Module, table: LayerTable, images: torch.Tensor, settings: RefitSettings, seed: int = 0, chunk: int = 16
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

    def see(name: str, output: torch.Tensor, start: int) -> None:
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
                    hooks.after(module, lambda out, name=name, start=start: see(name, out, start))
            baseline(images[start : start + chunk].to(device))
    return {name: Sample(places[shapes[name]], torch.cat(parts)) for name, parts in answers.items()}


def refit(
    pruned: nn.Module, table: LayerTable, kept: dict[str, tuple[int, ...]], images: torch.Tensor, targets: Targets,
    settings: RefitSettings,
) -> dict[str, float]:
    """Refit every convolution of `pruned`, in place, in execution order.

    Args:
        pruned: eval mode, on the device to compute on.
        kept: per convolution that lost outputs, the indices it kept (see `Plan.kept`).
        images: the ones `targets` were recorded on, (N, C, H, W).

    Returns:
        Per refitted convolution, the share of the answers' variance that the refitted weights still miss, in [0, inf).
    """
    device = next(pruned.parameters()).device
    missed: dict[str, float] = {}

    def stop_at(name: str, conv: nn.Conv2d, source: torch.Tensor) -> None:
        if name in missed:
            return
        sample = targets[name]
        rows = list(kept[name]) if name in kept else slice(None)
        missed[name] = _refit_one(pruned, name, conv, source, sample.places, sample.answers[:, rows], settings)

    with torch.no_grad(), _Hooks() as hooks:
        for name in table.convs:
            module = pruned.get_submodule(name)
            if isinstance(module, nn.Conv2d) and name in targets:
                hooks.before(module, lambda x, name=name, module=module: stop_at(name, module, x))
        pruned(images.to(device))
    return missed


def _refit_one(
    pruned: nn.Module, name: str, conv: nn.Conv2d, source: torch.Tensor, places: torch.Tensor, answers: torch.Tensor,
    settings: RefitSettings,
) -> float:
    patches = gather_patches(source, conv, places)  # (positions, in, kernel area)
    depthwise = conv.groups > 1
    if depthwise and conv.groups != conv.in_channels:
        return 0.0
    weight = conv.weight.flatten(2) if depthwise else conv.weight.flatten(1)[None]  # (systems, out per system, unknowns)
    features = patches.transpose(0, 1) if depthwise else patches.flatten(1)[None]  # (systems, positions, unknowns)
    wanted = answers.T[:, :, None] if depthwise else answers[None]  # (systems, positions, out per system)
    if conv.bias is not None:
        wanted = wanted - (conv.bias[:, None, None] if depthwise else conv.bias)
    residual = wanted - features @ weight.transpose(1, 2)
    spread = wanted.var(dim=1, unbiased=False).sum().clamp_min(1e-12)
    if residual.square().mean(dim=1).sum() < 1e-9 * spread:
        return 0.0  # nothing upstream changed
    change, shift = solve_ridge(features, residual, settings.ridge)
    conv.weight += change.transpose(1, 2).reshape(conv.weight.shape)
    _shift_output(pruned, name, conv, shift.flatten())
    left = residual - features @ change - shift
    return float(left.square().mean(dim=1).sum() / spread)


def solve_ridge(features: torch.Tensor, wanted: torch.Tensor, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimise |wanted - features @ w - b|^2 + ridge * scale * |w|^2, with an unpenalised intercept b.

    Args:
        features: (systems, positions, unknowns); wanted: (systems, positions, outputs).
        ridge: relative to `scale`, the mean diagonal of the features' centred second moments.

    Returns:
        w (systems, unknowns, outputs) and b (systems, 1, outputs), solved in float64.
    """
    middle, level = features.mean(dim=1, keepdim=True), wanted.mean(dim=1, keepdim=True)
    centred = features - middle
    gram = (centred.transpose(1, 2) @ centred).double()
    right = (centred.transpose(1, 2) @ (wanted - level)).double()
    diagonal = gram.diagonal(dim1=1, dim2=2)
    penalty = ridge * diagonal.mean(dim=1, keepdim=True) + 1e-12
    gram.diagonal(dim1=1, dim2=2).add_(penalty)
    solution = torch.linalg.solve(gram, right).to(features.dtype)
    return solution, level - middle @ solution


def gather_patches(source: torch.Tensor, conv: nn.Conv2d, places: torch.Tensor) -> torch.Tensor:
    """What the convolution sees at the given output places: (positions, in channels, kernel area)."""
    (pad_y, pad_x), (step_y, step_x) = conv.padding, conv.stride  # type: ignore[misc]
    padded = F.pad(source, (pad_x, pad_x, pad_y, pad_y))  # type: ignore[has-type]
    image, row, column = places.unbind(1)
    taps = []
    for dy in range(conv.kernel_size[0]):
        for dx in range(conv.kernel_size[1]):
            y, x = row * step_y + dy * conv.dilation[0], column * step_x + dx * conv.dilation[1]
            taps.append(padded[image, :, y, x])
    return torch.stack(taps, dim=2)


def _shift_output(pruned: nn.Module, name: str, conv: nn.Conv2d, shift: torch.Tensor) -> None:
    """Add a constant per channel to a convolution's output: in its bias, or in the mean its batch norm subtracts."""
    if conv.bias is not None:
        conv.bias += shift
        return
    norm: Any = getattr(pruned.get_submodule(name.rpartition(".")[0]), "bn", None)
    if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None:
        norm.running_mean -= shift


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
