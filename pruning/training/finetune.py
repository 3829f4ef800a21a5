"""Fine-tuning that keeps a pruned network pruned, never ends worse than it began, and says nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from paretoprune.base.device_gate import Gate
from paretoprune.pruning.data.dataset import check_dataset, training_images
from paretoprune.pruning.device import torch_device
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.evaluation.evaluator import refuse_non_finite
from paretoprune.pruning.training.batch_of_one import check_batch
from paretoprune.pruning.training.ddp import finetune_on_group
from paretoprune.pruning.training.own_arguments import check_arguments
from paretoprune.pruning.training.settings import FinetuneResult, FinetuneSettings
from paretoprune.pruning.training.single_device import train_here
from paretoprune.pruning.training.teacher import check_own_teacher, check_teacher


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
    classes: torch.Tensor | None = None,
) -> FinetuneResult:
    """Train a copy of `model` (its widths stay as they are) on `data` and return the best network of all epochs.

    The start network is validated first and is a candidate, so the result is never worse than it on the validation
    split; `start_metrics`, what `evaluate` gave for it, saves that. `on_epoch(epoch, metrics)` is called after each
    epoch, counted from 1; True ends the training. `gate` is entered around each training batch and each validation
    batch. Ultralytics' log goes to `save_dir/train.log`; nothing is printed, and nothing else is left but `args.yaml`
    there and the label cache beside the labels.

    After each epoch but the last its state is kept in `save_dir`, and removed at the end. Called again with the same
    settings after a death, it goes on from there (see `resume_state.restore`): `on_epoch` hears of the earlier epochs
    again first, and what gets used of `model` is its architecture. Where the device has no memory left, it goes on with
    half the batch (gradients of two halves are added), where the loss becomes NaN or infinite, with a lower learning
    rate; each once.

    `teacher`: learned from alone (`settings.distill`) or beside the labels (`settings.taught_by`); it may be another
    architecture then, see `own_teacher`. `classes`: what each class counts where it is learned from alone
    (`output_distribution.class_weights`).

    Several devices, as in `cuda:0,cuda:1`, train together, a process each (see `pruning.training.ddp`).

    Raises PruningError for unusable data, and `settings.distill` without a `teacher`; NonFiniteError for a loss or
    weights that become NaN or infinite again (naming the epoch).
    """
    _check(model, data, settings, device, teacher)
    train = finetune_on_group if "," in str(device) else train_here
    return train(model, data, settings, Path(save_dir), device, gate, teacher, on_epoch, start_metrics, classes)


def _check(model: nn.Module, data: str, settings: FinetuneSettings, device: str, teacher: nn.Module | None) -> None:
    for name in str(device).split(","):
        torch_device(name.strip())
    if settings.distill and teacher is None:
        raise PruningError("distillation needs a teacher, but got none: pass the unpruned model, or set distill off")
    if settings.distill and teacher is not None:
        check_teacher(teacher, settings.side)
    if settings.taught_by:
        if settings.distill or teacher is None:
            raise PruningError("a teacher beside the labels is one that is given, and `distill` is off: correct these")
        check_own_teacher(teacher, model, settings.side)
    check_arguments(settings.train, by_labels=not settings.distill)
    refuse_non_finite(model)
    check_dataset(data, model)
    processes = len(str(device).split(","))
    check_batch(model, settings.side, settings.batch // processes, training_images(data, model, 2))
