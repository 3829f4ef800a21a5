"""Reading a network's geometry: one forward pass of one image, beside the layer table."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from paretoprune.base.image_size import ImageSize, height_width
from paretoprune.pruning.graph.branches import Branches, find_branches
from paretoprune.pruning.graph.geometry import (
    FIXED,
    Channels,
    ConvGeometry,
    GroupGeometry,
    LinearGeometry,
    MergeGeometry,
    NetworkGeometry,
    NormGeometry,
)
from paretoprune.pruning.graph.layers import LayerTable
from paretoprune.pruning.yolo.loading import input_channels, model_stats


@dataclass
class Positions:
    """Positions a module read and wrote, over all its calls in one forward pass."""

    read: int = 0
    written: int = 0


def positions(model: nn.Module, names: list[str], imgsz: ImageSize) -> dict[str, Positions]:
    """What one image makes each of these modules do; those that inference does not reach are left out."""
    model = copy.deepcopy(model).cpu().eval()
    found: dict[str, Positions] = {}

    def see(name: str, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen = found.setdefault(name, Positions())
        seen.read += inputs[0].shape[2:].numel()
        seen.written += output.shape[2:].numel()

    for name in names:
        model.get_submodule(name).register_forward_hook(lambda _, i, o, name=name: see(name, i, o))  # type: ignore[misc]
    with torch.no_grad():
        model(torch.zeros(1, input_channels(model), *height_width(imgsz)))
    return found


def read_geometry(model: nn.Module, table: LayerTable, imgsz: ImageSize) -> NetworkGeometry:
    """The geometry of `model` (unpruned, as `table` was built from) on images of this size; it is not touched."""
    group_of_class = np.full(table.class_count, FIXED)
    for group in table.groups:
        for part in group.parts:
            group_of_class[part] = group.id

    def channels(classes: np.ndarray) -> Channels:
        ids, counts = np.unique(group_of_class[classes], return_counts=True)
        return tuple(zip(ids.tolist(), counts.tolist(), strict=True))

    branches = find_branches(model)
    own, counted = dict(model.named_parameters()), {*table.convs, *table.norms, *table.linears}
    seen = positions(model, [*table.convs, *table.norms], imgsz)
    nowhere = Positions()
    stats = model_stats(model, imgsz)
    convs = []
    for name, known in table.convs.items():
        place: Any = model.get_submodule(name)
        at = seen.get(name, nowhere)
        convs.append(
            ConvGeometry(
                name=name,
                outputs=channels(known.outputs),
                inputs=channels(known.inputs),
                area=int(np.prod(place.kernel_size)),
                weight_uses=at.read if isinstance(place, nn.ConvTranspose2d) else at.written,
                in_pixels=at.read,
                out_pixels=at.written,
                conv_groups=place.groups,
                depthwise=known.depthwise,
                bias=place.bias is not None,
            )
        )
    return NetworkGeometry(
        imgsz=imgsz,
        params=round(stats.params_m * 1e6),
        gflops=stats.gflops,
        groups=tuple(GroupGeometry(g.name, g.layers, g.channels) for g in table.groups),
        convs=tuple(convs),
        norms=tuple(NormGeometry(channels(c), seen.get(n, nowhere).written, n) for n, c in table.norms.items()),
        linears=tuple(
            LinearGeometry(channels(c), channels(table.features[n]), model.get_submodule(n).bias is not None, n)
            for n, c in table.linears.items()
        ),
        vectors=tuple(
            channels(c) for n, (_, c) in table.vectors.items() if n in own and n.rpartition(".")[0] not in counted
        ),
        branches=tuple(b.name for b in branches.by_name.values() if b.removable),
        merges=tuple(_merges(branches, table, channels)),
    )


def _merges(
    branches: Branches, table: LayerTable, channels: Callable[[np.ndarray], Channels]
) -> Iterator[MergeGeometry]:
    """What the convolution that closes a block reads less without its branches."""
    for chain in branches.chains:
        for _, members in chain.entries if chain.closing else ():
            last = members[-1]
            if not all(branch.removable for branch in members) or (last.residual and not chain.listed):
                continue
            given = channels(table.convs[_within(table, last.contributions[-1])[-1]].outputs)
            if not chain.listed:  # then it reads what the unit has read
                read = channels(table.convs[_within(table, last.name)[0]].inputs)
                given += tuple((group, -count) for group, count in read)
            yield MergeGeometry(tuple(branch.name for branch in members), chain.closing, given)


def _within(table: LayerTable, module: str) -> list[str]:
    """A module's convolutions, in execution order."""
    return [name for name in table.convs if name == module or name.startswith(f"{module}.")]
