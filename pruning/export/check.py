"""After an export: does the exported network answer as the checkpoint does, and how fast is it beside it?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from paretoprune.base.image_size import ImageSize, height_width
from paretoprune.pruning.data.dataset import read_image, validation_images
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.export.accuracy import ExportAccuracy
from paretoprune.pruning.export.outputs import differences, layout_of
from paretoprune.pruning.latency.pair import time_pair, timing_conditions
from paretoprune.pruning.latency.runtimes import image_channels
from paretoprune.pruning.latency.runtimes.autobackend import Backend
from paretoprune.pruning.latency.statistics import with_session_variance
from paretoprune.pruning.yolo.loading import load_model

# Two runtimes in 32 bits differ by 1e-5 at most; one that computes in 16 bits, as OpenVINO does by itself on a CPU that
# can, differed by 0.05 in a score and 0.007 in a box; another network, or a mistaken layout, by ten times that.
EXACT = 1e-3
SCORE_TOLERANCE = 0.1
BOX_TOLERANCE = 0.02  # of the image's side
IMAGES = 8
MOST_CANDIDATES = 1000  # files that are looked at for as many that can be read


@dataclass(frozen=True)
class ExportCheck:
    """How far the exported network's answers are from the checkpoint's on real images, up to the decoded boxes.

    score_difference: the largest absolute one of any class score, visibility of a keypoint or mask (of any value, for
    a network without boxes). box_difference: the largest one of any coordinate, keypoints' too, as a fraction of the
    image's side, among boxes that the checkpoint gives a score above 0.25; 0 where it finds none. objects: how many
    those are. left_out: images that could not be read, with the reason.
    """

    images: int
    objects: int
    score_difference: float
    box_difference: float
    left_out: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether both differences are within what another runtime's arithmetic explains, in 16 bits if need be."""
        return self.score_difference <= SCORE_TOLERANCE and self.box_difference <= BOX_TOLERANCE

    @property
    def verdict(self) -> str:
        """In words."""
        if max(self.score_difference, self.box_difference) <= EXACT:
            return "the same as the checkpoint's"
        return "close to the checkpoint's, as in 16 bits" if self.ok else "NOT the checkpoint's"


@dataclass(frozen=True)
class ExportLatency:
    """Both networks in turn through Ultralytics' own backend, times in milliseconds; speedup: exported over the other.

    speedup_ci95: as of a `LatencyResult`. against: what it was timed beside.
    """

    median_ms: float
    p90_ms: float
    against_median_ms: float
    speedup: float
    speedup_ci95: tuple[float, float]
    against: str

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types."""
        return {**asdict(self), "speedup_ci95": list(self.speedup_ci95)}


def verdict_on(outputs: ExportCheck | None, accuracy: ExportAccuracy | None, precision: str) -> dict[str, Any]:
    """`ok` and `verdict` on an export, and what its `outputs` say of it; those of a file with suppression say nothing.

    A quantised network's outputs are no other's, so an int8 file is judged by its accuracy.
    """
    useful = accuracy is None or accuracy.useful
    if outputs is None or (precision == "int8" and not outputs.ok):
        verdict = "as accurate as it should be" if useful else "NOT the checkpoint's"
        ok = useful
    else:
        verdict, ok = outputs.verdict, outputs.ok and useful
    return {"ok": ok, "verdict": verdict, **({} if outputs is None else asdict(outputs))}


@dataclass(frozen=True)
class RealImages:
    """What an export is checked on, each (1, channels, height, width) in [0, 1]; `left_out`: what could not be read."""

    images: tuple[torch.Tensor, ...]
    left_out: tuple[str, ...] = ()


def real_images(network: nn.Module, imgsz: ImageSize, data: str | None = None) -> RealImages:
    """The first images of the dataset's validation split that can be read, else the two that Ultralytics brings along.

    As many channels as the network takes, by Ultralytics' own reading of such a dataset: one is grey, three are
    colours, and files of more must hold that many. Raises PruningError where there is none.
    """
    from ultralytics.utils import ASSETS

    channels, found, left_out = image_channels(network), list[torch.Tensor](), list[str]()
    for path in validation_images(data, network)[:MOST_CANDIDATES] if data else sorted(ASSETS.glob("*.jpg")):
        image, fault = read_image(path, channels)
        if image is None:
            left_out.append(f"{path} {fault}")
            continue
        found.append(_letterboxed(image, imgsz))
        if len(found) == IMAGES:
            break
    if not found:
        why = f" (the first: {left_out[0]})" if left_out else ""
        raise PruningError(
            f"an export is checked on real images of {channels} channels, but there are none{why}; give --data with a "
            "val split"
        )
    return RealImages(tuple(found), tuple(left_out))


def check_export(
    exported: str | Path,
    original: nn.Module | str | Path,
    imgsz: ImageSize,
    device: str = "cpu",
    data: str | None = None,
    images: RealImages | None = None,
    precision: str = "fp32",
) -> ExportCheck:
    """Compare both on `images`, else on those of `real_images`; the file runs in `precision`."""
    network = original if isinstance(original, nn.Module) else load_model(original)
    images = images or real_images(network, imgsz, data)
    pair = Backend(network, imgsz, device), Backend(exported, imgsz, device, precision=precision)
    layout = layout_of(network, height_width(imgsz))
    rows = [differences(pair[0](image), pair[1](image), layout) for image in images.images]
    objects, scores, boxes = (list(column) for column in zip(*rows, strict=True))
    return ExportCheck(len(rows), sum(objects), max(scores), max(boxes), images.left_out)


def measure_export(
    exported: str | Path,
    against: str | Path,
    imgsz: ImageSize,
    device: str = "cpu",
    threads: int | None = None,
    max_seconds: float = 8.0,
    target_halfwidth: float = 0.01,
    trust: bool = False,
    precision: str = "fp32",
    batch: int = 1,
) -> ExportLatency:
    """Time `exported` beside `against` in turn with the paired method of `pruning.latency.pair`, `batch` images each.

    A file runs in `precision`. Both go through Ultralytics' backend, whose bringing of images and answers to the
    runtime counts for both. The caller keeps the device free of others.
    """
    with timing_conditions(threads):
        first, second = (Backend(each, imgsz, device, trust, precision, batch) for each in (exported, against))
        times = time_pair(first, second, max_seconds, target_halfwidth)
    own, interval = times.all_ms("candidate"), with_session_variance(times.speedup)
    return ExportLatency(
        median_ms=float(np.median(own)),
        p90_ms=float(np.quantile(own, 0.9)),
        against_median_ms=float(np.median(times.all_ms("baseline"))),
        speedup=times.speedup.value,
        speedup_ci95=(interval.low, interval.high),
        against=Path(against).name,
    )


def _letterboxed(image: Any, imgsz: ImageSize) -> torch.Tensor:
    """As validation would show it: scaled to fit, padded with grey, colours as RGB, in [0, 1]."""
    from ultralytics.data.augment import LetterBox

    picture = LetterBox(height_width(imgsz))(image=image)
    picture = picture[..., ::-1] if picture.shape[2] == 3 else picture
    return torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))[None].float() / 255
