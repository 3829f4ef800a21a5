"""What a network is for: which of Ultralytics' trainers, validators and datasets it needs, and its accuracy's name."""

from __future__ import annotations

from typing import Any

from torch import nn

from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.yolo.saving import task_of

KINDS = ("detect", "segment", "pose", "obb", "classify", "rtdetr")

_SUFFIX = {"detect": "B", "rtdetr": "B", "obb": "B", "segment": "M", "pose": "P"}
_TARGET = {"segment": "mask", "pose": "pose"}
_AVERAGES = {"map50_95": "mAP50-95", "map50": "mAP50", "precision": "precision", "recall": "recall"}
_TOP = {"top1": "accuracy_top1", "top5": "accuracy_top5"}


def kind_of(model: nn.Module) -> str:
    """One of `KINDS`: the model's task, but RT-DETR, whose task is detection, has its own trainer and validator.

    Raises PruningError for a task that is neither trained nor validated here.
    """
    from ultralytics.nn.tasks import RTDETRDetectionModel

    kind = "rtdetr" if isinstance(model, RTDETRDetectionModel) else task_of(model)
    if kind not in KINDS:
        raise PruningError(
            f"training and validation are for {', '.join(KINDS)}, but got a model of task '{kind}': only its surgery "
            "works here"
        )
    return kind


def accuracy_name(kind: str) -> str:
    """The metric that says how good a network of this kind is: `top1` of a classifier, `map50_95` of the others."""
    return "top1" if kind == "classify" else "map50_95"


def suffix_of(kind: str) -> str:
    """What Ultralytics marks the figures of a kind's own target with: B(oxes), M(asks) or P(oses)."""
    return _SUFFIX[kind]


def metric_keys(kind: str) -> dict[str, str]:
    """Our metric names -> the keys of Ultralytics' validation figures, the kind's own target first.

    Segment and pose have the figures of masks and keypoints under the plain names, the two mAPs of them also with
    `_mask` or `_pose`, so that a run can say which is meant; the boxes' figures end in `_box`.
    """
    if kind == "classify":
        return {name: f"metrics/{theirs}" for name, theirs in _TOP.items()}
    named = {name: f"metrics/{theirs}({_SUFFIX[kind]})" for name, theirs in _AVERAGES.items()}
    if kind in _TARGET:
        own = {f"{name}_{_TARGET[kind]}": key for name, key in named.items() if name.startswith("map")}
        boxes = {f"{name}_box": f"metrics/{theirs}(B)" for name, theirs in _AVERAGES.items()}
        return {**named, **own, **boxes}
    return named


def validator_of(kind: str) -> type[Any]:
    """Ultralytics' validator of a kind."""
    from ultralytics.models import rtdetr, yolo

    return {
        "detect": yolo.detect.DetectionValidator,
        "segment": yolo.segment.SegmentationValidator,
        "pose": yolo.pose.PoseValidator,
        "obb": yolo.obb.OBBValidator,
        "classify": yolo.classify.ClassificationValidator,
        "rtdetr": rtdetr.RTDETRValidator,
    }[kind]


def predictor_of(kind: str) -> type[Any]:
    """Ultralytics' predictor of a kind."""
    from ultralytics.models import rtdetr, yolo

    return {
        "detect": yolo.detect.DetectionPredictor,
        "segment": yolo.segment.SegmentationPredictor,
        "pose": yolo.pose.PosePredictor,
        "obb": yolo.obb.OBBPredictor,
        "classify": yolo.classify.ClassificationPredictor,
        "rtdetr": rtdetr.RTDETRPredictor,
    }[kind]


def trainer_of(kind: str) -> type[Any]:
    """Ultralytics' trainer of a kind."""
    from ultralytics.models import yolo
    from ultralytics.models.rtdetr.train import RTDETRTrainer

    return {
        "detect": yolo.detect.DetectionTrainer,
        "segment": yolo.segment.SegmentationTrainer,
        "pose": yolo.pose.PoseTrainer,
        "obb": yolo.obb.OBBTrainer,
        "classify": yolo.classify.ClassificationTrainer,
        "rtdetr": RTDETRTrainer,
    }[kind]


def is_single_class(model: nn.Module) -> bool:
    """Whether `model` was trained with all classes taken as one (`single_cls`)."""
    args = getattr(model, "args", None)
    return bool(args.get("single_cls") if isinstance(args, dict) else getattr(args, "single_cls", False))
