"""Fine-tuning that keeps a pruned network pruned, never ends worse than it began, and says nothing."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from paretoprune.pruning.data.dataset import check_dataset, dataset_file, training_images
from paretoprune.pruning.device import Gate, NullGate, torch_device
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.evaluation.evaluator import EVALUATION_BATCH, Evaluator, refuse_non_finite
from paretoprune.pruning.training.batch_of_one import check_batch
from paretoprune.pruning.training.retries import Listener, Remedies, free_memory
from paretoprune.pruning.training.schedule import epochs_with_mosaic
from paretoprune.pruning.training.teacher import check_teacher
from paretoprune.pruning.yolo.image_size import check_image_size
from paretoprune.pruning.yolo.precision import training_precision
from paretoprune.pruning.yolo.saving import stock_args, task_of
from paretoprune.pruning.yolo.ultralytics_logging import preserved_random_state, quiet_ultralytics

if TYPE_CHECKING:
    from paretoprune.pruning.training.trainer import Job

__all__ = ["FinetuneResult", "FinetuneSettings", "Gate", "NullGate", "finetune"]


@dataclass(frozen=True)
class FinetuneSettings:
    """How to fine-tune; a value out of range raises PruningError at construction."""

    epochs: int = 3
    """Passes over the training images, at least 1."""
    imgsz: int = 320
    """Image size, pixels; a multiple of 32."""
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
    """Learn the outputs of `teacher`, the unpruned network, and no labels (`finetune_teacher`): a few steps do not
    harm then, but the teacher's accuracy is the most that can be reached."""
    amp: bool = True
    """Mixed precision (bfloat16) where the device gains by it (see `precision.training_precision`)."""
    mosaic: bool | None = None
    """Join four images into one in the earlier epochs; None: only from 10 epochs on. A classifier's never are."""
    weight_decay: float = 0.0005
    """AdamW's weight decay (not on biases and normalisation); none with a teacher, whose weights are to stay."""
    evaluation_batch: int = EVALUATION_BATCH
    """Images per validation batch; as `evaluate` has it, so that the figures are the same."""

    def __post_init__(self) -> None:
        for name in ("epochs", "imgsz", "batch", "evaluation_batch"):
            if getattr(self, name) < 1:
                raise PruningError(f"`{name} >= 1` must hold, but got {name}={getattr(self, name)}")
        check_image_size(self.imgsz)
        if self.lr is not None and not 0 < self.lr <= 1:
            raise PruningError(f"lr must be in (0, 1], or None to have it chosen, but got {self.lr}")


@dataclass(frozen=True)
class FinetuneResult:
    """The best network seen, the start included, and how it came about.

    `model`: on the CPU, float32, eval mode, stock classes, the start's widths. `metrics`: its, as `evaluate` gives
    them. `start_metrics`: the start network's. `epochs`: run; `best_epoch`: that of `model`, 0 for the start itself.
    `history`: a row per epoch (`epoch`, `lr` at its end, losses, the averaged network's metrics, `seconds` so far).
    `epochs`, `seconds` and `history` include those of earlier attempts that this one went on from. `retries`: a line
    for each remedy that was needed to get to the end (`finetune_remedies`). `precision`: "bf16" or "fp32".
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


def finetune(
    model: nn.Module,
    data: str,
    settings: FinetuneSettings,
    save_dir: Path,
    device: str = "cpu",
    gate: Gate | None = None,
    teacher: nn.Module | None = None,
    on_epoch: Callable[[int, dict[str, float]], bool] | None = None,
    start_metrics: Mapping[str, float] | None = None,
) -> FinetuneResult:
    """Train a copy of `model` (its widths stay as they are) on `data` and return the best network of all epochs.

    The start network is validated first and is a candidate, so the result is never worse than it on the validation
    split; `start_metrics`, what `evaluate` gave for it, saves that. `on_epoch(epoch, metrics)` is called after each
    epoch, counted from 1; True ends the training. `gate` is entered around each training batch and each validation
    batch. Ultralytics' log goes to `save_dir/train.log`; nothing is printed, and nothing else is left but `args.yaml`
    there and the label cache beside the labels.

    After each epoch but the last its state is kept in `save_dir`, and removed at the end. Called again with the same
    settings after a death, it goes on from there (see `finetune_state.restore`): `on_epoch` hears of the earlier epochs
    again first, and what gets used of `model` is its architecture. Where the device has no memory left, it goes on with
    half the batch (gradients of two halves are added), where the loss becomes NaN or infinite, with a lower learning
    rate; each once.

    Several devices, as in `cuda:0,cuda:1`, train together, a process each (see `pruning.training.ddp`).

    Raises PruningError for unusable data, and `settings.distill` without a `teacher`; NonFiniteError for a loss or
    weights that become NaN or infinite again (naming the epoch).
    """
    _check(model, data, settings, device, teacher)
    if "," in str(device):
        from paretoprune.pruning.training.ddp import finetune_on_group as train
    else:
        train = train_here
    return train(model, data, settings, Path(save_dir), device, gate, teacher, on_epoch, start_metrics)


def train_here(
    model: nn.Module,
    data: str,
    settings: FinetuneSettings,
    save_dir: Path,
    device: str = "cpu",
    gate: Gate | None = None,
    teacher: nn.Module | None = None,
    on_epoch: Callable[[int, dict[str, float]], bool] | None = None,
    start_metrics: Mapping[str, float] | None = None,
    also: tuple[type[Any], ...] = (),
    log: str = "train.log",
    remedies: Remedies | None = None,
) -> FinetuneResult:
    """`finetune` in this process, its arguments known to be good.

    `also`: classes mixed into the trainer, in front: this is one process of a group, which tries no remedies by itself
    but the `remedies` given; one that does not validate returns the start network.
    """
    begin = time.monotonic()
    gate, heard = gate or NullGate(), Listener(on_epoch)
    with quiet_ultralytics(save_dir / log), preserved_random_state():
        from paretoprune.pruning.training.resume_state import StateFile
        from paretoprune.pruning.training.trainer import Job

        state = StateFile(save_dir, _identity(model, data, settings))
        known = dict(start_metrics) if start_metrics else {}
        job = Job(model, gate, state, settings.lr, teacher if settings.distill else None, heard, known)
        job.mixed = training_precision(model, device, settings.amp) == "bf16"
        job.remedies = remedies or saved_remedies(model, data, settings, save_dir)
        while (further := _attempt(job, data, settings, save_dir, device, also)) is not None:
            job.remedies = further
            free_memory()
    state.remove()
    best = job.best or model
    best.args = stock_args(model, {"imgsz": settings.imgsz, "data": str(data)})  # type: ignore[assignment]
    return FinetuneResult(
        model=best,
        metrics=job.metrics,
        start_metrics=job.start_metrics,
        epochs=len(job.history),
        best_epoch=job.best_epoch,
        seconds=time.monotonic() - begin + job.seconds_before,
        lr=job.peak_lr,
        history=job.history,
        retries=job.remedies.notes,
        precision=training_precision(model, device, settings.amp),
    )


def _attempt(
    job: Job, data: str, settings: FinetuneSettings, save_dir: Path, device: str, also: tuple[type[Any], ...]
) -> Remedies | None:
    """Train from the last state, or from the start, to the end; the remedies of another attempt where it failed."""
    from ultralytics.utils import LOGGER

    from paretoprune.pruning.training.resume_state import measured, recall
    from paretoprune.pruning.training.trainer import make_trainer

    evaluator = Evaluator(data, settings.imgsz, device, settings.evaluation_batch, "val", job.gate, settings.workers)
    with contextlib.ExitStack() as closing:
        closing.callback(_remove_if_empty, save_dir / "weights")
        closing.callback(evaluator.close)
        job.begin(evaluator)
        if job.saved is not None and any(
            job.on_epoch(int(row["epoch"]), measured(row)) for row in job.saved["history"]
        ):
            recall(job, job.saved)  # whoever listens ends it with an epoch of an earlier attempt
            return None
        trainer = make_trainer(job, _overrides(job, data, settings, save_dir, device), also)
        closing.callback(trainer.close)
        try:
            trainer.train()
        except Exception as error:
            further = None if also else job.remedies.against(error)
            if further is None:
                raise
            LOGGER.warning(f"{further.notes[-1]}: once more")
            return further
    return None


def saved_remedies(model: nn.Module, data: str, settings: FinetuneSettings, save_dir: Path) -> Remedies:
    """What an attempt that died had tried by then."""
    from paretoprune.pruning.training.resume_state import StateFile

    return Remedies.from_state((StateFile(save_dir, _identity(model, data, settings)).load() or {}).get("remedies"))


def _identity(model: nn.Module, data: str, settings: FinetuneSettings) -> dict[str, Any]:
    """What must be equal for a fine-tuning to go on from a state: its recipe and the architecture."""
    recipe = {name: value for name, value in asdict(settings).items() if name != "workers"}
    return {
        **recipe,
        "data": str(data),
        "widths": {name: list(value.shape) for name, value in model.state_dict().items()},
    }


def _check(model: nn.Module, data: str, settings: FinetuneSettings, device: str, teacher: nn.Module | None) -> None:
    for name in str(device).split(","):
        torch_device(name.strip())
    if settings.distill and teacher is None:
        raise PruningError("distillation needs a teacher, but got none: pass the unpruned model, or set distill off")
    if settings.distill and teacher is not None:
        check_teacher(teacher, settings.imgsz)
    refuse_non_finite(model)
    check_dataset(data, model)
    processes = len(str(device).split(","))
    check_batch(model, settings.imgsz, settings.batch // processes, training_images(data, model, 2))


# What a checkpoint's own training says about the data: a detector of digits was trained without flips, and a
# fine-tuning that flips them makes it worse (0.894 -> 0.866 mAP over 6 epochs of the built-in dataset).
_INHERITED = (
    "hsv_h hsv_s hsv_v degrees translate scale shear perspective flipud fliplr bgr mixup cutmix copy_paste "
    "copy_paste_mode auto_augment erasing box cls dfl pose kobj overlap_mask mask_ratio single_cls"
).split()


def inherited_arguments(model: nn.Module) -> dict[str, Any]:
    """The augmentation and loss weights that `model` was trained with, where its checkpoint says so."""
    args = getattr(model, "args", None)
    known = args if isinstance(args, dict) else vars(args) if args is not None else {}
    return {name: known[name] for name in _INHERITED if known.get(name) is not None}


def stock_amp(model: nn.Module, device: str, wanted: bool) -> str | bool:
    """Ultralytics' `amp` for `training_precision`: "bf16" on a GPU, else False, since it refuses others.

    Not True: that is fp16, and has Ultralytics test for it with a model that it downloads.
    """
    on_gpu = torch_device(device).type == "cuda"
    return "bf16" if on_gpu and training_precision(model, device, wanted) == "bf16" else False


def _overrides(job: Job, data: str, settings: FinetuneSettings, save_dir: Path, device: str) -> dict[str, Any]:
    """Ultralytics' training arguments. What is not named keeps its default."""
    mosaic = epochs_with_mosaic(settings.epochs) if settings.mosaic is None else settings.epochs * settings.mosaic
    return {
        **inherited_arguments(job.model),
        "model": "pruned.pt",  # a name only: the network is already there
        "data": str(dataset_file(data, task_of(job.model))),
        "save_dir": str(save_dir.resolve()),
        "device": device,
        "epochs": settings.epochs,
        "imgsz": settings.imgsz,
        "batch": -(-settings.batch // job.remedies.parts),
        # Gradients of as many images as were asked for; otherwise they are added up to 64: a quarter of the steps
        "nbs": settings.batch,
        "workers": settings.workers,
        "seed": settings.seed,
        "patience": settings.patience,
        "optimizer": "AdamW",
        "momentum": 0.9,
        "weight_decay": 0.0 if settings.distill else settings.weight_decay,
        "warmup_epochs": 0.0,  # `rate_factor` rises instead, for biases like for all others
        "mosaic": 1.0 if mosaic else 0.0,
        "close_mosaic": settings.epochs - mosaic if mosaic else 0,
        "amp": stock_amp(job.model, device, settings.amp),
        "plots": False,
        "save": True,  # of the state between epochs
        "verbose": False,
        "exist_ok": True,
    }


def _remove_if_empty(folder: Path) -> None:
    """The stock trainer makes a folder for weights, and none are written."""
    with contextlib.suppress(OSError):
        folder.rmdir()
