"""Criteria that look at the gradient of the task's loss on labelled calibration images."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import nn
from ultralytics.cfg import get_cfg

from paretoprune.pruning.graph.layers import LayerTable
from paretoprune.pruning.importance.base import Evidence, criterion
from paretoprune.pruning.importance.sites import watch_outputs
from paretoprune.pruning.yolo.saving import task_of


@criterion("taylor", needs_data=True)
def taylor(evidence: Evidence) -> np.ndarray:
    """Squared first-order effect on the loss of switching a class off (Molchanov et al. 2019, arXiv:1906.10771).

    Every channel's response is thought multiplied by a gate of 1. The loss's derivative by the gate is the sum over
    positions of response x gradient, summed over all places of the class; squared per image and summed over images.
    """
    assert evidence.calibration is not None
    model = loss_model(evidence.model, evidence.device)
    classes = {n: torch.as_tensor(c.outputs, device=evidence.device) for n, c in evidence.table.convs.items()}
    total = torch.zeros(evidence.table.class_count, dtype=torch.float64, device=evidence.device)
    for batch in evidence.calibration.chunks(8):
        moved = {k: v.to(evidence.device) for k, v in batch.items()}
        gates = torch.zeros(len(moved["img"]), len(total), device=evidence.device)

        def see(name: str, output: torch.Tensor, gates: torch.Tensor = gates) -> None:
            value = output.detach()

            def add(grad: torch.Tensor) -> None:
                gates.index_add_(1, classes[name], (grad * value).sum((2, 3)))

            output.register_hook(add)

        with watch_outputs(model, evidence.table, see):
            loss, _ = model.loss(moved)
            loss.sum().backward()
        total += gates.double().square().sum(0)
        model.zero_grad(set_to_none=True)
    return total.cpu().numpy()


@criterion("hessian", needs_data=True)
def hessian(evidence: Evidence) -> np.ndarray:
    """Rise of the loss if a class's weights become zero, to second order with a diagonal Hessian.

    Optimal brain damage (LeCun, Denker and Solla 1989): 1/2 h w^2, summed over every weight that leaves with the class
    (output rows, batch norm's scale and shift, input columns behind it), with the empirical Fisher information, the
    mean over images of the squared gradient, in place of h.
    """
    assert evidence.calibration is not None
    model = loss_model(evidence.model, evidence.device)
    fisher = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    count = 0
    for batch in evidence.calibration.chunks(1):  # the square of each image's gradient, not of their sum's
        loss, _ = model.loss({k: v.to(evidence.device) for k, v in batch.items()})
        loss.sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                fisher[name] += parameter.grad.square()
        model.zero_grad(set_to_none=True)
        count += 1
    weights = dict(model.named_parameters())
    rises = {n: 0.5 * weights[n].detach().square() * f / count for n, f in fisher.items()}
    return leaving(rises, model, evidence.table)


def leaving(values: dict[str, torch.Tensor], model: nn.Module, table: LayerTable) -> np.ndarray:
    """Sum a value per parameter over all parameters that leave with a class, shape (class_count,).

    Args:
        values: by parameter name, of the parameter's shape.
    """
    total = np.zeros(table.class_count)

    def add(classes: np.ndarray, parameter: torch.Tensor | None, dim: int) -> None:
        if parameter is not None:
            rows = parameter.transpose(0, dim).flatten(1) if parameter.ndim > 1 else parameter[:, None]
            np.add.at(total, classes, rows.double().sum(1).cpu().numpy())

    for name, channels in table.convs.items():
        turned = isinstance(model.get_submodule(name), nn.ConvTranspose2d)  # its weight is (in, out, height, width)
        add(channels.outputs, values[f"{name}.weight"], int(turned))
        add(channels.outputs, values.get(f"{name}.bias"), 0)
        if not channels.depthwise and values[f"{name}.weight"].shape[1 - turned] == len(channels.inputs):
            add(channels.inputs, values[f"{name}.weight"], 1 - turned)
    for name, classes in table.norms.items():
        add(classes, values.get(f"{name}.weight"), 0)
        add(classes, values.get(f"{name}.bias"), 0)
    for name, classes in table.linears.items():
        add(classes, values[f"{name}.weight"], 1)
        add(table.features[name], values[f"{name}.weight"], 0)
        add(table.features[name], values.get(f"{name}.bias"), 0)
    for name, (dim, classes) in table.vectors.items():
        if name.rpartition(".")[0] not in {*table.convs, *table.norms, *table.linears}:
            add(classes, values.get(name), dim)
    return total


def loss_model(model: nn.Module, device: str) -> Any:
    """A copy in eval mode (batch statistics frozen) that can compute its task's loss and the responses' gradients."""
    copied: Any = copy.deepcopy(model).to(device).eval()
    copied.criterion = None
    if not hasattr(copied, "nc"):  # RT-DETR's loss asks the model for it, which only its trainer sets
        copied.nc = getattr(copied.model[-1], "nc", None)
    copied.args = get_cfg(overrides={"task": task_of(model)})
    for module in copied.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # an in-place activation would overwrite what the gradient hook reads
    for parameter in copied.parameters():
        parameter.requires_grad_(True)
    return copied
