"""Outputs of every kind of head, and their divergence written down anew with torch's own distributions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributions import Bernoulli, Categorical, Distribution, Normal, kl_divergence
from ultralytics.nn.tasks import (
    ClassificationModel,
    DetectionModel,
    OBBModel,
    PoseModel,
    SegmentationModel,
    SemanticSegmentationModel,
)
from ultralytics.nn.tasks import RTDETRDetectionModel as RTDETR

from paretoprune.pruning.yolo.output_distribution import raw_outputs


def bernoulli(z: torch.Tensor) -> Distribution:
    return Bernoulli(logits=z)


def normal(z: torch.Tensor, sd: float = 1.0) -> Distribution:
    return Normal(z, sd)


def reach_of(raw: Mapping[str, Any]) -> torch.Tensor:
    return raw["scores"].sigmoid().amax(1)  # (N, A)


def anchors(before: Mapping[str, Any], after: Mapping[str, Any], cells: float) -> torch.Tensor:
    """KL of all that one set of anchors says, written down anew with torch's own distributions."""
    reach = reach_of(before)
    total = kl_divergence(bernoulli(before["scores"]), bernoulli(after["scores"])).sum()
    sides = [part["boxes"].unflatten(1, (4, -1)).transpose(2, 3) for part in (before, after)]  # (N, 4, A, bins)
    kind = normal if sides[0].shape[-1] == 1 else lambda z: Categorical(logits=z)
    apart = kl_divergence(kind(sides[0]), kind(sides[1])).reshape(len(reach), 4, -1)
    total = total + (reach[:, None] * apart).sum()
    if "angle" in before:
        total = total + (reach[:, None] * kl_divergence(normal(before["angle"]), normal(after["angle"]))).sum()
    if "kpts" in before:
        points = [part["kpts"].unflatten(1, (17, 3)) for part in (before, after)]
        share = reach[:, None] / 17
        places = kl_divergence(normal(cells * points[0][:, :, :2]), normal(cells * points[1][:, :, :2])).sum(2)
        seen = kl_divergence(bernoulli(points[0][:, :, 2]), bernoulli(points[1][:, :, 2]))
        total = total + (share * (places + seen)).sum()
    if "mask_coefficient" in before:
        masks = [torch.einsum("nca,nchw->nahw", part["mask_coefficient"], part["proto"]) for part in (before, after)]
        total = total + (reach * kl_divergence(bernoulli(masks[0]), bernoulli(masks[1])).mean((2, 3))).sum()
    return total


def detections(before: Any, after: Any, cells: float = 2.0) -> torch.Tensor:
    names = [name for name in ("one2many", "one2one") if name in before]
    pairs = [(before[name], after[name]) for name in names] or [(before, after)]
    return torch.stack([anchors(*pair, cells) for pair in pairs]).sum()


def classes(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    return kl_divergence(*(Categorical(logits=z.movedim(1, -1)) for z in (before, after))).sum()


def queries(before: Any, after: Any) -> torch.Tensor:
    reach = before["scores"].sigmoid().amax(-1, keepdim=True)
    sides = kl_divergence(normal(before["boxes"]), normal(after["boxes"]))
    scores = [kl_divergence(bernoulli(before[i]), bernoulli(after[i])).sum() for i in ("scores", "encoder")]
    return sum(scores) + (reach * sides).sum()


def tensors(raw: Any, name: str = "") -> dict[str, torch.Tensor]:
    """The float tensors of raw outputs by place, but for the feature maps that lie beside them."""
    if isinstance(raw, torch.Tensor):
        return {name: raw} if raw.is_floating_point() else {}
    items = raw.items() if isinstance(raw, Mapping) else enumerate(raw) if isinstance(raw, (tuple, list)) else ()
    found: dict[str, torch.Tensor] = {}
    for key, value in items:
        if key != "feats":
            found.update(tensors(value, f"{name}.{key}"))
    return found


def replaced(raw: Any, values: Mapping[str, torch.Tensor], name: str = "") -> Any:
    if isinstance(raw, torch.Tensor):
        return values.get(name, raw)
    if isinstance(raw, Mapping):
        return {key: replaced(value, values, f"{name}.{key}") for key, value in raw.items()}
    if isinstance(raw, (tuple, list)):
        return tuple(replaced(value, values, f"{name}.{key}") for key, value in enumerate(raw))
    return raw


CASES: dict[str, tuple[type[Any], str, Callable[..., torch.Tensor]]] = {
    "boxes with bins": (DetectionModel, "yolov8n.yaml", detections),
    "one-to-one with bins": (DetectionModel, "yolov10n.yaml", detections),
    "without bins": (DetectionModel, "yolo26n.yaml", detections),
    "masks": (SegmentationModel, "yolov8n-seg.yaml", detections),
    "keypoints": (PoseModel, "yolov8n-pose.yaml", detections),
    "keypoints of yolo26": (PoseModel, "yolo26n-pose.yaml", lambda a, b: detections(a, b, 1.0)),
    "angles": (OBBModel, "yolo11n-obb.yaml", detections),
    "classes": (ClassificationModel, "yolov8n-cls.yaml", classes),
    "a class of each pixel": (SemanticSegmentationModel, "yolo26n-sem.yaml", classes),
    "queries": (RTDETR, "rtdetr-l.yaml", queries),
}


def drawn_outputs(case: str) -> tuple[nn.Module, Any, dict[str, torch.Tensor]]:
    """A network of the case, its raw outputs for two images of 64 px, and values drawn in their place by name.

    Fresh networks say nothing of interest: logits with some spread.
    """
    kind, yaml, _ = CASES[case]
    torch.manual_seed(0)
    model = kind(yaml, verbose=False).eval()
    with torch.no_grad():
        raw = raw_outputs(model, torch.rand(2, 3, 64, 64))
    drawn = {name: torch.randn(value.shape).double() for name, value in tensors(raw).items()}
    return model, raw, {n: z if "proto" in n or "coef" in n else 2 * z - 1 for n, z in drawn.items()}
