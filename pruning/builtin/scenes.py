"""Scenes of the built-in dataset: handwritten digits drawn on photographs, with the boxes of what was drawn.

The digits are scikit-learn's (8x8 grey values), the photographs those that scikit-learn and Ultralytics install. Every
scene follows from (seed, split, index) alone, so a dataset of n training images is a prefix of a longer one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

SPLITS: Final = ("train", "val")
PHOTOS: Final = {
    "china": ("sklearn", "datasets/images"),
    "flower": ("sklearn", "datasets/images"),
    "bus": ("ultralytics", "assets"),
    "zidane": ("ultralytics", "assets"),
}
"""The photographs: name, and the package and folder that hold it."""
VAL_PHOTO_SHARE: Final = 0.3
"""Share of a photograph's longer side, at its right or lower end, that only validation scenes use."""
VAL_DIGIT_STEP: Final = 4
"""Every fourth digit sample belongs to validation."""
CELL: Final = 8
"""Pixels to which one pixel of a digit sample is smoothed before it is turned and scaled."""
MIN_CONTRAST: Final = 70.0
"""Least difference in luma (0 to 255) between the ink and the mean of the photograph under the digit."""
MAX_COVER: Final = 0.05
"""Largest share of the smaller of two boxes that the other may cover."""
INK_EDGE: Final = 0.5
"""Opacity from which a pixel counts as ink: the box encloses these pixels and no more."""

Pixels = NDArray[np.uint8]
Opacity = NDArray[np.float32]


@dataclass(frozen=True)
class Rect:
    """Whole pixels of a photograph or an image: left and top inclusive, right and bottom exclusive."""

    left: int
    top: int
    right: int
    bottom: int

    def intersection(self, other: Rect) -> int:
        """Shared area in pixels."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(width, 0) * max(height, 0)

    @property
    def area(self) -> int:
        return (self.right - self.left) * (self.bottom - self.top)


@dataclass(frozen=True)
class DrawnDigit:
    """One digit of a scene: its class, the index of its sample, its box in pixels and its ink (blue, green, red)."""

    label: int
    sample: int
    box: Rect
    ink: tuple[float, float, float]


@dataclass(frozen=True)
class Scene:
    """image and background are (imgsz, imgsz, 3) BGR; background is the photograph's crop before anything was drawn."""

    image: Pixels
    background: Pixels
    digits: tuple[DrawnDigit, ...]
    photo: str
    crop: Rect


@cache
def load_photo(name: str) -> Pixels:
    """One of `PHOTOS` as (height, width, 3) BGR, as the installed packages ship it."""
    package, folder = PHOTOS[name]
    # Found, not imported: importing Ultralytics takes seconds (torch), and only one file of it is wanted.
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"The built-in dataset needs the package {package}, which is not installed.", name=package
        )
    path = Path(spec.origin).parent / folder / f"{name}.jpg"
    pixels = cv2.imdecode(np.fromfile(path, dtype=np.uint8), cv2.IMREAD_COLOR)
    if pixels is None:
        raise OSError(f"Cannot decode a photograph of the built-in dataset, {path}; reinstall {package}.")
    return np.asarray(pixels, dtype=np.uint8)


@cache
def load_digit_samples() -> tuple[Opacity, NDArray[np.int64]]:
    """scikit-learn's digits: ink (1797, 8, 8) in [0, 1], and their classes (1797,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images / 16.0).astype(np.float32), np.asarray(digits.target, dtype=np.int64)


def digit_pool(split: str) -> NDArray[np.int64]:
    """Indices of the digit samples that a split may draw; the pools of the two splits are disjoint."""
    indices = np.arange(len(load_digit_samples()[1]))
    is_val = indices % VAL_DIGIT_STEP == VAL_DIGIT_STEP - 1
    return indices[is_val if split == "val" else ~is_val]


def photo_region(name: str, split: str) -> Rect:
    """The part of a photograph that a split may crop from; the regions of the two splits are disjoint."""
    height, width = load_photo(name).shape[:2]
    if width >= height:
        border = round(width * (1 - VAL_PHOTO_SHARE))
        return Rect(border, 0, width, height) if split == "val" else Rect(0, 0, border, height)
    border = round(height * (1 - VAL_PHOTO_SHARE))
    return Rect(0, border, width, height) if split == "val" else Rect(0, 0, width, border)


def draw_scene(seed: int, split: str, index: int, imgsz: int) -> Scene:
    """The scene `index` of a split, always the same for the same arguments.

    Raises:
        ValueError: the split is none of `SPLITS`.
    """
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(SPLITS)}, but got {split!r}.")
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    photo, crop, background = _draw_background(rng, split, imgsz)
    canvas = background.astype(np.float32)
    drawn: list[DrawnDigit] = []
    for _ in range(int(rng.integers(2, 7))):
        digit = _draw_digit(rng, split, canvas, [d.box for d in drawn])
        if digit is not None:
            drawn.append(digit)
    return Scene(np.rint(canvas).astype(np.uint8), background, tuple(drawn), photo, crop)


def _draw_background(rng: np.random.Generator, split: str, imgsz: int) -> tuple[str, Rect, Pixels]:
    """A square crop of the split's part of a photograph, scaled to imgsz, half of them mirrored, altered in light."""
    name = tuple(PHOTOS)[int(rng.integers(len(PHOTOS)))]
    region = photo_region(name, split)
    # Both splits take crops of the size that the smaller (validation) region allows: same task, other pixels.
    room = photo_region(name, "val")
    side = int(min(room.right - room.left, room.bottom - room.top) * rng.uniform(0.5, 1.0))
    left = int(rng.integers(region.left, region.right - side + 1))
    top = int(rng.integers(region.top, region.bottom - side + 1))
    crop = Rect(left, top, left + side, top + side)
    pixels = load_photo(name)[crop.top : crop.bottom, crop.left : crop.right]
    shrinks = side > imgsz
    scaled = cv2.resize(pixels, (imgsz, imgsz), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    if rng.random() < 0.5:
        scaled = scaled[:, ::-1]
    lit = scaled.astype(np.float32) * rng.uniform(0.6, 1.2) + rng.uniform(-15, 15)
    return name, crop, np.clip(np.rint(lit), 0, 255).astype(np.uint8)


def _draw_digit(rng: np.random.Generator, split: str, canvas: Opacity, taken: list[Rect]) -> DrawnDigit | None:
    """Blends one digit into canvas (in place); None where no free place was found."""
    samples, labels = load_digit_samples()
    sample = int(rng.choice(digit_pool(split)))
    imgsz = canvas.shape[0]
    opacity = render_digit(samples[sample], _random_transform(rng, imgsz / 160))
    height, width = opacity.shape
    opacity = opacity * np.float32(rng.uniform(0.85, 1.0))
    for _ in range(20):
        left, top = (int(rng.integers(0, imgsz - extent + 1)) for extent in (width, height))
        box = Rect(left, top, left + width, top + height)
        if all(box.intersection(other) <= MAX_COVER * min(box.area, other.area) for other in taken):
            patch = canvas[box.top : box.bottom, box.left : box.right]
            ink = _random_ink(rng, patch)
            patch += opacity[..., None] * (np.asarray(ink, dtype=np.float32) - patch)
            return DrawnDigit(int(labels[sample]), sample, box, ink)
    return None


def _random_transform(rng: np.random.Generator, unit: float) -> NDArray[np.float64]:
    """A (2, 2) matrix from smoothed digit pixels to image pixels: size, aspect, slant and a slight turn."""
    scale = unit * rng.uniform(30, 70) / (8 * CELL)
    aspect = rng.uniform(0.85, 1.2)
    angle = np.deg2rad(rng.uniform(-12, 12))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return np.asarray(scale * turn @ np.array([[aspect, rng.uniform(-0.15, 0.15)], [0.0, 1.0]]))


def render_digit(sample: Opacity, transform: NDArray[np.float64]) -> Opacity:
    """The opacity (height, width) in [0, 1] of a digit sample (8, 8), cut to its ink.

    Every edge row and column holds a pixel of at least `INK_EDGE`. Interpolating the grey values and then steepening
    them around their half gives smooth outlines, not squares.
    """
    smooth = cv2.resize(np.pad(sample, 2), None, fx=CELL, fy=CELL, interpolation=cv2.INTER_CUBIC)
    extent = int(np.ceil(smooth.shape[0] * np.abs(transform).sum(axis=1).max())) + 2
    centre = np.array([(n - 1) / 2 for n in smooth.shape[::-1]])
    shift = (extent - 1) / 2 - transform @ centre
    warped = cv2.warpAffine(smooth, np.column_stack([transform, shift]), (extent, extent), flags=cv2.INTER_LINEAR)
    opacity = np.clip((warped - 0.35) / 0.3, 0, 1).astype(np.float32)
    left, top, right, bottom = _ink_bounds(opacity)
    return opacity[top:bottom, left:right]


def _ink_bounds(opacity: Opacity) -> tuple[int, int, int, int]:
    """left, top, right, bottom (the last two exclusive) of the pixels that are ink."""
    rows, columns = (np.flatnonzero((opacity >= INK_EDGE).any(axis=axis)) for axis in (1, 0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _random_ink(rng: np.random.Generator, patch: Opacity) -> tuple[float, float, float]:
    """A random colour (blue, green, red) that stands out from the mean of patch (height, width, 3)."""
    luma = np.array([0.114, 0.587, 0.299])
    ground = float(patch.mean(axis=(0, 1)) @ luma)
    while True:
        ink = rng.uniform(0, 255, size=3)
        if abs(float(ink @ luma) - ground) >= MIN_CONTRAST:
            return float(ink[0]), float(ink[1]), float(ink[2])
