"""What Ultralytics' predict is timed on: some images as a camera or a disk gives them, read once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import nn

from paretoprune.pruning.data.dataset import read_image, validation_images
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.yolo.loading import input_channels
from paretoprune.pruning.yolo.tasks import kind_of

IMAGES = 16
RANDOM_SIZE = (720, 1280)  # height and width of a usual camera's image


@dataclass(eq=False)
class ImageStream:
    """Images, each (height, width, channels) in 8 bits, colours as BGR: what a user gives to `YOLO(...).predict`.

    `kind`: of the networks that look at them (`pruning.yolo.tasks.KINDS`). `source`: where they are from, for people.
    All networks of a measurement share one, which whoever measures moves on from round to round: within a round all of
    them see the same images, so that what one image costs more than another does not blur their ratio.
    """

    kind: str
    images: tuple[npt.NDArray[np.uint8], ...]
    source: str
    at: int = 0

    def take(self, count: int) -> list[npt.NDArray[np.uint8]]:
        """The next `count` images, beginning anew at the end; the same ones until `advance`."""
        return [self.images[(self.at + each) % len(self.images)] for each in range(count)]

    def advance(self, count: int) -> None:
        """Move on by `count` images."""
        self.at = (self.at + count) % len(self.images)


def image_stream(network: nn.Module, data: str | None = None) -> ImageStream:
    """Images for `network`, spread over the validation split of `data`; without one of random pixels.

    Raises PruningError for a task without a predictor here, and where the split has no image that can be read.
    """
    kind, channels = kind_of(network), input_channels(network)
    if data is None:
        random = np.random.default_rng(0)
        shape = (*RANDOM_SIZE, channels)
        made = tuple(random.integers(0, 256, shape, dtype=np.uint8) for _ in range(IMAGES))
        return ImageStream(kind, made, f"{IMAGES} of random pixels, {RANDOM_SIZE[1]}x{RANDOM_SIZE[0]}")
    found: list[npt.NDArray[np.uint8]] = []
    fault = "it has none"
    for path in _spread(validation_images(data, network)):
        image, why = read_image(path, channels)
        if image is None:
            fault = f"'{path}' {why}"
        else:
            found.append(image)
    if not found:
        raise PruningError(
            f"predict is timed on validation images of '{data}', but none can be read ({fault}); correct the dataset"
        )
    return ImageStream(kind, tuple(found), f"{len(found)} validation images of {data}")


def _spread(paths: Sequence[Path]) -> list[Path]:
    """At most `IMAGES` of them, evenly spread: neighbours are often of one scene."""
    chosen = np.linspace(0, len(paths) - 1, min(IMAGES, len(paths))).round().astype(int)
    return [paths[index] for index in np.random.default_rng(0).permutation(chosen)]  # a short measurement sees few
