"""Training on a single image: a batch norm over maps of 1x1 then has one value per channel, and no variance.

torch refuses such a batch in the middle of a training, and Ultralytics refuses every last batch of one image below two
strides. A batch of one that was asked for is an error before any work; one that is left over at the end of an epoch is
left out, another image in each epoch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.yolo.image_size import stride_of
from paretoprune.pruning.yolo.loading import input_channels
from paretoprune.pruning.yolo.saving import plain_copy
from paretoprune.pruning.yolo.ultralytics_logging import _replaced


def lone_norm(model: nn.Module, imgsz: int) -> str:
    """The first batch norm to which one square image gives a single value per channel; "" where there is none."""
    copy, found = plain_copy(model), list[str]()
    for name, module in copy.named_modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(
                lambda norm, inputs, name=name: found.append(name) if inputs[0].numel() == norm.num_features else None  # type: ignore[misc]
            )
    with torch.inference_mode():
        copy(torch.zeros(1, input_channels(copy), imgsz, imgsz))
    return found[0] if found else ""


def refusal(model: nn.Module, imgsz: int) -> str:
    """Why `model` cannot be trained on one image of `imgsz` at a time; "" where it can."""
    norm = lone_norm(model, imgsz)
    if norm:
        return f"the batch norm {norm} has a single value per channel then ({imgsz} px)"
    if imgsz < 2 * stride_of(model):
        return f"Ultralytics needs at least {2 * stride_of(model)} px for it"
    return ""


def check_batch(model: nn.Module, imgsz: int, batch: int, images: int, setting: str = "batch") -> None:
    """Raise PruningError where every batch would be of one image, and `model` cannot be trained on that.

    batch: of one process; images: of the training split, as far as they were counted (two are enough).
    """
    if min(batch, images) > 1:
        return
    why = refusal(model, imgsz)
    if why:
        what = f"{setting} is {batch}" if batch == 1 else "the training split has one image"
        remedy = f"set {setting} to 2 or more" if batch == 1 else "give more images"
        raise PruningError(f"a training batch must hold two images or more, but {what}: {why}; {remedy}")


@contextmanager
def lone_last_batch_left_out(model: nn.Module, imgsz: int, processes: int = 1) -> Iterator[None]:
    """Inside, Ultralytics' data loaders leave out a last batch of one image, where `model` cannot be trained on it."""
    from ultralytics.data.build import build_dataloader
    from ultralytics.models.yolo.classify import train as of_classes
    from ultralytics.models.yolo.detect import train as of_boxes

    def build(dataset: Any, batch: int, *args: Any, **options: Any) -> Any:
        samples = math.ceil(len(dataset) / processes)
        if samples > batch > 1 and samples % batch == 1 and refusal(model, imgsz):
            options["drop_last"] = True
        return build_dataloader(dataset, batch, *args, **options)

    with ExitStack() as stack:
        for module in (of_classes, of_boxes):
            stack.enter_context(_replaced(module, "build_dataloader", build))
        yield
