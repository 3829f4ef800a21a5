"""How a fine-tuning is asked for, and what comes out of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from paretoprune.base.image_size import ImageSize, larger_side
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.evaluation.evaluator import EVALUATION_BATCH
from paretoprune.pruning.yolo.image_size import check_image_size


@dataclass(frozen=True)
class FinetuneSettings:
    """How to fine-tune; a value out of range raises PruningError at construction."""

    epochs: int = 3
    """Passes over the training images, at least 1."""
    imgsz: ImageSize = 320
    """Image size, pixels; multiples of 32. Of height and width it is what is validated, and training is by squares of
    the larger side: augmentation moves and joins images in them."""
    batch: int = 16
    """Images per optimizer step (no accumulation)."""
    lr: float | None = None
    """Peak learning rate of AdamW, in (0, 1]; None: chosen by `learning_rate`."""
    patience: int = 0
    """Stop after so many epochs without a better one; 0: never."""
    seed: int = 0
    """Of everything random: the same seed gives the same result on one CPU thread."""
    workers: int = 4
    """Data-loading processes on a GPU; on a CPU there are none."""
    distill: bool = False
    """Learn the outputs of `teacher`, the unpruned network, and no labels (`teacher`): a few steps do not
    harm then, but the teacher's accuracy is the most that can be reached."""
    taught_by: str = ""
    """What the `teacher` is called whose outputs are learned beside the labels; "": none is, unless `distill`."""
    amp: bool = True
    """Mixed precision (bfloat16) where the device gains by it (see `precision.training_precision`)."""
    mosaic: bool | None = None
    """Join four images into one in the earlier epochs; None: only from 10 epochs on. A classifier's never are."""
    train: Mapping[str, Any] = field(default_factory=dict)
    """Ultralytics' training arguments that are to differ (`own_arguments`), before all that follows from the above."""
    weight_decay: float = 0.0005
    """AdamW's weight decay (not on biases and normalisation); none with a teacher, whose weights are to stay."""
    evaluation_batch: int = EVALUATION_BATCH
    """Images per validation batch; as `evaluate` has it, so that the figures are the same."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "evaluation_batch"):
            if getattr(self, name) < 1:
                raise PruningError(f"`{name} >= 1` must hold, but got {name}={getattr(self, name)}")
        check_image_size(self.imgsz)
        if self.lr is not None and not 0 < self.lr <= 1:
            raise PruningError(f"lr must be in (0, 1], or None to have it chosen, but got {self.lr}")

    @property
    def learns(self) -> bool:
        """Whether a teacher is learned from, alone or beside the labels."""
        return self.distill or bool(self.taught_by)

    @property
    def side(self) -> int:
        """Of the squares that are trained on, pixels."""
        return larger_side(self.imgsz)


@dataclass(frozen=True)
class FinetuneResult:
    """The best network seen, the start included, and how it came about.

    `model`: on the CPU, float32, eval mode, stock classes, the start's widths. `metrics`: its, as `evaluate` gives
    them. `start_metrics`: the start network's. `epochs`: run; `best_epoch`: that of `model`, 0 for the start itself.
    `history`: a row per epoch (`epoch`, `lr` at its end, losses, the averaged network's metrics, `seconds` so far).
    `epochs`, `seconds` and `history` include those of earlier attempts that this one went on from. `retries`: a line
    for each remedy that was needed to get to the end (`retries`). `precision`: "bf16" or "fp32".
    """

    model: nn.Module
    metrics: dict[str, float]
    start_metrics: dict[str, float]
    epochs: int
    best_epoch: int
    seconds: float
    lr: float
    history: list[dict[str, float]] = field(default_factory=list)
    retries: tuple[str, ...] = ()
    precision: str = "fp32"
