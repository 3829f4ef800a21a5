"""Accuracy of an exported file beside the network's in PyTorch, on the same images in the same shapes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from paretoprune.base.device_gate import Gate
from paretoprune.base.image_size import ImageSize
from paretoprune.pruning.evaluation.bootstrap import paired_bootstrap
from paretoprune.pruning.evaluation.evaluator import Evaluator
from paretoprune.pruning.yolo.tasks import accuracy_name, kind_of

USEFUL_SHARE = 0.8  # of the network's accuracy; int8 costs a tenth of it at times, a mistaken quantisation nearly all


@dataclass(frozen=True)
class ExportAccuracy:
    """The accuracy `metric` of both on the validation images, in [0, 1]; `ci95` of the difference (file - model).

    The interval is a paired bootstrap's over the images; None for a classifier.
    """

    metric: str
    file: float
    model: float
    difference: float
    ci95: tuple[float, float] | None
    images: int

    @property
    def useful(self) -> bool:
        """Whether the file keeps four fifths of the network's accuracy."""
        return self.file >= USEFUL_SHARE * self.model

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types."""
        return {**asdict(self), "ci95": None if self.ci95 is None else list(self.ci95)}


def compare_accuracy(
    exported: Path,
    network: nn.Module,
    data: str,
    imgsz: ImageSize,
    device: str = "cpu",
    precision: str = "fp32",
    conf: float | None = None,
    gate: Gate | None = None,
) -> ExportAccuracy:
    """Validate both by Ultralytics' validator on the validation split of `data`, on images of exactly this size.

    Most files take one shape, so both get it: what `val` says of the checkpoint, in batches of the images' own shapes,
    may differ by a hundredth. conf: lowest score that counts, for files that hold non-maximum suppression.
    """
    kind = kind_of(network)
    name = accuracy_name(kind)
    evaluator = Evaluator(data, imgsz, device, batch=1, gate=gate, rect=False, conf=conf)
    try:  # the file first: it says in which shape the images are loaded
        if kind == "classify":
            its, ours = evaluator.run(network, exported, precision)[name], evaluator.run(network)[name]
            return ExportAccuracy(name, its, ours, its - ours, None, evaluator.images)
        theirs, seen = evaluator.run_by_image(network, exported=exported, precision=precision)
        own, reference = evaluator.run_by_image(network)
    finally:
        evaluator.close()
    its, ours, ci95 = theirs[name], own[name], None
    if len(reference) > 1:
        ci95 = paired_bootstrap(reference, seen).ci95
    return ExportAccuracy(name, its, ours, its - ours, ci95, len(reference))
