"""After an export: does the exported network answer as the checkpoint does, and how fast is it beside it?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pruning.errors import PruningError
from pruning.evaluation_dataset import image_files
from pruning.export_answers import Layout, differences, layout_of
from pruning.latency import time_pair, timing_conditions
from pruning.latency_stats import across_sessions
from pruning.quiet import quiet_ultralytics

# Two runtimes in 32 bits differ by 1e-5 at most; one that computes in 16 bits, as OpenVINO does by itself on a CPU that
# can, differed by 0.05 in a score and 0.007 in a box; another network, or a mistaken layout, by ten times that.
EXACT = 1e-3
SCORE_TOLERANCE = 0.1
BOX_TOLERANCE = 0.02  # of the image's side
IMAGES = 8


@dataclass(frozen=True)
class ExportCheck:
    """How far the exported network's answers are from the checkpoint's on real images, up to the decoded boxes.

    score_difference: the largest absolute one of any class score, visibility of a keypoint or mask (of any value, for
    a network without boxes). box_difference: the largest one of any coordinate, keypoints' too, as a fraction of the
    image's side, among boxes that the checkpoint gives a score above 0.25; 0 where it finds none. objects: how many
    those are.
    """

    images: int
    objects: int
    score_difference: float
    box_difference: float

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


class Backend:
    """A checkpoint or an exported network as Ultralytics runs it: images in, decoded predictions out.

    Raises PruningError where the format's runtime is not installed or cannot load the file.
    """

    def __init__(self, path: str | Path, imgsz: int, device: str = "cpu") -> None:
        from ultralytics.nn.autobackend import AutoBackend

        self._device = torch.device(device)
        self._input = torch.zeros(1, 3, imgsz, imgsz, device=self._device)
        with quiet_ultralytics():
            try:
                self._model = AutoBackend(str(path), device=self._device, fp16=False, verbose=False)
                self._model.eval()
                self(self._input)
            except Exception as error:  # whatever a runtime raises, or the import of one that is missing
                line = " ".join(str(error).split())[:200]
                raise PruningError(
                    f"'{path}' cannot be run here ({type(error).__name__}: {line}); install its runtime to check it"
                ) from error

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
        """(1, 3, imgsz, imgsz) in [0, 1] -> the outputs that are used, (1, values, boxes) for a detector.

        A checkpoint gives them together with what only its loss looks at.
        """
        answer = self._model(images.to(self._device))
        outputs = list(answer) if isinstance(answer, (list, tuple)) else [answer]
        if isinstance(outputs[0], (list, tuple)):
            outputs = list(outputs[0])
        used = [output for output in outputs if isinstance(output, (torch.Tensor, np.ndarray))]
        return [torch.as_tensor(output).float().cpu().numpy() for output in used]

    def layout(self) -> Layout:
        """What a checkpoint's outputs mean; of an exported network nobody knows."""
        return layout_of(self._model.model, int(self._input.shape[-1]))

    def time_ms(self) -> float:
        """One inference to its end: the answer is brought to the CPU."""
        start = time.perf_counter()
        self(self._input)
        return (time.perf_counter() - start) * 1e3


def check_export(
    exported: str | Path, original: str | Path, imgsz: int, device: str = "cpu", data: str | None = None
) -> ExportCheck:
    """Compare both on real images: of the dataset's validation split, else the two that Ultralytics brings along."""
    pair = Backend(original, imgsz, device), Backend(exported, imgsz, device)
    images = [_letterboxed(path, imgsz) for path in _real_images(data)]
    layout = pair[0].layout()
    rows = [differences(pair[0](image), pair[1](image), layout) for image in images]
    objects, scores, boxes = (list(column) for column in zip(*rows, strict=True))
    return ExportCheck(len(images), sum(objects), max(scores), max(boxes))


def measure_export(
    exported: str | Path,
    against: str | Path,
    imgsz: int,
    device: str = "cpu",
    threads: int | None = None,
    max_seconds: float = 8.0,
    target_halfwidth: float = 0.01,
) -> ExportLatency:
    """Time `exported` beside `against` in turn, batch 1, with the paired method of `pruning.latency`.

    Both go through Ultralytics' backend, whose bringing of images and answers to the runtime counts for both. The
    caller keeps the device free of others.
    """
    with timing_conditions(threads):
        first, second = Backend(exported, imgsz, device), Backend(against, imgsz, device)
        times = time_pair(first, second, max_seconds, target_halfwidth)
    own, interval = times.all_ms("candidate"), across_sessions(times.speedup)
    return ExportLatency(
        median_ms=float(np.median(own)),
        p90_ms=float(np.quantile(own, 0.9)),
        against_median_ms=float(np.median(times.all_ms("baseline"))),
        speedup=times.speedup.value,
        speedup_ci95=(interval.low, interval.high),
        against=Path(against).name,
    )


def _real_images(data: str | None) -> Sequence[Path]:
    from ultralytics.utils import ASSETS

    found = image_files(data, "val", IMAGES) if data else sorted(ASSETS.glob("*.jpg"))
    if not found:
        raise PruningError("an export is checked on real images, but there are none; give --data with a val split")
    return found


def _letterboxed(path: Path, imgsz: int) -> torch.Tensor:
    """The image as validation would show it: scaled to fit, padded with grey, RGB in [0, 1]."""
    import cv2
    from ultralytics.data.augment import LetterBox

    picture = LetterBox((imgsz, imgsz))(image=cv2.imread(str(path)))
    return torch.from_numpy(np.ascontiguousarray(picture[..., ::-1].transpose(2, 0, 1)))[None].float() / 255
