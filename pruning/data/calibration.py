"""Calibration images: a seeded sample of the training split, prepared as validation prepares images."""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from paretoprune.base.image_size import ImageSize, height_width, larger_side, plain_size
from paretoprune.pruning.data.dataset import dataset_file
from paretoprune.pruning.data.reading import read_dataset
from paretoprune.pruning.data.sampling import lay_out, training_files
from paretoprune.pruning.device import nothing
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.yolo.image_size import check_shape
from paretoprune.pruning.yolo.output_distribution import class_probabilities
from paretoprune.pruning.yolo.saving import task_of
from paretoprune.pruning.yolo.tasks import is_single_class, kind_of
from paretoprune.pruning.yolo.ultralytics_logging import preserved_random_state, quiet_ultralytics

FEW_IMAGES = 16  # what a tenth of all images show, fewer show with a chance of less than 4 in 5: 1 - 0.9^16 = 0.81
SEEN = 0.25  # class probability from which on Ultralytics' predict shows an object
AUGMENTATIONS = tuple("hsv_h hsv_s hsv_v degrees translate scale shear perspective flipud fliplr bgr".split())
FLIPS = ("flipud", "fliplr")
_UNSEEN = 0.1  # where the highest of an image is lower on average, hardly any image shows an object
_LOOKED_AT = 32  # images


def evenly_spread(total: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which `count` of `total`, at most all, shape (count,); and the number among them of each, -1 for the others."""
    chosen = torch.linspace(0, total - 1, count).round().long()
    number = torch.full((total,), -1)
    number[chosen] = torch.arange(count)
    return chosen, number


@dataclass(frozen=True)
class Calibration:
    """Letterboxed training images with their labels, on the CPU.

    Attributes:
        batch: an Ultralytics training batch; `batch["img"]` is float32 in [0, 1], shape (images, 3, imgsz, imgsz).
        files: paths of the images, links resolved.
        pause: called between two parts of long work on the images; whoever shares the device may be let in there.
    """

    batch: dict[str, Any]
    files: tuple[str, ...] = ()
    pause: Callable[[], None] = nothing

    @property
    def images(self) -> torch.Tensor:
        images: torch.Tensor = self.batch["img"]
        return images

    def spread(self, count: int) -> Calibration:
        """At most `count` of the images, evenly spread, with their labels."""
        if count >= len(self.images):
            return self
        chosen, number = evenly_spread(len(self.images), count)
        owners = self.batch.get("batch_idx")
        mine = None if owners is None else number[owners.long()] >= 0
        batch: dict[str, Any] = {}
        for key, value in self.batch.items():
            if isinstance(value, torch.Tensor) and key != "img" and mine is not None and len(value) == len(mine):
                batch[key] = number[value[mine].long()].to(value.dtype) if key == "batch_idx" else value[mine]
            elif isinstance(value, torch.Tensor) and len(value) == len(self.images):
                batch[key] = value[chosen]
        return Calibration(batch, tuple(self.files[int(k)] for k in chosen) if self.files else (), self.pause)

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


def load_calibration(
    data: str, model: nn.Module, imgsz: ImageSize, images: int = 64, seed: int = 0, among: Sequence[str] | None = None
) -> Calibration:
    """Draw `images` training images (all, where there are fewer) without augmentation.

    imgsz: the side of square ones, or height and width. among: all training images, where they are listed already
    (`sampling.training_files`).

    Raises:
        PruningError: the dataset cannot be read, or its training split holds no usable image.
    """
    with quiet_ultralytics(), contextlib.redirect_stdout(None), tempfile.TemporaryDirectory() as scratch:
        dataset = _drawn(data, model, imgsz, images, seed, among, Path(scratch))
        picks = sorted(np.random.default_rng(seed).permutation(len(dataset))[:images].tolist())
        samples = [dataset[number] for number in picks]
        paths = _files(dataset)
        files = tuple(paths[number] for number in picks)
    if kind_of(model) == "classify":  # its transforms give floats in [0, 1], and a class an image
        labels = torch.tensor([sample["cls"] for sample in samples])
        return Calibration({"img": torch.stack([sample["img"] for sample in samples]), "cls": labels}, files)
    batch = dict(dataset.collate_fn(samples))
    batch["img"] = batch["img"].float() / 255
    return Calibration(batch, files)


def _drawn(
    data: str, model: nn.Module, imgsz: ImageSize, count: int, seed: int, among: Sequence[str] | None, scratch: Path
) -> Any:
    """Training images as `_dataset` has them, no more than `count` where there are no corrupt ones among those drawn.

    Ultralytics would read the labels of all images, and open each, before it gives one.
    """
    task = task_of(model)
    place = dataset_file(data, task)
    images = among if among is not None else training_files(place, task)
    order, tried = np.random.default_rng(seed).permutation(len(images)), count
    while tried < len(images):
        lay_out(place, task, {"train": [images[i] for i in sorted(order[:tried])]}, scratch / str(tried))
        with contextlib.suppress(RuntimeError):  # none of them can be read
            found = _dataset(str(scratch / str(tried)), model, imgsz)
            if len(found) >= count:
                return found
        tried *= 2
    try:
        return _dataset(data, model, imgsz)
    except RuntimeError as error:
        raise PruningError(f"calibration needs training images, but '{data}' has none that can be read.") from error


def shortcomings(calibration: Calibration, model: nn.Module) -> list[str]:
    """What makes the images poor witnesses of what `model` (eval mode, on any device) is there for, a line each.

    Labels are not looked at, since neither the default criterion nor the recovery does.
    """
    count, found = len(calibration.images), []
    if count < FEW_IMAGES:
        found.append(
            f"calibration: {count} training image{'s' * (count > 1)} to look at, fewer than {FEW_IMAGES}: what they do "
            "not show is lost first, and accuracy may fall further than it must; add training images"
        )
    highest = _class_probabilities(calibration, model)
    if highest is None:
        return found
    if float(highest.amax(1).mean()) < _UNSEEN:
        found.append(
            f"calibration: the network sees no object in these images (highest class probability "
            f"{float(highest.amax(1).mean()):.3f} on average), so it is kept for telling background from background; "
            "give training images with objects, or --imgsz at which it was trained"
        )
    elif count >= FEW_IMAGES and highest.shape[1] > 1 and int((highest.amax(0) >= SEEN).sum()) == 1:
        names: Any = model.names
        only = names[int(highest.amax(0).argmax())]
        found.append(
            f"calibration: the network sees one class only in these images ('{only}'), so what tells the other "
            f"{highest.shape[1] - 1} apart may be lost; add training images of them"
        )
    return found


def _class_probabilities(calibration: Calibration, model: nn.Module) -> torch.Tensor | None:
    """Highest probability of each class over an image's anchors, shape (images, classes); None without anchors."""
    device, found = next(model.parameters()).device, []
    for batch in calibration.spread(_LOOKED_AT).chunks(8):
        seen = class_probabilities(model, batch["img"].to(device))
        if seen is None:
            return None
        found.append(seen.amax(2).cpu())
    return torch.cat(found)


class TrainingImages:
    """Training images as the training of a network would see them, made when they are asked for; never joined of
    several.

    Attributes:
        files: their paths, links resolved, by number.
        count: how many there are.
    """

    def __init__(self, data: str, model: nn.Module, imgsz: ImageSize, changes: Sequence[str] = AUGMENTATIONS) -> None:
        """`changes`: Ultralytics' names of augmentations, as strong as in the training of `model` where its checkpoint
        says how, else by Ultralytics' defaults; others are off."""
        known = getattr(model, "args", None) or {}
        known = known if isinstance(known, dict) else vars(known)
        off = {name: 0.0 for name in AUGMENTATIONS if name not in changes}
        strengths = {name: known[name] for name in changes if known.get(name) is not None}
        with quiet_ultralytics():
            self._dataset = _dataset(data, model, imgsz, {**off, **strengths})
        self._shape = height_width(imgsz)
        self.files = _files(self._dataset)
        self.count = len(self._dataset)

    def take(self, numbers: Iterable[int], seed: int) -> torch.Tensor:
        """Those of these numbers below `count`, float32, shape (numbers, channels, height, width).

        Equal seeds give equal images; the caller's own random numbers go on.
        """
        with quiet_ultralytics(), preserved_random_state(cuda=False), contextlib.redirect_stdout(None):
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002 - the state that Ultralytics draws from
            torch.manual_seed(seed)
            found = torch.stack([torch.as_tensor(self._dataset[number]["img"]) for number in numbers])
        # Augmentation works on squares, as a training does; of a rectangle it is their middle
        height, width = self._shape
        top, left = (found.shape[2] - height) // 2, (found.shape[3] - width) // 2
        found = found[:, :, top : top + height, left : left + width]
        return found if found.is_floating_point() else found.float() / 255


def _files(dataset: Any) -> list[str]:
    """The images' paths, links resolved: a sample of a classifier's images is made of links."""
    paths = [sample[0] for sample in dataset.samples] if hasattr(dataset, "samples") else dataset.im_files
    return [os.path.realpath(path) for path in paths]


def read_training_labels(data: str, model: nn.Module) -> None:
    """Have Ultralytics read the labels of all training images, and look at these, so that the next training finds them
    in its cache."""
    with quiet_ultralytics(), contextlib.redirect_stdout(None):
        _dataset(data, model, 64)


def _dataset(data: str, model: nn.Module, imgsz: ImageSize, changes: Mapping[str, Any] | None = None) -> Any:
    """The training split as validation would read it, letterboxed into `imgsz`; as training would, by these
    augmentations, where they are given.

    A classifier's images are then cropped, too, but neither erased nor changed by an automatic policy.
    """
    from ultralytics.cfg import get_cfg
    from ultralytics.data import ClassificationDataset
    from ultralytics.data.build import build_yolo_dataset
    from ultralytics.models.rtdetr.val import RTDETRDataset

    kind, task, augment = kind_of(model), task_of(model), changes is not None
    check_shape(task, imgsz)
    place = dataset_file(data, task)
    one = is_single_class(model)
    alone = dict.fromkeys(("mosaic", "mixup", "cutmix", "copy_paste", "erasing"), 0.0)
    own = {"task": task, "imgsz": larger_side(imgsz), "rect": False, "cache": False, "single_cls": one}
    cfg = get_cfg(overrides={**(changes or {}), **alone, **own})
    if kind == "classify":
        cfg.auto_augment = None
        names = dict(model.names)  # type: ignore[arg-type]
        return ClassificationDataset(place / "train", cfg, augment=augment, prefix="train", names=names)
    if not augment:
        cfg.imgsz = plain_size(imgsz)  # which a validation takes, and `get_cfg` does not
    content = read_dataset(place)
    if kind == "rtdetr":
        return RTDETRDataset(
            img_path=content["train"], imgsz=cfg.imgsz, batch_size=16, augment=augment, hyp=cfg, rect=False,
            data=content, single_cls=one,
        )  # fmt: skip
    return build_yolo_dataset(cfg, content["train"], 16, content, mode="train" if augment else "val", rect=False)
