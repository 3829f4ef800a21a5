"""Calibration images: a seeded sample of the training split, prepared as validation prepares images."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from pruning.checkpoints import task_of
from pruning.dataset_reading import read_dataset
from pruning.errors import PruningError
from pruning.evaluation_dataset import dataset_file
from pruning.evaluation_gate import nothing
from pruning.quiet import quiet_ultralytics
from pruning.tasks import is_single_class, kind_of


@dataclass(frozen=True)
class Calibration:
    """Letterboxed training images with their labels, on the CPU.

    Attributes:
        batch: an Ultralytics training batch; `batch["img"]` is float32 in [0, 1], shape (images, 3, imgsz, imgsz).
        pause: called between two parts of long work on the images; whoever shares the device may be let in there.
    """

    batch: dict[str, Any]
    pause: Callable[[], None] = nothing

    @property
    def images(self) -> torch.Tensor:
        images: torch.Tensor = self.batch["img"]
        return images

    def chunks(self, size: int) -> Iterator[dict[str, Any]]:
        """The same batch in pieces of at most `size` images, labels renumbered."""
        count = len(self.images)
        owners = self.batch.get("batch_idx")
        for start in range(0, count, size):
            stop = min(start + size, count)
            piece: dict[str, Any] = {"img": self.images[start:stop]}
            mine = None if owners is None else (owners >= start) & (owners < stop)
            for key, value in self.batch.items():
                if key == "img" or not isinstance(value, torch.Tensor):
                    continue
                if mine is not None and len(value) == len(mine):
                    piece[key] = value[mine] - start if key == "batch_idx" else value[mine]
                elif len(value) == count:
                    piece[key] = value[start:stop]
            yield piece
            self.pause()


def load_calibration(data: str, model: nn.Module, imgsz: int, images: int = 64, seed: int = 0) -> Calibration:
    """Draw `images` training images (all, where there are fewer) without augmentation.

    Raises:
        PruningError: the dataset cannot be read, or its training split holds no usable image.
    """
    with quiet_ultralytics():
        dataset = _dataset(data, model, imgsz)
    if len(dataset) == 0:
        raise PruningError(f"calibration needs training images, but '{data}' has none that can be read.")
    picks = np.random.default_rng(seed).permutation(len(dataset))[:images]
    with contextlib.redirect_stdout(None):
        samples = [dataset[int(i)] for i in sorted(picks)]
    if kind_of(model) == "classify":  # its transforms give floats in [0, 1], and a class an image
        labels = torch.tensor([sample["cls"] for sample in samples])
        return Calibration({"img": torch.stack([sample["img"] for sample in samples]), "cls": labels})
    batch = dict(dataset.collate_fn(samples))
    batch["img"] = batch["img"].float() / 255
    return Calibration(batch)


def _dataset(data: str, model: nn.Module, imgsz: int) -> Any:
    """The training split as validation would read it."""
    from ultralytics.cfg import get_cfg
    from ultralytics.data import ClassificationDataset
    from ultralytics.data.build import build_yolo_dataset
    from ultralytics.models.rtdetr.val import RTDETRDataset

    kind, task = kind_of(model), task_of(model)
    place = dataset_file(data, task)
    one = is_single_class(model)
    cfg = get_cfg(overrides={"task": task, "imgsz": imgsz, "rect": False, "cache": False, "single_cls": one})
    if kind == "classify":
        names = dict(model.names)  # type: ignore[arg-type]
        return ClassificationDataset(place / "train", cfg, augment=False, prefix="train", names=names)
    content = read_dataset(place)
    if kind == "rtdetr":
        return RTDETRDataset(
            img_path=content["train"], imgsz=imgsz, batch_size=16, augment=False, hyp=cfg, rect=False, data=content,
            single_cls=one,
        )  # fmt: skip
    return build_yolo_dataset(cfg, content["train"], 16, content, mode="val", rect=False)
