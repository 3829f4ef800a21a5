"""What every channel answers at every labelled object of the calibration images."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pruning.importance.base import Evidence
from pruning.importance.sites import watch_outputs

_CHUNK = 8  # images per forward pass


@dataclass(frozen=True)
class ObjectResponses:
    """Responses behind batch norm and activation, averaged over the cells that an object's box touches.

    Attributes:
        labels: the objects' classes, int, shape (objects,).
        responses: by convolution, float64, shape (objects, out channels); only convolutions that eval mode reaches.
    """

    labels: np.ndarray
    responses: dict[str, np.ndarray]


@dataclass(frozen=True)
class _Boxes:
    """Objects of one batch: image index (n,), class (n,), box as normalised (left, top, right, bottom) (n, 4)."""

    image: np.ndarray
    label: np.ndarray
    corners: np.ndarray


def responses_at_objects(evidence: Evidence) -> ObjectResponses:
    """Run the network over the calibration images once. An image without a box adds nothing, unless none has one."""
    assert evidence.calibration is not None
    model = copy.deepcopy(evidence.model).to(evidence.device).eval()
    batches = list(evidence.calibration.chunks(_CHUNK))
    labelled = any(len(batch.get("bboxes", ())) for batch in batches)
    labels: list[np.ndarray] = []
    found: dict[str, list[np.ndarray]] = {}
    with torch.no_grad():
        for batch in batches:
            boxes = _boxes(batch, labelled)
            labels.append(boxes.label)
            for name, responses in _batch_responses(model, evidence, batch, boxes).items():
                found.setdefault(name, []).append(responses)
    return ObjectResponses(np.concatenate(labels), {n: np.concatenate(parts) for n, parts in found.items()})


def _batch_responses(model: Any, evidence: Evidence, batch: dict[str, Any], boxes: _Boxes) -> dict[str, np.ndarray]:
    sums: dict[str, torch.Tensor] = {}
    calls: dict[str, int] = {}

    def see(name: str, output: torch.Tensor) -> None:
        cells = [_touched(corners, output.shape[3], output.shape[2]) for corners in boxes.corners]
        rows = [output[i, :, y, x].mean((1, 2)) for i, (x, y) in zip(boxes.image, cells, strict=True)]
        if rows:
            sums[name] = sums.get(name, 0) + torch.stack(rows).double()
            calls[name] = calls.get(name, 0) + 1

    with watch_outputs(model, evidence.table, see):
        model(batch["img"].to(evidence.device))
    return {name: (total / calls[name]).cpu().numpy() for name, total in sums.items()}


def _boxes(batch: dict[str, Any], labelled: bool) -> _Boxes:
    """A batch's boxes; the whole image is the object where images have a class only, or nothing is labelled."""
    images = len(batch["img"])
    if not labelled:
        label = batch["cls"].flatten() if len(batch.get("cls", ())) == images else torch.zeros(images)
        return _Boxes(np.arange(images), label.long().numpy(), np.tile([0.0, 0.0, 1.0, 1.0], (images, 1)))
    box = batch["bboxes"][:, :4].double().numpy()  # centre x, centre y, width, height; a rotated box is taken upright
    corners = np.concatenate([box[:, :2] - box[:, 2:] / 2, box[:, :2] + box[:, 2:] / 2], axis=1)
    return _Boxes(batch["batch_idx"].long().numpy(), batch["cls"].flatten().long().numpy(), corners)


def _touched(corners: np.ndarray, columns: int, rows: int) -> tuple[slice, slice]:
    """The cells of a (rows, columns) map that a box touches, at least one: slices of x and y."""
    left, top, right, bottom = corners.tolist()
    return _span(left * columns, right * columns, columns), _span(top * rows, bottom * rows, rows)


def _span(low: float, high: float, cells: int) -> slice:
    first = min(max(math.floor(low), 0), cells - 1)
    return slice(first, min(max(math.ceil(high), first + 1), cells))
