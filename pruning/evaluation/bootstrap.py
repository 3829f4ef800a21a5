"""How much of a difference in accuracy is the choice of validation images: a paired bootstrap over them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from paretoprune.pruning.device import nothing
from paretoprune.pruning.errors import PruningError

FloatArray = npt.NDArray[np.float64]
RESAMPLES = 200
MAX_SECONDS = 30.0
FEWEST_RESAMPLES = 20


@dataclass(frozen=True)
class ImageStats:
    """What one validation saw, image by image, in the loader's order.

    Per image, with p predictions and t targets: `tp` (p, 10) whether a prediction is right at IoU 0.50 to 0.95, `conf`
    (p,), `pred_cls` (p,), `target_cls` (t,).
    """

    tp: Sequence[npt.NDArray[np.bool_]]
    conf: Sequence[FloatArray]
    pred_cls: Sequence[FloatArray]
    target_cls: Sequence[FloatArray]

    def __len__(self) -> int:
        return len(self.tp)

    def accuracy(self, images: npt.NDArray[np.int64] | None = None) -> tuple[float, float]:
        """(mAP50-95, mAP50) over `images` (indices, repeats allowed; None: all), as Ultralytics computes them."""
        from ultralytics.utils.metrics import ap_per_class

        chosen = range(len(self)) if images is None else images
        parts = (self.tp, self.conf, self.pred_cls, self.target_cls)
        joined = [np.concatenate([part[i] for i in chosen], 0) for part in parts]
        if not len(joined[3]):
            return 0.0, 0.0
        precision_at = ap_per_class(*joined)[5]  # (classes, 10)
        return (float(precision_at.mean()), float(precision_at[:, 0].mean())) if len(precision_at) else (0.0, 0.0)


@dataclass(frozen=True)
class PairedNoise:
    """Of the differences (other minus reference) in mAP50-95 and mAP50 over resampled images.

    `difference`, `std`, `ci95`: of mAP50-95; `std50`: of mAP50. `images`: how many there are; `resamples`: how many
    times they were drawn.
    """

    difference: float
    std: float
    ci95: tuple[float, float]
    std50: float
    images: int
    resamples: int


def paired_bootstrap(
    reference: ImageStats,
    other: ImageStats,
    resamples: int = RESAMPLES,
    seed: int = 0,
    max_seconds: float = MAX_SECONDS,
    pause: Callable[[], None] = nothing,
) -> PairedNoise:
    """Bootstrap over images, both networks judged on the same resample each time (Efron and Tibshirani 1993, ch. 8).

    `ci95` is the percentile interval. Ends after `max_seconds`, but not before 20 resamples; deterministic for a `seed`
    otherwise. `pause`: called between two resamples, where others may use the device. Raises PruningError where the two
    did not see the same images, or fewer than two.
    """
    if len(reference) != len(other) or len(reference) < 2:
        raise PruningError(
            f"both networks must be validated on the same two images or more, but got {len(reference)} and {len(other)}"
        )
    generator = np.random.default_rng(seed)
    began = time.monotonic()
    rows: list[FloatArray] = []
    while len(rows) < resamples and (len(rows) < FEWEST_RESAMPLES or time.monotonic() - began < max_seconds):
        pause()
        images = generator.integers(0, len(reference), len(reference))
        rows.append(np.subtract(other.accuracy(images), reference.accuracy(images)))
    differences = np.array(rows)
    low, high = np.quantile(differences[:, 0], [0.025, 0.975])
    std, std50 = differences.std(axis=0, ddof=1)
    whole = other.accuracy()[0] - reference.accuracy()[0]
    return PairedNoise(whole, float(std), (float(low), float(high)), float(std50), len(reference), len(rows))


def image_stats(stats: dict[str, Any], suffix: str) -> ImageStats:
    """From the lists that Ultralytics' metrics hold before joining. `suffix`: B, M or P (boxes, masks, points)."""
    right = {"B": "tp", "M": "tp_m", "P": "tp_p"}[suffix]
    return ImageStats(*(list(stats[name]) for name in (right, "conf", "pred_cls", "target_cls")))
