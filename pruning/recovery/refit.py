"""Recovery without a gradient step: refit what consumes pruned channels to the unpruned network's responses.

While the pruned network runs once over the calibration images, every convolution is stopped at before it computes: its
weights are solved by ridge least squares so that, fed with what the pruned network gives it now (errors of the layers
before included), it reproduces the unpruned network's pre-activation responses on the channels it kept. Then they are
solved again with what an error does behind the activation: of two different inputs far below zero SiLU makes the same
output, so there an error counts next to nothing. Then the network runs with the new weights, so the layer after it
sees the corrected input. One forward pass and one solve per layer, a few steps more for the activation.

After He, Zhang and Sun 2017, "Channel pruning for accelerating very deep neural networks" (arXiv:1707.06168, eq. 5,
the asymmetric reconstruction), without its channel selection; the activation as a loss of its own as in Zhang, Zou, He
and Sun 2015, "Accelerating very deep convolutional networks for classification and detection" (arXiv:1505.06798,
section 3.2), here for any activation, by Gauss-Newton steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import dropwhile, islice
from typing import Any

import numpy as np
import torch
from torch import nn

from paretoprune.pruning.data.calibration import evenly_spread
from paretoprune.pruning.device import nothing
from paretoprune.pruning.graph.layers import LayerTable
from paretoprune.pruning.graph.patches import gather_patches, padded_rows
from paretoprune.pruning.recovery.least_squares import Moments, solve_by_output, solve_ridge
from paretoprune.pruning.surgery.surgery import classes_from_kept

_CHUNK = 4096  # positions observed at once
_Layer = nn.Conv2d | nn.ConvTranspose2d | nn.Linear
LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
_POINT = nn.Conv2d(1, 1, 1)  # what sees one position only: its geometry is a 1x1 convolution's
_ROUNDS, _STEPS = 1, 3  # Gauss-Newton steps behind the activation, and of conjugate gradients in each
_PLACES = 32768  # positions that they look at, at most
_SLOPES = (0.02, 20.0)  # of what an error counts behind the activation; the mean is 1
_NEAR = 1e-2  # to either side of an argument, where the activation's slope is taken
_UNCHANGED = 1e-5  # share of variance below which an input has not changed (float32 noise stays under it)


@dataclass(frozen=True)
class RefitSettings:
    """How much evidence a solve sees, and how far it may go.

    Attributes:
        positions: sampled output positions per convolution and calibration image.
        ridge: penalty on the change of the weights, relative to the mean diagonal of the inputs' second moments.
        memory_gb: for what a forward pass holds of all images at once; where they would take more, fewer are used,
            by all of the recovery. A constant, not what is free: the same plan must give the same network everywhere.
        answers_gb: for all layers' answers at the positions, alike: where they would take more, there are fewer.
        behind_activations: whether what comes out of the activations is fitted, or what goes into them.
    """

    positions: int = 200
    ridge: float = 1e-2
    memory_gb: float = 4.0
    answers_gb: float = 4.0
    behind_activations: bool = True


@dataclass(frozen=True)
class Sample:
    """Where one convolution is observed, and what the unpruned network answers there.

    Attributes:
        places: int64 (positions, 3): image, row, column of the output; of the input for a transposed convolution.
        answers: float32 (positions, out channels, taps): the output before batch norm. A transposed convolution gives
            as many positions as it has taps there, every other layer one. On the CPU: all layers' together are
            gigabytes, and stay as long as the worker.
        weights: float32 (positions,): what an error counts there; None: all alike. One tensor for all layers that read
            the same tensor alike, so that these share their sums.
    """

    places: torch.Tensor
    answers: torch.Tensor
    weights: torch.Tensor | None = None

    def on(self, device: torch.device, rows: Any) -> Sample:
        """The same on a device, of some of the output channels."""
        weights = None if self.weights is None else self.weights.to(device)
        return Sample(self.places.to(device), self.answers[:, rows].to(device), weights)


@dataclass(frozen=True)
class Targets:
    """What a refit aims at: the unpruned network's answers, and the very images that it gave them to.

    Attributes:
        images: (N, C, H, W), float32.
        samples: by the name of the layer.
    """

    images: torch.Tensor
    samples: Mapping[str, Sample]

    def thinned(self, count: int) -> Targets:
        """Of at most `count` images, evenly spread."""
        if count >= len(self.images):
            return self
        chosen, number = evenly_spread(len(self.images), count)
        thin: dict[int, torch.Tensor] = {}  # layers that share their places, or weights, go on sharing them

        def once(tensor: torch.Tensor, make: Callable[[], torch.Tensor]) -> torch.Tensor:
            return thin[id(tensor)] if id(tensor) in thin else thin.setdefault(id(tensor), make())

        def of(sample: Sample) -> Sample:
            places, weights = sample.places, sample.weights
            owners = number.to(places.device)[places[:, 0]]
            stay = owners >= 0
            fewer = once(places, lambda: torch.cat([owners[stay, None], places[stay, 1:]], dim=1))
            lighter = None if weights is None else once(weights, lambda: weights[stay])
            return Sample(fewer, sample.answers[stay.to(sample.answers.device)], lighter)

        return Targets(self.images[chosen], {name: of(sample) for name, sample in self.samples.items()})

    def renamed(self, name_after: Callable[[str], str | None]) -> Targets:
        """The same with layers under other names; those without one are left out."""
        found = ((name_after(name), sample) for name, sample in self.samples.items())
        return replace(self, samples={name: sample for name, sample in found if name is not None})


def refit(
    pruned: nn.Module,
    table: LayerTable,
    kept: Mapping[str, tuple[int, ...]],
    targets: Targets,
    settings: RefitSettings,
    pause: Callable[[], None] = nothing,
) -> dict[str, float]:
    """Refit every convolution and linear layer of `pruned`, in place, in execution order.

    Args:
        pruned: eval mode, on the device to compute on.
        kept: per convolution that lost outputs, the indices it kept (see `Plan.kept`).
        pause: called between two layers, where others may use the device.

    Returns:
        Per convolution, the share of the answers' variance that the refitted weights still miss, in [0, inf).
    """
    device = next(pruned.parameters()).device
    missed: dict[str, float] = {}
    images, samples = targets.images, targets.samples
    shared = _SharedSums()

    stays = classes_from_kept(table, kept) if table.linears else np.zeros(0, dtype=bool)
    features = {name: np.flatnonzero(stays[classes]).tolist() for name, classes in table.features.items()}

    def stop_at(name: str, layer: _Layer, source: torch.Tensor) -> None:
        if name not in missed:
            pause()
            rows = list(kept[name]) if name in kept else features.get(name, slice(None))
            sample = samples[name].on(device, rows)
            norm = _norm_of(pruned, name)
            curve = _activation_of(pruned, name) if settings.behind_activations else None
            missed[name] = _refit_one(layer, norm, curve, source, sample, settings, shared)

    with torch.no_grad(), Hooks() as hooks:
        for name in (*table.convs, *table.linears):
            module = pruned.get_submodule(name)
            if isinstance(module, LAYERS) and name in samples and _can_refit(module, _norm_of(pruned, name)):
                hooks.before(module, partial(stop_at, name, module))
        if device.type == "cpu":  # a fifth faster, and what the layers are fed with lies as `gather_patches` takes it
            pruned.to(memory_format=torch.channels_last)
            images = images.to(memory_format=torch.channels_last)
        pruned(images.to(device))
        pruned.to(memory_format=torch.contiguous_format)
    return missed


@dataclass
class _SharedSums:
    """The inputs' second moments of the last input: layers that read the same tensor alike need them once."""

    source: torch.Tensor | None = None
    geometry: tuple[object, ...] = ()
    moments: Moments | None = None


def _refit_one(
    layer: _Layer,
    norm: nn.BatchNorm2d | None,
    curve: nn.Module | None,
    source: torch.Tensor,
    sample: Sample,
    settings: RefitSettings,
    shared: _SharedSums,
) -> float:
    turned = isinstance(layer, nn.ConvTranspose2d)  # its weight is (in, out, height, width)
    systems = layer.groups if isinstance(layer, nn.Conv2d) else 1  # a depthwise convolution has one per channel
    flat = layer.weight.reshape(systems, layer.weight.shape[0] // systems, -1)
    start = flat if turned else flat.transpose(1, 2)  # (systems, unknowns, outputs)
    taps = sample.answers.shape[2]
    constant = layer.bias if layer.bias is not None else torch.zeros(sample.answers.shape[1], device=source.device)
    moments = _observe(layer, source, sample, shared)
    constants = constant.repeat_interleave(taps).reshape(systems, 1, -1)
    solution = solve_ridge(moments, start, constants, settings.ridge, shared=taps, enough=_UNCHANGED)
    if solution.missed_before < _UNCHANGED:
        return solution.missed_before  # nothing upstream changed
    weights, constants = solution.weights, solution.intercept
    if isinstance(layer, nn.Conv2d) and norm is not None and curve is not None:
        weights, constants = _behind(curve, norm, layer, source, sample, moments, settings.ridge, weights, constants)
    found = weights if turned else weights.transpose(1, 2)
    layer.weight.copy_(found.reshape(layer.weight.shape))
    intercept = constants.flatten()[::taps].to(layer.weight.dtype)
    if layer.bias is not None:
        layer.bias.copy_(intercept)
    elif norm is not None and norm.running_mean is not None:
        norm.running_mean -= intercept  # a convolution without bias: its batch norm subtracts the rest
    return solution.missed


def _behind(
    curve: nn.Module,
    norm: nn.BatchNorm2d,
    layer: nn.Conv2d,
    source: torch.Tensor,
    sample: Sample,
    moments: Moments,
    ridge: float,
    weights: torch.Tensor,
    intercept: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights (systems, unknowns, outputs) and intercept (systems, 1, outputs) that fit behind the activation.

    Gauss-Newton steps from `weights` and `intercept`: an error counts by the square of the activation's slope, for each
    output by its own.
    """
    picked = evenly_spread(len(sample.places), min(_PLACES, len(sample.places)))[0]
    places, rows = sample.places[picked], padded_rows(source, layer)
    x, wanted = (
        seen.reshape(len(places), layer.groups, -1).transpose(0, 1)
        for seen in (
            torch.cat([gather_patches(rows, layer, part).transpose(1, 2) for part in places.split(_CHUNK)]),
            sample.answers[picked],
        )
    )
    counts = torch.ones_like(x[:1, :, :1]) if sample.weights is None else sample.weights[picked][None, :, None]
    assert norm.running_mean is not None, "see _norm_of"
    assert norm.running_var is not None, "see _norm_of"
    gain = (norm.weight / (norm.running_var + norm.eps).sqrt()).reshape(layer.groups, 1, -1)
    shift = norm.bias.reshape(layer.groups, 1, -1) - gain * norm.running_mean.reshape(layer.groups, 1, -1)
    start = layer.weight.reshape(layer.groups, layer.weight.shape[0] // layer.groups, -1).transpose(1, 2)
    mean = (counts * x).sum(1, keepdim=True) / counts.sum()
    x, w = x - mean, weights.to(x.dtype)
    b = intercept.to(x.dtype) + mean @ w
    system, penalty = moments.penalised(ridge)
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed.any():  # inputs that depend on each other, and hardly a penalty
        return weights, intercept
    goal = curve(gain * wanted + shift)
    for _ in range(_ROUNDS):
        z = gain * (x @ w + b) + shift
        slope = gain * (curve(z + _NEAR) - curve(z - _NEAR)) / (2 * _NEAR)
        weights = slope.square()
        scale = weights.mean(1, keepdim=True).clamp_min(1e-12)
        pull = slope * (goal - curve(z)) * counts / scale
        weights = (weights / scale).clamp(*_SLOPES) * counts
        share = moments.count / weights.sum(1, keepdim=True)  # all together count as much as in the shared system
        dw, db = solve_by_output(x, share * pull, share * weights, w - start, factor, penalty, _STEPS)
        w, b = w + dw, b + db
    return w, b - mean @ w


def _observe(layer: _Layer, source: torch.Tensor, sample: Sample, shared: _SharedSums) -> Moments:
    """Accumulate what the layer sees and what it should answer, a chunk of positions at a time."""
    conv = layer if isinstance(layer, nn.Conv2d) else _POINT
    source = source if source.ndim == 4 else source[:, :, None, None]
    rows = padded_rows(source, conv)
    observed = id(sample.places), id(sample.weights)
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, observed)
    again = shared.source is source and shared.geometry == geometry and shared.moments is not None
    moments: Moments | None = None
    for start in range(0, len(sample.places), _CHUNK):
        stop = start + _CHUNK
        patches = gather_patches(rows, conv, sample.places[start:stop])
        x, y = (
            seen.reshape(len(seen), conv.groups, -1).transpose(0, 1)
            for seen in (patches.transpose(1, 2), sample.answers[start:stop])
        )
        moments = moments or Moments.about(x, y)
        weights = None if sample.weights is None else sample.weights[start:stop]
        moments.add(x, y, weights, with_xx=not again)
    assert moments is not None  # a target has at least one position
    if again and shared.moments is not None:
        moments.xx = shared.moments.xx
    shared.source, shared.geometry, shared.moments = source, geometry, moments
    return moments


def _norm_of(pruned: nn.Module, name: str) -> nn.BatchNorm2d | None:
    """The batch norm behind a convolution: its wrapper's, or the next of a plain sequence (RT-DETR's projections)."""
    place, _, own = name.rpartition(".")
    parent = pruned.get_submodule(place)
    norm: Any = getattr(parent, "bn", None)
    if isinstance(parent, nn.Sequential):
        following = dropwhile(lambda module: module is not getattr(parent, own), parent)
        norm = next(islice(following, 1, None), None)
    return norm if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None else None


def _activation_of(pruned: nn.Module, name: str) -> nn.Module | None:
    """What follows the batch norm of an Ultralytics `Conv`; None: nothing, or it is not known."""
    found = getattr(pruned.get_submodule(name.rpartition(".")[0]), "act", None)
    return found if isinstance(found, nn.Module) and not isinstance(found, nn.Identity) else None


def _can_refit(layer: _Layer, norm: nn.BatchNorm2d | None) -> bool:
    """Whether it can take up an intercept: the one that cannot (DFL's) decodes, it learns nothing."""
    return layer.bias is not None or norm is not None


def recalibrate_batch_norm(
    pruned: nn.Module, images: torch.Tensor, chunk: int = 16, pause: Callable[[], None] = nothing
) -> None:
    """Replace the batch norms' running statistics by the averages over the images, in place.

    `pause`: called between two chunks, where others may use the device.
    """
    norms = [m for m in pruned.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [n.momentum for n in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    device = next(pruned.parameters()).device
    with torch.no_grad():
        # Chunks of one size: every one of them weighs the same in the average, also a last one of a single image
        for part in torch.tensor_split(images, -(-len(images) // chunk)):
            pause()
            pruned(part.to(device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


class Hooks:
    """Forward hooks that are gone when the block ends."""

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def __enter__(self) -> Hooks:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def before(self, module: nn.Module, see: Callable[[torch.Tensor], None]) -> None:
        self._handles.append(module.register_forward_pre_hook(lambda _, inputs: see(inputs[0])))

    def watch(self, module: nn.Module, see: Callable[[nn.Module, Any, Any], None]) -> None:
        self._handles.append(module.register_forward_hook(see))

    def after(self, module: nn.Module, see: Callable[[torch.Tensor], None]) -> None:
        self._handles.append(module.register_forward_hook(lambda _, __, output: see(output)))
