"""Fine-tuning in this process, on one device: attempts, each going on from the last one's state."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from paretoprune.base.device_gate import Gate
from paretoprune.pruning.data.dataset import dataset_file
from paretoprune.pruning.device import NullGate, torch_device
from paretoprune.pruning.evaluation.evaluator import Evaluator
from paretoprune.pruning.training.retries import OncePerEpoch, RetryPolicy, free_memory
from paretoprune.pruning.training.schedule import epochs_with_mosaic
from paretoprune.pruning.training.settings import FinetuneResult, FinetuneSettings
from paretoprune.pruning.yolo.precision import training_precision
from paretoprune.pruning.yolo.saving import stock_args, task_of
from paretoprune.pruning.yolo.ultralytics_logging import preserved_random_state, quiet_ultralytics

if TYPE_CHECKING:
    from paretoprune.pruning.training.trainer import Job


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
    classes: torch.Tensor | None = None,
    also: tuple[type[Any], ...] = (),
    log: str = "train.log",
    remedies: RetryPolicy | None = None,
) -> FinetuneResult:
    """`finetune` in this process, its arguments known to be good.

    `also`: classes mixed into the trainer, in front: this is one process of a group, which tries no remedies by itself
    but the `remedies` given; one that does not validate returns the start network.
    """
    begin = time.monotonic()
    gate, heard = gate or NullGate(), OncePerEpoch(on_epoch)
    with quiet_ultralytics(save_dir / log), preserved_random_state():
        from paretoprune.pruning.training.resume_state import StateFile
        from paretoprune.pruning.training.trainer import Job

        state = StateFile(save_dir, _identity(model, data, settings))
        known = dict(start_metrics) if start_metrics else {}
        job = Job(model, gate, state, settings.lr, teacher if settings.learns else None, classes, heard, known)
        job.labels = not settings.distill
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
) -> RetryPolicy | None:
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


def saved_remedies(model: nn.Module, data: str, settings: FinetuneSettings, save_dir: Path) -> RetryPolicy:
    """What an attempt that died had tried by then."""
    from paretoprune.pruning.training.resume_state import StateFile

    return RetryPolicy.from_state((StateFile(save_dir, _identity(model, data, settings)).load() or {}).get("remedies"))


def _identity(model: nn.Module, data: str, settings: FinetuneSettings) -> dict[str, Any]:
    """What must be equal for a fine-tuning to go on from a state: its recipe and the architecture."""
    recipe = {name: value for name, value in asdict(settings).items() if name != "workers"}
    for name in ("train", "taught_by"):  # a state of an older version does not have them
        if not recipe[name]:
            del recipe[name]
    return {
        **recipe,
        "data": str(data),
        "widths": {name: list(value.shape) for name, value in model.state_dict().items()},
    }


# What a checkpoint's own training says about the data: a detector of digits was trained without flips, and a
# fine-tuning that flips them makes it worse (0.894 -> 0.866 mAP over 6 epochs of the built-in dataset).
_INHERITED = (
    "hsv_h hsv_s hsv_v degrees translate scale shear perspective flipud fliplr bgr mixup cutmix copy_paste "
    "copy_paste_mode auto_augment erasing box cls dfl pose kobj overlap_mask mask_ratio single_cls"
).split()


# What is off where a teacher's outputs are learned in few epochs: few steps are better spent on images like those that
# the network is judged on. yolov8n of VOC with 38 % of its work, at 256 px, refitted, 0.423 mAP: an epoch (150 steps)
# with the checkpoint's own augmentation 0.417, without 0.437. Flips stay, as in its training.
_LIKE_THE_JUDGED = dict.fromkeys(
    "hsv_h hsv_s hsv_v degrees translate scale shear perspective bgr mixup cutmix copy_paste erasing".split(), 0.0
) | {"auto_augment": None}


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
        **(_LIKE_THE_JUDGED if settings.distill and not epochs_with_mosaic(settings.epochs) else {}),
        "mosaic": 1.0 if mosaic else 0.0,
        "close_mosaic": settings.epochs - mosaic if mosaic else 0,
        **settings.train,
        "model": "pruned.pt",  # a name only: the network is already there
        "data": str(dataset_file(data, task_of(job.model))),
        "save_dir": str(save_dir.resolve()),
        "device": device,
        "epochs": settings.epochs,
        "imgsz": settings.side,
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
