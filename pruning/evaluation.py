"""Accuracy of an in-memory network, by Ultralytics' own validator of the task."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pruning.checkpoints import plain_copy, task_of
from pruning.errors import NonFiniteError, PruningError
from pruning.evaluation_dataset import check_dataset, dataset_file
from pruning.evaluation_gate import Gate, GatedLoader, NullGate, device_finisher, torch_device
from pruning.evaluation_noise import ImageStats, image_stats
from pruning.quiet import quiet_ultralytics

__all__ = ["EVALUATION_BATCH", "Evaluator", "check_dataset", "evaluate"]

EVALUATION_BATCH = 16
"""Images per batch when nothing else is said; rectangular batches make the figures depend on it a little."""

_SUFFIX = {"detect": "B", "obb": "B", "segment": "M", "pose": "P"}
_METRICS = {"map50_95": "mAP50-95", "map50": "mAP50", "precision": "precision", "recall": "recall"}


def evaluate(
    model: nn.Module,
    data: str,
    imgsz: int,
    device: str,
    batch: int = EVALUATION_BATCH,
    split: str = "val",
    gate: Gate | None = None,
) -> dict[str, float]:
    """The accuracy of `model` on a split of `data`: what stock `YOLO(path).val(data=, imgsz=, batch=)` prints.

    Rectangular batches (`rect=True`), as stock `val` takes: square ones differ by one or two hundredths of mAP. Full
    precision. The model is copied (validation fuses layers) and left as it is; nothing is printed, plotted or left on
    disk but Ultralytics' label cache beside the labels.

    Returns `map50_95`, `map50`, `precision`, `recall`, each in [0, 1], of the task's own target (boxes for detect and
    obb, masks for segment, keypoints for pose); segment and pose have the boxes' four too, as `box_map50_95` ...
    Raises PruningError for a task without mAP, for weights that are not finite and for data that is not there.
    """
    evaluator = Evaluator(data, imgsz, device, batch, split, gate)
    try:
        return evaluator.run(model)
    finally:
        evaluator.close()


class Evaluator:
    """`evaluate` for many models on the same data: the data loader is built once and kept."""

    def __init__(
        self,
        data: str,
        imgsz: int,
        device: str,
        batch: int = EVALUATION_BATCH,
        split: str = "val",
        gate: Gate | None = None,
        workers: int = 4,
    ) -> None:
        self._args = {"data": str(dataset_file(data)), "imgsz": imgsz, "device": device, "batch": batch, "split": split}
        self._args["workers"] = workers
        self._gate = gate or NullGate()
        self._finish = device_finisher(torch_device(device))
        self._loader: GatedLoader | None = None
        self._seen: dict[str, Any] = {}

    def run_by_image(self, model: nn.Module) -> tuple[dict[str, float], ImageStats]:
        """`run`, and what it saw image by image."""
        metrics = self.run(model)
        return metrics, image_stats(self._seen, _SUFFIX[task_of(model)])

    def run(self, model: nn.Module) -> dict[str, float]:
        """The metrics of `model`; see `evaluate`."""
        task = task_of(model)
        if task not in _SUFFIX:
            raise PruningError(
                f"accuracy is mAP, for models that detect; got task '{task}': use one of {sorted(_SUFFIX)}"
            )
        refuse_non_finite(model)
        with quiet_ultralytics(), tempfile.TemporaryDirectory(prefix="paretoprune-val-") as scratch:
            validator = _validator_class(task, self._wrap, self._see)(
                dataloader=self._loader, save_dir=Path(scratch), args=self._validator_args(task)
            )
            try:
                stats = validator(model=plain_copy(model))
            finally:
                self.release()
        return named_metrics(stats, task)

    def _validator_args(self, task: str) -> dict[str, Any]:
        silent = {"plots": False, "verbose": False, "save_json": False, "save_txt": False}
        # val=False: otherwise a val2017 list turns save_json on and asks for COCO's own tools
        return {**self._args, **silent, "task": task, "mode": "val", "rect": True, "val": False}

    def _wrap(self, loader: Any) -> GatedLoader:
        self._loader = GatedLoader(loader, self._gate, self._finish)
        return self._loader

    def _see(self, stats: dict[str, Any]) -> None:
        self._seen = {name: list(values) for name, values in stats.items()}

    def release(self) -> None:
        """Give the gate back; a batch that failed would otherwise keep it."""
        if self._loader is not None:
            self._loader.release()

    def close(self) -> None:
        """End the data loader's workers."""
        if self._loader is not None:
            self._loader.release()
            self._loader.close()
            self._loader = None


def _validator_class(task: str, wrap: Callable[[Any], GatedLoader], see: Callable[[dict[str, Any]], None]) -> type[Any]:
    """The task's validator, handing every loader it builds to `wrap` and its lists of one item an image to `see`."""
    from ultralytics.models import yolo

    base: Any = {
        "detect": yolo.detect.DetectionValidator,
        "segment": yolo.segment.SegmentationValidator,
        "pose": yolo.pose.PoseValidator,
        "obb": yolo.obb.OBBValidator,
    }[task]

    def get_dataloader(self: Any, dataset_path: str, batch_size: int) -> GatedLoader:
        return wrap(base.get_dataloader(self, dataset_path, batch_size))

    def get_stats(self: Any) -> Any:
        see(self.metrics.stats)  # the base class joins and forgets them
        return base.get_stats(self)

    return type(base.__name__, (base,), {"get_dataloader": get_dataloader, "get_stats": get_stats})


def named_metrics(stats: dict[str, Any], task: str) -> dict[str, float]:
    """Ultralytics' validation figures under this project's names; NaN or infinity raises PruningError."""
    named = {ours: float(stats[f"metrics/{theirs}({_SUFFIX[task]})"]) for ours, theirs in _METRICS.items()}
    if _SUFFIX[task] != "B":
        named |= {f"box_{ours}": float(stats[f"metrics/{theirs}(B)"]) for ours, theirs in _METRICS.items()}
    for name, value in named.items():
        if not math.isfinite(value):
            raise PruningError(f"an accuracy must be a finite number, but validation gave {name} = {value}")
    return named


def refuse_non_finite(model: nn.Module, where: str = "") -> None:
    """Raise NonFiniteError naming the first weight or statistic of `model` that holds NaN or infinity."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(
                f"the model's weights must be finite{where}, but got NaN or infinity in {name}; "
                "use a lower learning rate, or another checkpoint"
            )
