"""Mask: the mistake that structural pruning is to be told from, kept as a control.

Zeros are written where channels would have been removed. The architecture stays: same parameters, same latency.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from paretoprune.pruning.graph.layers import LayerTable
from paretoprune.pruning.strategies.base import Outcome, Tune
from paretoprune.pruning.strategies.common import in_turn, left_whole, tuned
from paretoprune.pruning.surgery.surgery import classes_from_kept, scaled
from paretoprune.pruning.workbench import Workbench
from paretoprune.pruning.yolo.saving import plain_copy


class Mask:
    """The channels that `structural` removes, set to zero instead.

    Recovery is computed on the network that really lost them and written back around the zeros: both compute the same
    function, so the control starts where `structural` starts and differs in the architecture alone.
    """

    name = "mask"
    exact = True

    @in_turn
    def run(
        self,
        bench: Workbench,
        ratios: Mapping[str, float],
        epochs: int,
        folder: Path,
        tune: Tune,
        recover: str = "refit",
    ) -> Outcome:
        """See `Strategy.run`."""
        pruned, plan = bench.prune(ratios)
        bench.recover(pruned, plan, recover)
        stays = classes_from_kept(bench.table, plan.kept)
        model = plain_copy(bench.model)
        embed(model, bench.table, stays, pruned)
        apply_mask(model, bench.table, stays)
        model = plain_copy(tuned(bench, tune, model, epochs, folder / "tune"))
        # Training revives what was zeroed: a zero scale and shift get gradients as any others do, since the layers
        # behind still read the channel. Without this the control would end as an ordinary unpruned network.
        apply_mask(model, bench.table, stays)
        skipped = left_whole(bench.table, ratios, plan.ratios)
        return Outcome(self.name, model, plan, tuple(plan.ratios), skipped, epochs)


@torch.no_grad()
def apply_mask(model: nn.Module, table: LayerTable, stays: np.ndarray) -> None:
    """Zero, in place, the rows of convolutions and the scales and shifts of batch norms of classes that do not stay.

    Args:
        stays: bool, shape (class_count,).
    """
    for name, channels in table.convs.items():
        conv: Any = model.get_submodule(name)
        gone = torch.from_numpy(np.flatnonzero(~stays[channels.outputs])).to(conv.weight.device)
        conv.weight.index_fill_(1 if conv.transposed else 0, gone, 0.0)
        if conv.bias is not None:
            conv.bias.index_fill_(0, gone, 0.0)
    for name, classes in table.norms.items():
        norm: Any = model.get_submodule(name)
        gone = torch.from_numpy(np.flatnonzero(~stays[classes])).to(norm.weight.device)
        norm.weight.index_fill_(0, gone, 0.0)
        norm.bias.index_fill_(0, gone, 0.0)


@torch.no_grad()
def embed(model: nn.Module, table: LayerTable, stays: np.ndarray, pruned: nn.Module) -> None:
    """Write the pruned network's weights, in place, over those of the unpruned model that they were cut from."""

    def kept(classes: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.flatnonzero(stays[classes]))

    for name, channels in table.convs.items():
        conv: Any = model.get_submodule(name)
        narrow: Any = pruned.get_submodule(name)
        outputs = kept(channels.outputs)
        inputs = torch.arange(conv.weight.shape[1]) if channels.depthwise else kept(channels.inputs)
        rows, columns = (inputs, outputs) if conv.transposed else (outputs, inputs)
        conv.weight[rows[:, None], columns] = narrow.weight
        if conv.bias is not None:
            conv.bias[outputs] = narrow.bias
    for name, classes in table.norms.items():
        norm: Any = model.get_submodule(name)
        for part in ("weight", "bias", "running_mean", "running_var"):
            getattr(norm, part)[kept(classes)] = getattr(pruned.get_submodule(name), part)
    for name, classes in table.linears.items():
        linear: Any = model.get_submodule(name)
        rows, narrow = kept(table.features[name]), pruned.get_submodule(name)
        linear.weight[rows[:, None], kept(classes)] = narrow.weight
        if linear.bias is not None:
            linear.bias[rows] = narrow.bias
    for name, places, factor in scaled(table, stays):  # here what follows divides by what it always did
        scaled_module: Any = model.get_submodule(name)
        for tensor in (scaled_module.weight, scaled_module.bias):
            tensor[torch.from_numpy(places)] /= factor
    tensors, cut = tensors_of(model), tensors_of(pruned)
    for name, (dim, classes) in table.vectors.items():
        tensors[name].index_copy_(dim, kept(classes), cut[name])


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
