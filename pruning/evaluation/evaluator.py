"""Accuracy of an in-memory network, by Ultralytics' own validator of the task."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.utils import nms

from paretoprune.base.device_gate import Gate
from paretoprune.base.image_size import ImageSize, larger_side, plain_size
from paretoprune.pruning.data.dataset import check_dataset, dataset_file
from paretoprune.pruning.data.reading import read_dataset
from paretoprune.pruning.device import GatedLoader, NullGate, device_synchronizer, gated_dataset, torch_device
from paretoprune.pruning.errors import NonFiniteError, PruningError
from paretoprune.pruning.evaluation.bootstrap import ImageStats, image_stats
from paretoprune.pruning.latency.runtimes.autobackend import tuned_backend
from paretoprune.pruning.yolo.saving import plain_copy, task_of
from paretoprune.pruning.yolo.tasks import is_single_class, kind_of, metric_keys, suffix_of, validator_of
from paretoprune.pruning.yolo.ultralytics_logging import quiet_ultralytics

__all__ = ["EVALUATION_BATCH", "Evaluator", "check_dataset", "evaluate"]

EVALUATION_BATCH = 16
"""Images per batch when nothing else is said; rectangular batches make the figures depend on it a little."""


def evaluate(
    model: nn.Module,
    data: str,
    imgsz: ImageSize,
    device: str,
    batch: int = EVALUATION_BATCH,
    split: str = "val",
    gate: Gate | None = None,
) -> dict[str, float]:
    """The accuracy of `model` on a split of `data`: what stock `YOLO(path).val(data=, imgsz=, batch=)` prints.

    Of one side, pixels, batches are rectangular (`rect=True`), as stock `val` takes: square ones differ by one or two
    hundredths of mAP (classifiers and RT-DETR take square ones always). Of height and width every image is letterboxed
    into exactly this shape, as stock `val` does for an exported file of it, but not for a checkpoint. Full precision.
    The model is copied (validation fuses layers) and left as it is; nothing is printed, plotted or left on disk but
    Ultralytics' label cache beside the labels.

    Returns `map50_95`, `map50`, `precision`, `recall`, each in [0, 1], of the task's own target (boxes for detect and
    obb, masks for segment, keypoints for pose); segment and pose have the boxes' four too, as `map50_95_box` ..., and
    their own mAPs once more as `map50_95_mask` or `map50_95_pose` ... A classifier has `top1` and `top5`.
    Raises PruningError for a task that is not validated here, for weights that are not finite and for data that is not
    there.
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
        imgsz: ImageSize,
        device: str,
        batch: int = EVALUATION_BATCH,
        split: str = "val",
        gate: Gate | None = None,
        workers: int = 4,
        rect: bool = True,
        conf: float | None = None,
    ) -> None:
        """rect=False: images of exactly this size, which exported files take, as always for height and width.
        conf: lowest score that counts; None: Ultralytics'."""
        self._data, self._imgsz = data, imgsz
        self._args = {"imgsz": larger_side(imgsz), "device": device, "batch": batch, "split": split, "workers": workers}
        self._args |= {"rect": rect and isinstance(imgsz, int), "conf": conf}
        self._gate = gate or NullGate()
        self._finish = device_synchronizer(torch_device(device))
        self._loader: GatedLoader | None = None
        self._seen: dict[str, Any] = {}

    def run_by_image(self, model: nn.Module, **how: Any) -> tuple[dict[str, float], ImageStats]:
        """`run`, and what it saw image by image; not for classifiers."""
        metrics = self.run(model, **how)
        return metrics, image_stats(self._seen, suffix_of(kind_of(model)))

    @property
    def images(self) -> int:
        """Images of the split, known after the first `run`; 0 before."""
        return 0 if self._loader is None else len(self._loader.dataset)

    def run(self, model: nn.Module, exported: Path | None = None, precision: str = "fp32") -> dict[str, float]:
        """The metrics of `model`, see `evaluate`; with `exported` of that file of it, which runs in `precision`."""
        kind = kind_of(model)
        refuse_non_finite(model)
        given = plain_copy(model) if exported is None else str(exported)
        # Asked for in 16 bits, a TorchScript file and an engine take images in them; on a CPU neither does
        more = {"quantize": 16} if precision == "fp16" and self._finish is not None else {}
        with quiet_ultralytics(), tempfile.TemporaryDirectory(prefix="paretoprune-val-") as scratch:
            validator = _validator_class(kind, self._wrap, self._see, self._gate)(
                dataloader=self._loader, save_dir=Path(scratch), args=self._validator_args(model) | more
            )
            validator.args.imgsz = plain_size(self._imgsz)  # of height and width its constructor makes a square
            try:
                with tuned_backend(given if isinstance(given, str) else "", precision, torch.get_num_threads()):
                    stats = validator(model=given)
            finally:
                self.release()
        return named_metrics(stats, kind)

    def _validator_args(self, model: nn.Module) -> dict[str, Any]:
        task = task_of(model)
        silent = {"plots": False, "verbose": False, "save_json": False, "save_txt": False}
        # val=False: otherwise a val2017 list turns save_json on and asks for COCO's own tools
        path = dataset_file(self._data, task)
        if path.is_file():  # in one line what Ultralytics would say of a dataset that is not there
            read_dataset(path)
        about = {"data": str(path), "task": task, "single_cls": is_single_class(model)}
        return {**self._args, **silent, **about, "mode": "val", "val": False}

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


def _validator_class(
    kind: str, wrap: Callable[[Any], GatedLoader], see: Callable[[dict[str, Any]], None], gate: Gate
) -> type[Any]:
    """The kind's validator, handing every loader it builds to `wrap` and its lists of one item an image to `see`."""
    base: Any = validator_of(kind)

    def get_dataloader(self: Any, dataset_path: str, batch_size: int) -> GatedLoader:
        return wrap(base.get_dataloader(self, dataset_path, batch_size))

    def build_dataset(self: Any, *given: Any, **named: Any) -> Any:
        return gated_dataset(base.build_dataset(self, *given, **named), gate)

    def get_stats(self: Any) -> Any:
        see(getattr(self.metrics, "stats", {}))  # the base class joins and forgets them; a classifier's has none
        return base.get_stats(self)

    def postprocess(self: Any, preds: Any) -> Any:
        with _all_the_time_it_takes():
            return base.postprocess(self, preds)

    overridden = {
        "get_dataloader": get_dataloader, "build_dataset": build_dataset, "get_stats": get_stats,
        "postprocess": postprocess,
    }  # fmt: skip
    return type(base.__name__, (base,), overridden)


@contextlib.contextmanager
def _all_the_time_it_takes() -> Iterator[None]:
    """Non-maximum suppression without a time limit.

    After 2 s and 0.05 s an image, by the clock on the wall, Ultralytics leaves a batch's other images without a
    detection: on a machine that is busy, or was suspended, a network would be as accurate as its neighbours are quiet.
    """
    stock = nms.non_max_suppression
    nms.non_max_suppression = partial(stock, max_time_img=math.inf)
    try:
        yield
    finally:
        nms.non_max_suppression = stock


def named_metrics(stats: dict[str, Any], kind: str) -> dict[str, float]:
    """Ultralytics' validation figures under this project's names; NaN or infinity raises PruningError."""
    named = {ours: float(stats[theirs]) for ours, theirs in metric_keys(kind).items()}
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
