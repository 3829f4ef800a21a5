"""A detector of a few thousand weights that has what the big ones have: a chunk, a residual sum, two scales, a head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.nn.tasks import DetectionModel

from paretoprune.pruning.data.calibration import Calibration, load_calibration
from tests.pruning.masking import randomise_batch_norm, tensors
from tests.pruning.recovery_material import shapes_dataset

_YAML: dict[str, Any] = {
    "nc": 3,
    "backbone": [
        [-1, 1, "Conv", [8, 3, 2]],
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "C2f", [16, True]],
        [-1, 1, "Conv", [24, 3, 2]],
    ],
    "head": [[[2, 3], 1, "Detect", ["nc"]]],
}


class SmoothLoss(DetectionModel):
    """The detector with a loss that has no assignment in it, so that finite differences are its derivative."""

    def loss(self, batch: dict[str, Any], preds: Any = None) -> tuple[torch.Tensor, None]:
        return sum(t.square().mean() for t in tensors(self(batch["img"]))), None  # type: ignore[return-value]


def tiny_model(kind: type[DetectionModel] = DetectionModel) -> nn.Module:
    torch.manual_seed(0)
    model = kind(cfg=_YAML | {"yaml_file": "tiny.yaml"}, nc=3, verbose=False)
    model.names = dict(enumerate(("square", "disc", "bar")))
    randomise_batch_norm(model)
    return model.eval()


def tiny_calibration(root: Path, model: nn.Module, images: int = 6) -> Calibration:
    """Labelled images of 64 pixels with objects of three classes."""
    return load_calibration(str(shapes_dataset(root, train=images, val=1)), model, 64, images)
