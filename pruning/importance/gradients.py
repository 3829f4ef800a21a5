"""Criteria that look at the gradient of the task's loss on labelled calibration images."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import nn
from ultralytics.cfg import get_cfg

from pruning.importance.base import Evidence, criterion
from pruning.importance.sites import watch_outputs


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
            loss, _ = model.loss(moved)  # type: ignore[operator]
            loss.sum().backward()
        total += gates.double().square().sum(0)
        model.zero_grad(set_to_none=True)
    return total.cpu().numpy()


def loss_model(model: nn.Module, device: str) -> Any:
    """A copy in eval mode (batch statistics frozen) that can compute its task's loss and the responses' gradients."""
    copied: Any = copy.deepcopy(model).to(device).eval()
    copied.criterion = None
    copied.args = get_cfg(overrides={"task": getattr(model, "task", "detect")})
    for module in copied.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # an in-place activation would overwrite what the gradient hook reads
    for parameter in copied.parameters():
        parameter.requires_grad_(True)
    return copied
