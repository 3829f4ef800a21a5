"""The same removal as ours, done the way torch-pruning does it: its dependency graph, built for every plan.

Its tracing needs help with today's models: a forward pass in eval mode that ends before the head decodes, and a C2f
whose first convolution is written as two, since it cannot follow `chunk`. The halves are joined again afterwards, so
the result is the stock network. Serves the families whose only cut is C2f's.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch import nn
from ultralytics.nn.modules.block import C2f

from paretoprune.pruning.graph.layers import LayerTable

FAMILIES = ("yolov5n", "yolov6n", "yolov8n", "yolov8s")


class Undecoded(nn.Module):
    """A detector up to its head's last convolutions."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        seen: list[Any] = []
        current: Any = image
        *body, head = self.detector.model
        for block in body:
            current = block(_inputs(block, seen, current))
            seen.append(current)
        maps = _inputs(head, seen, current)
        return [tower[i](x) for i, x in enumerate(maps) for tower in (head.cv2, head.cv3)]


def _inputs(block: Any, seen: list[Any], current: Any) -> Any:
    if isinstance(block.f, int):
        return current if block.f == -1 else seen[block.f]
    return [current if k == -1 else seen[k] for k in block.f]


@dataclass(frozen=True)
class Root:
    """A convolution whose output channels are the given classes of the layer table, in order."""

    name: str
    classes: np.ndarray


def remove_by_graph(
    model: nn.Module, table: LayerTable, kept: Mapping[str, tuple[int, ...]], pixels: int = 64
) -> nn.Module:
    """A pruned copy with the channels of `kept` (see `Plan.kept`), through a dependency graph built for this call.

    Args:
        pixels: side of the square image that the graph is traced with, a multiple of the largest stride.
    """
    pruned = copy.deepcopy(model).eval()
    roots = _split_chunks(pruned, table)
    wrapped = Undecoded(pruned)
    graph = tp.DependencyGraph().build_dependency(wrapped, example_inputs=torch.rand(1, 3, pixels, pixels))
    stays = _stays(table, kept)
    for group in table.groups:
        for part in group.parts:
            root = next(r for r in roots if set(r.classes.tolist()) == set(part.tolist()))
            gone = np.flatnonzero(~stays[root.classes]).tolist()
            if gone:
                conv = pruned.get_submodule(root.name)
                graph.get_pruning_group(conv, tp.prune_conv_out_channels, idxs=gone).prune()
    _join_chunks(pruned)
    return pruned


def _stays(table: LayerTable, kept: Mapping[str, tuple[int, ...]]) -> np.ndarray:
    stays = np.ones(table.class_count, dtype=bool)
    for name, indices in kept.items():
        stays[np.delete(table.convs[name].outputs, indices)] = False
    return stays


def _split_chunks(model: nn.Module, table: LayerTable) -> list[Root]:
    """Write the convolution before each chunk as two; returns every convolution with its classes."""
    roots = [Root(n, c.outputs) for n, c in table.convs.items() if not c.depthwise]
    for name, block in list(model.named_modules()):
        if not isinstance(block, C2f):
            continue
        for half in (0, 1):
            setattr(block, f"half{half}", _half(block.cv1, half))
            outputs = table.convs[f"{name}.cv1.conv"].outputs
            roots.append(Root(f"{name}.half{half}.conv", np.split(outputs, 2)[half]))
        del block.cv1
        block.forward = types.MethodType(_forward_of_halves, block)  # type: ignore[method-assign]
    return [r for r in roots if _has(model, r.name)]


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _half(conv: Any, half: int) -> nn.Module:
    part: Any = copy.deepcopy(conv)
    other = range(part.conv.out_channels // 2)
    gone = [i + part.conv.out_channels // 2 * (1 - half) for i in other]
    tp.prune_conv_out_channels(part.conv, gone)
    tp.prune_batchnorm_out_channels(part.bn, gone)
    return part  # type: ignore[no-any-return]


def _forward_of_halves(self: Any, x: torch.Tensor) -> torch.Tensor:
    pieces = [self.half0(x), self.half1(x)]
    pieces.extend(m(pieces[-1]) for m in self.m)
    return self.cv2(torch.cat(pieces, 1))  # type: ignore[no-any-return]


def _join_chunks(model: nn.Module) -> None:
    for block in model.modules():
        if isinstance(block, C2f):
            one, two = block.half0, block.half1
            block.cv1 = _joined(one, two)
            block.c = one.conv.out_channels  # type: ignore[union-attr]
            del block.half0, block.half1, block.forward


def _joined(one: Any, two: Any) -> nn.Module:
    """One convolution from two halves, in place of the first."""
    one.conv.weight = nn.Parameter(torch.cat([one.conv.weight, two.conv.weight]).detach())
    one.conv.out_channels = one.bn.num_features = one.conv.weight.shape[0]
    for name in ("weight", "bias"):
        setattr(one.bn, name, nn.Parameter(torch.cat([getattr(one.bn, name), getattr(two.bn, name)]).detach()))
    for name in ("running_mean", "running_var"):
        setattr(one.bn, name, torch.cat([getattr(one.bn, name), getattr(two.bn, name)]))
    return one  # type: ignore[no-any-return]
