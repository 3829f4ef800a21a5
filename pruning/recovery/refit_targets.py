"""What a refit aims at: the unpruned network's answers at random positions, and how much an error counts there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from paretoprune.pruning.data.calibration import evenly_spread
from paretoprune.pruning.device import nothing
from paretoprune.pruning.graph.layers import LayerTable
from paretoprune.pruning.importance.base import unweighted
from paretoprune.pruning.importance.gradients import loss_model
from paretoprune.pruning.importance.output_fisher import curvature_at, output_probe, position_weights
from paretoprune.pruning.recovery.refit import LAYERS, Hooks, RefitSettings, Sample, Targets
from paretoprune.pruning.yolo.output_distribution import unknown_outputs

_CHUNK = 8  # images per pass
_ENOUGH = 200  # images from which on positions are weighted: see `record_targets`


def images_that_fit(model: nn.Module, images: torch.Tensor, memory_gb: float) -> torch.Tensor:
    """As many of the images, evenly spread, as a forward pass can hold at once; at least one.

    Counted on one image: the blocks' outputs that later blocks read, and the largest layer three times over (what
    comes in, its padded copy, what goes out).
    """
    held, largest = 0, 0

    def see_block(_: nn.Module, __: Any, output: Any) -> None:
        nonlocal held
        held += output.nbytes if isinstance(output, torch.Tensor) else 0

    def see_conv(_: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        nonlocal largest
        largest = max(largest, 2 * inputs[0].nbytes + output.nbytes)

    blocks: Any = model.model
    read_later = set(getattr(model, "save", ()))
    with torch.no_grad(), Hooks() as hooks:
        for number, block in enumerate(blocks):
            if number in read_later:
                hooks.watch(block, see_block)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                hooks.watch(module, see_conv)
        model(images[:1].to(next(model.parameters()).device))
    count = max(1, min(len(images), int(memory_gb * 1e9 / max(1, held + largest))))
    return images[evenly_spread(len(images), count)[0]]


def record_targets(
    baseline: nn.Module,
    table: LayerTable,
    images: torch.Tensor,
    settings: RefitSettings,
    seed: int = 0,
    pause: Callable[[], None] = nothing,
    device: str = "cpu",
    classes: Callable[[], torch.Tensor | None] = unweighted,
) -> Targets:
    """Run the unpruned network over the images and keep its layers' answers at random positions.

    Where images are many, errors count by the curvature of the outputs' divergence at their position (`output_fisher`;
    one probe an image, backwards through the same pass): few positions hold what is detected. With few images those
    positions are too few to solve for as many weights (mAP50-95 without and with them: VOC, half of the multiply-adds,
    in every step of a progressive removal 128 images 0.398 and 0.383, at its end 512 images 0.418 and 0.431; blood
    cells, a third, 205 images 0.580 and 0.590).

    Args:
        baseline: not touched; `images` (N, C, H, W) are moved to `device` chunk by chunk.
        pause: called between two chunks, where others may use the device.
        classes: gives what an error of each class counts (`output_distribution.class_weights`); called where they do.
    """
    model = copy.deepcopy(baseline).to(device)
    # What a head of the user's own gives may be unknown: then all positions count alike
    weighted = len(images) >= _ENOUGH and not unknown_outputs(model, images[:1].to(device))
    model = loss_model(model, device) if weighted else model
    counts = classes() if weighted else None
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    observed = {
        name: module for name in (*table.convs, *table.linears) if _observable(module := model.get_submodule(name))
    }
    count = _positions(observed, len(images), settings)
    places: dict[tuple[int, int], torch.Tensor] = {}  # one draw per resolution: layers with one input share their sums
    answers: dict[str, list[torch.Tensor]] = {}
    curvatures: dict[str, list[torch.Tensor]] = {}
    shapes: dict[str, tuple[int, int]] = {}
    calls: list[tuple[str, object, torch.Tensor, list[torch.Tensor]]] = []  # of this chunk: layer, input, places, slope

    def see(name: str, start: int, layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if any(call[0] == name for call in calls):
            return  # a layer that runs twice is refitted to what it gives the first time
        found = _by_place(layer, output.detach())
        shape = shapes[name] = (found.shape[2], found.shape[4])
        if shape not in places:
            places[shape] = _draw(rng, len(images), *shape, count).to(device)
        mine = places[shape][(places[shape][:, 0] >= start) & (places[shape][:, 0] < start + len(found))].clone()
        mine[:, 0] -= start
        answers.setdefault(name, []).append(found[mine[:, 0], :, mine[:, 1], :, mine[:, 2]].flatten(2).cpu())
        slope: list[torch.Tensor] = []
        calls.append((name, inputs[0], mine, slope))
        if output.requires_grad:
            output.register_hook(slope.append)

    sharing: dict[str, list[str]] = {}  # by the first of the layers that read one tensor alike: all of them
    for start in range(0, len(images), _CHUNK):
        pause()
        with Hooks() as hooks, torch.set_grad_enabled(weighted):
            for name, module in observed.items():
                hooks.watch(module, partial(see, name, start))
            chunk = images[start : start + _CHUNK].to(device)
            if weighted:
                output_probe(model, chunk, generator, counts).backward()
                model.zero_grad(set_to_none=True)
            else:
                model(chunk)
        alike: dict[object, list[Any]] = {}
        for call in calls:
            alike.setdefault((id(call[1]), shapes[call[0]]), []).append(call)
        for members in alike.values():
            name, _, mine, _ = members[0]
            sharing[name] = [member[0] for member in members]
            slopes = [slope[0] if slope else None for *_, slope in members]
            curvatures.setdefault(name, []).append(curvature_at(mine, slopes, shapes[name]))
        calls.clear()
    weights = _weights(sharing, curvatures) if weighted else {}
    samples = {
        name: Sample(places[shapes[name]], torch.cat(parts), weights.get(name)) for name, parts in answers.items()
    }
    return Targets(images, samples)


def _weights(sharing: Mapping[str, list[str]], curvatures: Mapping[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """By layer; one tensor for all that share."""
    found = {}
    for first, names in sharing.items():
        weights = position_weights(torch.cat(curvatures[first]))
        found.update(dict.fromkeys(names, weights))
    return found


def _positions(layers: Mapping[str, nn.Module], images: int, settings: RefitSettings) -> int:
    """Positions per layer over all images: as many as wanted, as far as the memory for their answers goes."""
    numbers = sum(getattr(layer, "out_channels", 0) or getattr(layer, "out_features", 0) for layer in layers.values())
    return max(1, min(settings.positions * images, int(settings.answers_gb * 1e9 / 4 / max(1, numbers))))


def _observable(layer: nn.Module) -> bool:
    """Whether an output position is made of one input window: not where a transposed convolution's windows overlap."""
    if not isinstance(layer, nn.ConvTranspose2d):
        return isinstance(layer, LAYERS)
    return layer.kernel_size == layer.stride and layer.groups == 1 and layer.padding == (0, 0)


def _by_place(layer: nn.Module, output: torch.Tensor) -> torch.Tensor:
    """A layer's output by the places it is observed at, (N, channels, rows, taps down, columns, taps across)."""
    if output.ndim == 2:
        return output[:, :, None, None, None, None]
    down, across = layer.stride if isinstance(layer, nn.ConvTranspose2d) else (1, 1)
    count, channels, height, width = output.shape
    return output.reshape(count, channels, height // down, down, width // across, across)


def _draw(rng: np.random.Generator, images: int, height: int, width: int, count: int) -> torch.Tensor:
    total = images * height * width
    flat = np.sort(rng.permutation(total)[:count] if total <= 4 * count else rng.integers(0, total, count))
    return torch.from_numpy(np.stack([flat // (height * width), flat // width % height, flat % width], axis=1))
