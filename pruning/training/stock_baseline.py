"""A native rival: a smaller stock model, brought to the dataset with the same budget as a pick."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from paretoprune.base.device_gate import Gate
from paretoprune.pruning.data.class_subset import subset_names
from paretoprune.pruning.data.dataset import class_counts, dataset_file
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.surgery.classes import class_numbers, with_classes
from paretoprune.pruning.training.finetune import finetune
from paretoprune.pruning.training.settings import FinetuneSettings
from paretoprune.pruning.training.single_device import stock_amp
from paretoprune.pruning.training.teacher import own_teacher
from paretoprune.pruning.yolo.loading import checked_file, load_model
from paretoprune.pruning.yolo.saving import stock_args, task_of
from paretoprune.pruning.yolo.tasks import accuracy_name, kind_of, metric_keys
from paretoprune.pruning.yolo.ultralytics_logging import preserved_random_state, quiet_ultralytics, trusting

AS_PICKS = "fine-tuned like the picks"
AS_ULTRALYTICS = "fresh head, trained by Ultralytics' own defaults"


@dataclass(frozen=True)
class NativeResult:
    """`model`: on the CPU, float32, eval mode. `epochs`: run; `best_epoch`: the kept one. `recipe`: how, in words."""

    model: nn.Module
    epochs: int
    best_epoch: int
    recipe: str
    seconds: float


def check_native(path: str | Path, task: str, trust: bool = False) -> None:
    """Raise PruningError unless `path` is a checkpoint of the same task. ``trust`` as in `load_model`."""
    found = task_of(load_model(path, trust))
    if found != task:
        raise PruningError(f"a native rival must have the task '{task}', but '{path}' has '{found}': give another one")


def train_native(
    path: str | Path,
    data: str,
    settings: FinetuneSettings,
    save_dir: Path,
    device: str = "cpu",
    gate: Gate | None = None,
    on_epoch: Callable[[int, dict[str, float]], bool] | None = None,
    single_class: bool = False,
    trust: bool = False,
    teacher: tuple[Path, bool] | None = None,
) -> NativeResult:
    """Train the stock model at `path` on `data` for `settings.epochs`, keeping the best epoch.

    single_class: all classes are taken as one, as the pruned model was trained. trust: as in `load_model`. teacher: the
    file of the picks' `settings.taught_by`, and whether it is trusted; what it cannot teach learns the labels alone.

    Of a dataset of some classes (`data.class_subset`) that it knows by their names, it keeps these. With the dataset's
    number of classes it is fine-tuned as the picks are. With another number it gets a fresh head,
    and the whole training is Ultralytics' own (`YOLO(path).train(...)` with its default optimizer, warm-up and
    augmentation): a new head needs larger steps than a network that only has to recover, and this is what one would do
    without this project. Raises PruningError for unusable data and for an accuracy or weights that are not finite.
    """
    begin = time.monotonic()
    model = load_model(path, trust)
    if kept := subset_names(data):
        with suppress(PruningError):  # it does not know them: it gets a fresh head
            model = with_classes(model, class_numbers(model, kept))
    has, wanted = class_counts(data, model, single_class)
    if has == wanted:
        model.args = {**stock_args(model), "single_cls": single_class}  # type: ignore[assignment]
        own, recipe = None, AS_PICKS
        if teacher is not None:
            try:
                own = own_teacher(teacher[0], model, settings.side, teacher[1])
            except PruningError:
                settings, recipe = replace(settings, taught_by=""), f"{AS_PICKS}, but without their teacher"
        tuned = finetune(model, data, settings, save_dir, device, gate, own, on_epoch)
        return NativeResult(tuned.model, tuned.epochs, tuned.best_epoch, recipe, time.monotonic() - begin)
    best, epochs, best_epoch = _train_stock(
        path, model, data, settings, save_dir, device, gate, on_epoch, single_class, trust
    )
    return NativeResult(best, epochs, best_epoch, AS_ULTRALYTICS, time.monotonic() - begin)


def _train_stock(
    path: str | Path,
    model: nn.Module,
    data: str,
    settings: FinetuneSettings,
    save_dir: Path,
    device: str,
    gate: Gate | None,
    on_epoch: Callable[[int, dict[str, float]], bool] | None,
    single_class: bool,
    trust: bool,
) -> tuple[nn.Module, int, int]:
    from ultralytics import YOLO

    kind, seen = kind_of(model), list[float]()
    name = accuracy_name(kind)

    def report(trainer: Any) -> None:
        """Called after every epoch, and once more for the final validation of the best one."""
        if len(seen) >= trainer.epochs or trainer.epoch < len(seen):
            return
        seen.append(float(trainer.metrics.get(metric_keys(kind)[name], 0.0)))
        if on_epoch and on_epoch(len(seen), {name: seen[-1]}):
            trainer.stop = True

    with quiet_ultralytics(save_dir / "train.log"), trusting(trust), preserved_random_state():
        yolo = YOLO(str(checked_file(path, trust)))
        yolo.add_callback("on_fit_epoch_end", report)
        with gate.using() if gate else nullcontext():
            yolo.train(
                data=str(dataset_file(data, task_of(model))), epochs=settings.epochs,
                imgsz=settings.side, batch=settings.batch,
                patience=settings.patience or settings.epochs, seed=settings.seed, workers=settings.workers,
                device=device, amp=stock_amp(model, device, settings.amp), name="stock",
                project=str(save_dir.resolve()), exist_ok=True, plots=False, verbose=False,
                single_cls=single_class, **settings.train,
            )  # fmt: skip
        best = Path(yolo.trainer.best)
    if not best.is_file():
        raise PruningError(f"training '{path}' must leave a checkpoint, but there is no {best}; see its train.log")
    return load_model(best, trust), len(seen), seen.index(max(seen)) + 1 if seen else 0
