"""What removing a branch whole costs after a refit, on the scale of the channels' losses."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from paretoprune.pruning.graph.branches import Branches
from paretoprune.pruning.importance.base import Evidence
from paretoprune.pruning.importance.gradients import loss_model
from paretoprune.pruning.importance.output_fisher import output_probe

_CHUNK = 8  # images per pass
_POSITIONS = 4000  # sampled per branch, over all calibration images
_RIDGE = 1e-2  # relative to the mean variance of what the branch reads, as the refit's


@dataclass
class _Call:
    """One pass of a branch: what it read and gave, and the slope of the probe by what it gave."""

    name: str
    source: torch.Tensor
    given: torch.Tensor
    slope: torch.Tensor | None = None


def branch_losses(evidence: Evidence, branches: Branches) -> dict[str, float]:
    """Change of the network's answer if a branch leaves and its readers are refitted, second order, nats per image.

    What is left of it are linear functions of what it reads, which the readers' weights can take over. The rest r of
    what it contributed is missing: 1/2 sum over positions of (g' r)^2, where g is the slope of `output_probe` by what
    the branch gives, so that E[g g'] is the curvature of the outputs' divergence there. One probe an image; each
    branch alone, in the order of the network.
    """
    assert evidence.calibration is not None
    model = loss_model(evidence.model, evidence.device)
    generator, classes = torch.Generator().manual_seed(evidence.seed), evidence.classes()
    rng = np.random.default_rng(evidence.seed)
    removable = [branch for branch in branches.by_name.values() if branch.removable]
    share = max(1, _POSITIONS // len(evidence.calibration.images))
    samples: dict[str, list[tuple[torch.Tensor, ...]]] = {}
    positions: dict[str, int] = {}  # in an image
    calls: list[_Call] = []

    def see(name: str, _: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        call = _Call(name, inputs[0], output)
        calls.append(call)
        if output.requires_grad:
            output.register_hook(partial(setattr, call, "slope"))

    for branch in removable:
        model.get_submodule(branch.name).register_forward_hook(partial(see, branch.name))
    for batch in evidence.calibration.chunks(_CHUNK):
        images = batch["img"].to(evidence.device)
        output_probe(model, images, generator, classes).backward()
        model.zero_grad(set_to_none=True)
        for call in calls:
            if call.slope is None:
                continue
            rows = [_rows(tensor.detach()) for tensor in (call.source, call.given, call.slope)]
            count = len(rows[0])
            positions[call.name] = count // len(images)
            drawn = torch.from_numpy(rng.permutation(count)[: share * len(images)]).to(rows[0].device)
            samples.setdefault(call.name, []).append(tuple(seen[drawn].cpu() for seen in rows))
        calls.clear()
    found = {}
    for branch in removable:
        parts = [torch.cat(part).double() for part in zip(*samples.get(branch.name, []), strict=True)]
        rest = _unexplained(parts[0], parts[1] - parts[0] if branch.residual else parts[1]) if parts else None
        loss = 0.0 if rest is None else 0.5 * positions[branch.name] * (rest * parts[2]).sum(1).square().mean()
        found[branch.name] = float(loss)
    return found


def _rows(seen: torch.Tensor) -> torch.Tensor:
    """Channels by position: of a feature map (N, C, H, W), or of tokens (positions, N, C)."""
    return (seen.movedim(1, -1) if seen.ndim == 4 else seen).flatten(0, -2)


def _unexplained(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """What no linear function of x (positions, inputs) says of y (positions, outputs), of its expected size."""
    x, y = x - x.mean(0), y - y.mean(0)
    moments = x.T @ x / len(x)
    moments.diagonal().add_(_RIDGE * moments.diagonal().mean() + 1e-12)
    rest = y - x @ torch.linalg.solve(moments, x.T @ y / len(x))
    return rest * (len(x) / max(1, len(x) - x.shape[1])) ** 0.5  # fitted on the same positions
