"""Ultralytics' trainer, made to train the network it is given and nothing else.

The stock trainer rebuilds a network from its yaml (a pruned one comes back unpruned, silently), warms biases up at a
rate that ruins a good start, saves in half precision, reloads what it saved, restarts from disk on NaN, and halves the
batch in silence where memory runs out. Each of these is replaced here; its loop, losses, data loading, augmentation and
mixed precision are used as they are.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import ModelEMA, unwrap_model

from paretoprune.base.device_gate import Gate
from paretoprune.pruning.device import GatedLoader, device_synchronizer, gated_dataset
from paretoprune.pruning.errors import NonFiniteError
from paretoprune.pruning.evaluation.evaluator import Evaluator, refuse_non_finite
from paretoprune.pruning.training.batch_of_one import lone_last_batch_left_out
from paretoprune.pruning.training.resume_state import StateFile, capture, measured, restore
from paretoprune.pruning.training.retries import OnEpoch, RetryPolicy
from paretoprune.pruning.training.schedule import averaging, learning_rate, rate_factor, taught_rate
from paretoprune.pruning.training.teacher import TaughtModel
from paretoprune.pruning.yolo.saving import plain_copy
from paretoprune.pruning.yolo.tasks import accuracy_name, kind_of, trainer_of
from paretoprune.pruning.yolo.ultralytics_logging import preserved_random_state


@dataclass
class Job:
    """What one fine-tuning is given and what comes out of it, epoch by epoch. Epoch 0 is the start network.

    `saved`: the state that this attempt goes on from, if any; what came before it took `seconds_before`. `mixed`: in
    bfloat16 where autocast has it so. `classes`: what each counts to who learns from `teacher`; `labels`: whether they
    are learned, beside a teacher too. `rate`: found on the first batch, before remedies, where a teacher alone is
    learned.
    """

    model: nn.Module
    gate: Gate
    state: StateFile
    lr: float | None
    teacher: nn.Module | None
    classes: torch.Tensor | None
    on_epoch: OnEpoch
    known_start: dict[str, float]
    mixed: bool = False
    labels: bool = True
    remedies: RetryPolicy = field(default_factory=RetryPolicy)
    evaluator: Evaluator | None = None
    saved: Mapping[str, Any] | None = None
    best: nn.Module | None = None
    best_epoch: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    start_metrics: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    seconds_before: float = 0.0
    peak_lr: float = 0.0
    rate: float | None = None

    def begin(self, evaluator: Evaluator) -> None:
        """An attempt: from the state that is kept, or anew."""
        self.evaluator = evaluator
        self.saved = self.state.load()
        self.best, self.best_epoch, self.history, self.seconds_before = None, 0, [], 0.0

    @property
    def accuracy(self) -> str:
        """The metric that decides which network is the best."""
        return accuracy_name(kind_of(self.model))

    def consider(self, epoch: int, model: nn.Module, metrics: dict[str, float]) -> None:
        """Keep `model` if it is better than every earlier one, the start included; on a tie the earlier stays."""
        if epoch == 0:
            self.start_metrics = dict(metrics)
        if self.best is None or metrics[self.accuracy] > self.metrics[self.accuracy]:
            self.best, self.best_epoch, self.metrics = model, epoch, dict(metrics)


class _InPlaceTraining:
    """Mixed into a task's trainer; what it overrides is listed in the module's first lines."""

    # What the stock trainer provides; declared for the reader and the type checker
    args: Any
    data: dict[str, Any]
    model: Any
    ema: Any
    epoch: int
    epochs: int
    accumulate: int
    amp: bool
    stop: bool
    loss: torch.Tensor
    optimizer: torch.optim.Optimizer
    train_loader: Any
    test_loader: Any
    stopper: Any
    device: torch.device
    start_epoch: int
    world_size: int
    train_time_start: float

    def __init__(self, job: Job, overrides: dict[str, Any]) -> None:
        self.job = job
        self.steps_done = 0
        self.taught: TaughtModel | None = None
        self.loaders: list[GatedLoader] = []
        super().__init__(overrides=overrides)  # type: ignore[call-arg]
        self.add_callback("on_train_epoch_start", _raise_out_of_memory)  # type: ignore[attr-defined]
        self.model = plain_copy(job.model)  # a module, so `setup_model` leaves it as it is

    # -- set-up ------------------------------------------------------------------------------------------------------

    def get_dataset(self) -> Any:
        content = super().get_dataset()  # type: ignore[misc]
        if self.args.task == "classify":
            # A class's number is its place in the network's names, not among the folders that this dataset happens to
            # have: the stock trainer would number the folders anew.
            content["names"] = dict(self.job.model.names)  # type: ignore[arg-type]
        return content

    def build_dataset(self, img_path: str, mode: str = "train", batch: int | None = None) -> Any:
        return gated_dataset(super().build_dataset(img_path, mode, batch), self.job.gate)  # type: ignore[misc]

    def get_dataloader(self, dataset_path: str, batch_size: int = 16, rank: int = 0, mode: str = "train") -> Any:
        with contextlib.ExitStack() as stack:
            if mode == "train":
                processes = self.world_size if rank != -1 else 1
                stack.enter_context(lone_last_batch_left_out(self.job.model, self.args.imgsz, processes))
            loader = super().get_dataloader(dataset_path, batch_size, rank, mode)  # type: ignore[misc]
        self.loaders.append(GatedLoader(loader, self.job.gate, device_synchronizer(self.device)))
        return self.loaders[-1]

    def set_model_attributes(self) -> None:
        super().set_model_attributes()  # type: ignore[misc]
        layout = torch.channels_last if self.device.type == "cpu" else torch.preserve_format
        self.model = self.model.to(memory_format=layout)  # a step takes 0.81 of the time in fp32, 0.80 in bf16
        if self.job.teacher is not None:
            teacher = plain_copy(self.job.teacher).to(self.device).to(memory_format=torch.channels_last)
            self.model = TaughtModel(teacher, self.model, self.job.classes, self.job.labels)
            self.taught = None if self.job.labels else self.model

    def build_optimizer(self, model: nn.Module, name: str = "auto", lr: float = 0.0, *rest: Any, **kwargs: Any) -> Any:
        self.job.rate = self.job.saved["rate"] if self.job.saved is not None else None
        peak = self.job.lr or self.job.rate or learning_rate(self.total_steps)
        self.args.lr0 = self.job.peak_lr = peak * self.job.remedies.lr_scale
        LOGGER.info(f"{self.total_steps} steps, learning rate {self.args.lr0:.3g}")
        return super().build_optimizer(model, name, self.args.lr0, *rest, **kwargs)  # type: ignore[misc]

    def _setup_scheduler(self) -> None:
        super()._setup_scheduler()  # type: ignore[misc]
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda _: 1.0)  # set by step instead

    def _setup_train(self) -> None:
        with self.job.gate.using():  # reading labels and copying networks keeps a CPU as busy as a batch does
            super()._setup_train()  # type: ignore[misc]
            finish = device_synchronizer(self.device)
            if finish is not None:
                finish()
        if self.device.type == "cpu":
            # After the set-up, which allows mixed precision on GPUs only; its loop is for CPUs, too, whose autocast is
            # to bfloat16 and needs no scaler
            self.amp = self.job.mixed
        decay, tau = averaging(self.total_steps)
        self.ema = ModelEMA(self.model, decay=decay, tau=tau)
        if self.job.saved is None:
            self.epoch = -1  # so that the start network is epoch 0
            self.validate()
        else:
            restore(self, self.job.saved)
            LOGGER.info(f"going on after epoch {self.start_epoch}/{self.epochs}")

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""
        return max(1, self.epochs * len(self.train_loader) // self.accumulate)

    # -- steps and epochs --------------------------------------------------------------------------------------------

    def optimizer_step(self) -> None:
        if not bool(torch.isfinite(self.loss)):
            raise NonFiniteError(
                f"the training loss must stay finite, but became {float(self.loss)} in epoch {self.epoch + 1}; "
                "use a lower learning rate, or turn mixed precision off"
            )
        if self.taught is not None and self.job.rate is None and self.job.lr is None:
            self.job.rate = taught_rate(self.agreed(self.taught.longest_step()))
            self.args.lr0 = self.job.peak_lr = self.job.rate * self.job.remedies.lr_scale
            LOGGER.info(f"learning rate {self.args.lr0:.3g}, from the first batch")
            for group in self.optimizer.param_groups:
                group["initial_lr"] = self.job.peak_lr
        factor = rate_factor(self.steps_done, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        super().optimizer_step()  # type: ignore[misc]
        self.steps_done += 1

    def agreed(self, step: float) -> float:
        """What all processes of a group go by; this is the only one."""
        return step

    def validate(self) -> tuple[dict[str, float], float]:
        """The averaged network's accuracy; it becomes the result if it is the best so far."""
        model = plain_copy(unwrap_model(self.ema.ema))
        refuse_non_finite(model, f" after epoch {self.epoch + 1} of fine-tuning" if self.epoch >= 0 else "")
        assert self.job.evaluator is not None, "given to every attempt"
        known = self.job.known_start if self.epoch < 0 else {}
        with preserved_random_state():  # its first run draws for its set-up: that must not depend on when it is
            metrics = known or self.job.evaluator.run(model)
        self.job.consider(self.epoch + 1, model, metrics)
        LOGGER.info(f"epoch {self.epoch + 1}/{self.epochs} " + " ".join(f"{k}={v:.4f}" for k, v in metrics.items()))
        return dict(metrics), metrics[self.job.accuracy]

    def save_metrics(self, metrics: dict[str, Any]) -> None:
        """One epoch's row of the history, instead of a line of results.csv; asks whether to go on."""
        rates = [value for name, value in metrics.items() if name.startswith("lr/")]
        figures = {k: float(v) for k, v in metrics.items() if not k.startswith(("lr/", "val/", "metrics/"))}
        row = {"epoch": float(self.epoch + 1), "lr": float(rates[0]), **figures}
        row["seconds"] = time.time() - self.train_time_start + self.job.seconds_before
        self.job.history.append(row)
        LOGGER.info("  ".join(f"{k}={v:.5g}" for k, v in row.items()))
        if self.job.on_epoch(self.epoch + 1, measured(row)):
            self.stop = True

    # -- what the stock trainer does with files ----------------------------------------------------------------------

    def save_model(self) -> bool:
        """What the next epoch needs, where there is one; the best network is kept in memory in full precision."""
        if not self.stop:
            self.job.state.save(capture(self))
        return False

    def final_eval(self) -> None:
        """Nothing: the best network was validated in its own epoch."""

    def _handle_nan_recovery(self, epoch: int) -> bool:
        """No recovery from disk: `optimizer_step` and `validate` have raised by now."""
        return False

    def close(self) -> None:
        """Give the gate back and end the workers, however the training ended."""
        for loader in self.loaders:
            loader.release()
            loader.close()


def _raise_out_of_memory(trainer: Any) -> None:
    """Let the stock loop pass the error on in its first epoch, too, where it would halve the batch repeatedly."""
    trainer._oom_retries = 3


def make_trainer(job: Job, overrides: dict[str, Any], also: tuple[type[Any], ...] = ()) -> Any:
    """The trainer of the job's network with the changes above, `also` in front of them.

    Raises PruningError for a task that is not trained here.
    """
    stock = trainer_of(kind_of(job.model))
    trainer = type(f"InPlace{stock.__name__}", (*also, _InPlaceTraining, stock), {})
    return trainer(job, overrides)
