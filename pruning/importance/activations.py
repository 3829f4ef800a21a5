"""Criteria that look at responses to calibration images."""

from __future__ import annotations

import copy

import numpy as np
import torch

from paretoprune.pruning.importance.base import Evidence, add_normalised, criterion
from paretoprune.pruning.importance.sites import watch_outputs


@criterion("activation", needs_data=True)
def activation(evidence: Evidence) -> np.ndarray:
    """Mean absolute response behind batch norm and activation (Molchanov et al. 2017, arXiv:1611.06440)."""
    assert evidence.calibration is not None
    model = copy.deepcopy(evidence.model).to(evidence.device).eval()
    sums: dict[str, np.ndarray] = {}

    def collect(name: str, output: torch.Tensor) -> None:
        sums[name] = sums.get(name, 0) + output.abs().mean((2, 3)).sum(0).double().cpu().numpy()

    with torch.no_grad(), watch_outputs(model, evidence.table, collect):
        for batch in evidence.calibration.chunks(16):
            model(batch["img"].to(evidence.device))
    total = np.zeros(evidence.table.class_count)
    for name, values in sums.items():
        add_normalised(total, evidence.table.convs[name].outputs, values)
    return total
