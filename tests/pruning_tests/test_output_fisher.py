"""The probe's expected square is the curvature of the outputs' divergence, for every kind of head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Distribution, Normal, kl_divergence
from ultralytics.nn.tasks import ClassificationModel, DetectionModel, OBBModel, PoseModel, SegmentationModel
from ultralytics.nn.tasks import RTDETRDetectionModel as RTDETR

from pruning.importance.output_fisher import output_probe

PROBES = 500  # the mean of so many squares is off by 6 % (one standard deviation)
CELL = 32


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
    return kl_divergence(Categorical(logits=before), Categorical(logits=after)).sum()


def queries(before: Any, after: Any, size: int = 64) -> torch.Tensor:
    reach = before[1].sigmoid().amax(-1, keepdim=True)
    sides = kl_divergence(normal(before[0], CELL / size), normal(after[0], CELL / size))
    scores = sum(kl_divergence(bernoulli(before[i]), bernoulli(after[i])).sum() for i in (1, 3))
    return scores + (reach * sides).sum()


class Fixed:
    """A network whose outputs are what it was given."""

    def __init__(self, head: Any, outputs: Any) -> None:
        self.model, self.outputs = [head], outputs

    def __call__(self, images: torch.Tensor) -> Any:
        return None, self.outputs


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
    "queries": (RTDETR, "rtdetr-l.yaml", queries),
}


@pytest.mark.parametrize("case", CASES)
def test_the_expected_square_is_the_curvature_of_the_divergence(case: str) -> None:
    kind, yaml, divergence = CASES[case]
    torch.manual_seed(0)
    model = kind(yaml, verbose=False).eval()
    with torch.no_grad():
        raw = model(torch.rand(2, 3, 64, 64))[1]
    leaves = {}
    for name, value in tensors(raw).items():  # fresh networks say nothing of interest: logits with some spread
        drawn = torch.randn(value.shape).double()
        leaves[name] = (drawn if "proto" in name or "coef" in name else 2 * drawn - 1).requires_grad_(True)
    outputs = replaced(raw, leaves)
    generator = torch.Generator().manual_seed(1)
    steps = {name: torch.randn(value.shape, dtype=torch.float64) for name, value in leaves.items()}
    squares = dict.fromkeys(leaves, 0.0)
    for _ in range(PROBES):
        probe = output_probe(Fixed(model.model[-1], outputs), torch.zeros(2, 3, 64, 64), generator)  # type: ignore[arg-type]
        for name, u in zip(leaves, torch.autograd.grad(probe, list(leaves.values()), allow_unused=True), strict=True):
            squares[name] += 0.0 if u is None else float((u * steps[name]).sum()) ** 2 / PROBES
    h, looked_at = 1e-3, 0
    for name, step in steps.items():
        with torch.no_grad():
            ends = [replaced(raw, {**leaves, name: leaves[name] + sign * h * step}) for sign in (-1, 1)]
            curvature = float(sum(divergence(outputs, end) for end in ends)) / h**2
        assert squares[name] == pytest.approx(curvature, rel=0.25, abs=1e-9), name
        looked_at += curvature > 0
    assert looked_at >= (1 if case == "classes" else 2)


def test_equal_seeds_give_equal_probes_and_images_do_not_touch_each_other() -> None:
    torch.manual_seed(0)
    model = DetectionModel("yolov8n.yaml", verbose=False).eval()
    images = torch.rand(2, 3, 64, 64).requires_grad_(True)
    probes = [output_probe(model, images, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*probes)
    (gradient,) = torch.autograd.grad(probes[0], images)
    assert float(gradient.abs().sum()) > 0


def test_a_head_of_another_kind_is_named() -> None:
    with pytest.raises(TypeError, match="raw outputs must be a mapping or logits, but Identity gives"):
        output_probe(Fixed(torch.nn.Identity(), [1]), torch.zeros(1, 3, 8, 8), torch.Generator())  # type: ignore[arg-type]
