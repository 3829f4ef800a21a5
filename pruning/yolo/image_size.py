"""Which sizes of its input a network takes.

Ultralytics rounds a size that is no multiple of the network's largest stride up and says so in its log. Here such a
size is refused, with the one that it would be: what is measured, written down and repeated is the size that was asked
for. Only the size that a checkpoint says it was trained at is rounded up, as its training did.
"""

from __future__ import annotations

from typing import Any

from paretoprune.base.image_size import ImageSize, height_width, size_text
from paretoprune.pruning.errors import PruningError

STRIDE = 32  # Ultralytics trains at multiples of the largest stride, but of no less than this


def rounded_up(imgsz: ImageSize, stride: int = STRIDE) -> ImageSize:
    """The nearest size that is not smaller and a multiple of `stride`, which Ultralytics would take in its place."""
    height, width = (max(stride, -(-side // stride) * stride) for side in height_width(imgsz))
    return height if isinstance(imgsz, int) else (height, width)


def stride_of(model: Any) -> int:
    """What a network's input size must be a multiple of: its largest stride, 32 at least."""
    strides = getattr(model, "stride", None)
    return STRIDE if strides is None else max(STRIDE, int(max(strides)))


def check_image_size(imgsz: ImageSize, stride: int = STRIDE, whose: str = "") -> None:
    """Raise PruningError unless every side is a multiple of `stride`; `whose` stride that is, for people."""
    right = rounded_up(imgsz, stride)
    if right != imgsz:
        why = f"a multiple of {stride}" + (f", the largest stride of {whose}" if stride > STRIDE and whose else "")
        raise PruningError(f"the image size must be {why}, but got {size_text(imgsz)}: use {size_text(right)}")


def check_shape(task: str, imgsz: ImageSize) -> None:
    """Raise PruningError for a rectangle where networks of this task are trained and judged on squares."""
    if task == "classify" and not isinstance(imgsz, int):
        raise PruningError(f"a classifier's images are squares, but got {size_text(imgsz)}: give one side")


def trained_size(args: Any, stride: int = STRIDE) -> ImageSize:
    """The size of the images by a checkpoint's training arguments (mapping or namespace); else 640.

    Height and width only of a network that was pruned for them: a training of Ultralytics is by squares.
    """
    size = args.get("imgsz") if isinstance(args, dict) else getattr(args, "imgsz", None)
    if isinstance(size, (list, tuple)) and len(size) == 2 and size[0] != size[1]:
        return rounded_up((int(size[0]), int(size[1])), stride)
    side = max(size) if isinstance(size, (list, tuple)) else size
    return rounded_up(int(side) if side else 640, stride)
