"""The size of a network's input: the side of a square, or (height, width), as Ultralytics' export takes it.

Of JSON, YAML and checkpoints a rectangle is a list [height, width], of options and tables ``384,640``. Equal sides are
a square, so that every size has one form.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

ImageSize = int | tuple[int, int]


def height_width(imgsz: ImageSize) -> tuple[int, int]:
    """Height and width, pixels."""
    return (imgsz, imgsz) if isinstance(imgsz, int) else imgsz


def area_of(imgsz: ImageSize) -> int:
    """Pixels."""
    height, width = height_width(imgsz)
    return height * width


def larger_side(imgsz: ImageSize) -> int:
    """Side of the squares that Ultralytics trains on, and of the images that are letterboxed into `imgsz`, pixels."""
    return max(height_width(imgsz))


def size_text(imgsz: ImageSize) -> str:
    """As the options of the commands take it: ``640``, ``384,640``."""
    return str(imgsz) if isinstance(imgsz, int) else ",".join(map(str, imgsz))


def sizes_text(sizes: Iterable[ImageSize]) -> str:
    """Several for people, set apart from the comma within one where there is a rectangle: ``256, 224``, ``a,b; c``."""
    texts = list(map(size_text, sizes))
    return ("; " if any("," in text for text in texts) else ", ").join(texts)


def plain_size(imgsz: ImageSize) -> int | list[int]:
    """As JSON and a checkpoint's arguments hold it."""
    return imgsz if isinstance(imgsz, int) else list(imgsz)


def parse_size(text: str) -> ImageSize:
    """Inverse of `size_text`. Raises ValueError as `read_size` does."""
    sides = text.split(",")
    return read_size([int(side) for side in sides] if all(side.strip().isdecimal() for side in sides) else text)


def read_size(value: Any) -> ImageSize:
    """Inverse of `plain_size`. Raises ValueError for anything but one or two whole numbers above 0."""
    sides = list(value) if isinstance(value, (list, tuple)) else [value]
    if not 1 <= len(sides) <= 2 or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError(f"the image size must be a side in pixels, or height and width, but got {value!r:.60}")
    return sides[0] if len(set(sides)) == 1 else (sides[0], sides[1])
