"""Losses of branches against their definition, computed in another way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paretoprune.pruning.graph.branches import find_branches
from paretoprune.pruning.importance import Evidence
from paretoprune.pruning.importance.branch_losses import branch_losses
from paretoprune.pruning.importance.output_fisher import output_probe
from paretoprune.pruning.surgery.layer_table import build_layer_table
from tests.pruning.tiny import tiny_calibration, tiny_model

NAME = "model.2.m.0"


def evidence(root: Path, model: Any) -> Evidence:
    return Evidence(model, build_layer_table(model), tiny_calibration(root, model, 6))


def test_the_loss_is_what_readers_cannot_take_over(tmp_path: Path) -> None:
    model: Any = tiny_model()
    known = evidence(tmp_path, model)
    seen: dict[str, Any] = {}

    def see(_: Any, inputs: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        seen.update(x=inputs[0], y=output)

    model.get_submodule(NAME).register_forward_hook(see)
    images = known.calibration.images  # type: ignore[union-attr]
    output_probe(model, images, torch.Generator().manual_seed(0)).backward()
    x, y, g = (
        t.detach().permute(0, 2, 3, 1).reshape(-1, t.shape[1]).double().numpy()
        for t in (seen["x"], seen["y"], seen["y"].grad)
    )
    with_one = np.hstack([x, np.ones((len(x), 1))])
    best = np.linalg.lstsq(with_one, y - x, rcond=None)[0]
    expected = 0.5 * ((g * (y - x - with_one @ best)).sum(1) ** 2).sum() / len(images)
    found = branch_losses(known, find_branches(model))[NAME]
    assert found == pytest.approx(expected, rel=0.1)  # but for the ridge, and degrees of freedom


def test_a_branch_that_adds_nothing_or_something_linear_costs_nothing(tmp_path: Path) -> None:
    model: Any = tiny_model()
    unit = model.get_submodule(NAME)
    known = evidence(tmp_path, model)
    whole = branch_losses(known, find_branches(model))[NAME]
    for conv in (unit.cv1, unit.cv2):
        conv.act = torch.nn.Identity()
        with torch.no_grad():
            conv.conv.weight[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = (
                0  # a position sees itself alone
            )
    assert branch_losses(known, find_branches(model))[NAME] < 1e-2 * whole
