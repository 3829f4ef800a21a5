"""What a fine-tuning keeps on disk between two epochs, so that it goes on from its last one after any kind of death.

One file, replaced whole after every epoch but the last: weights, their average, the optimiser, the best network so far,
the history and the random states. Tensors and plain values only: it is read without unpickling any class.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import unwrap_model

from paretoprune.base.atomic import whole_file
from paretoprune.base.file_names import FINETUNE_STATE
from paretoprune.pruning.yolo.pickle_check import check_bounds
from paretoprune.pruning.yolo.saving import plain_copy


class StateFile:
    """`finetune_state.pt` of one fine-tuning. `identity`: what must be equal for a state to be its own."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.path = folder / FINETUNE_STATE
        self._identity = dict(identity)

    def load(self) -> dict[str, Any] | None:
        """The state left by an earlier attempt; None where there is none, or it is unreadable or of other settings."""
        if not self.path.is_file():
            return None
        try:
            check_bounds(self.path)
            state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: BLE001  whatever a damaged file provokes: one can always begin at the start
            LOGGER.warning(f"{self.path} cannot be read ({error}): beginning at epoch 1")
            return None
        if state.get("identity") != self._identity:
            LOGGER.warning(f"{self.path} is of other settings: beginning at epoch 1")
            return None
        return state

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the file as a whole. A disk that is full costs the safety net, not the training."""
        try:
            with whole_file(self.path) as file:
                torch.save({"identity": self._identity, **state}, file)
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
            LOGGER.warning(f"{self.path} could not be written ({error}): after a crash this fine-tuning begins anew")

    def remove(self) -> None:
        """The fine-tuning is done. Also what a killed writer left."""
        with contextlib.suppress(OSError):
            for path in [self.path, *self.path.parent.glob(f".{FINETUNE_STATE}.*.tmp")]:
                path.unlink(missing_ok=True)


def capture(trainer: Any) -> dict[str, Any]:
    """Everything that the next epoch of `trainer` depends on, between two epochs. `epoch`: how many are done."""
    job, average = trainer.job, unwrap_model(trainer.ema.ema)
    dataset = trainer.train_loader.dataset
    return {
        "epoch": trainer.epoch + 1,
        "steps": trainer.steps_done,
        "rate": job.rate,
        "seconds": time.time() - trainer.train_time_start + job.seconds_before,
        "model": unwrap_model(trainer.model).state_dict(),
        "ema": average.state_dict(),
        "ema_updates": trainer.ema.updates,
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "stopper": {name: value for name, value in vars(trainer.stopper).items() if _is_plain(value)},
        "criterion": _plain_values(unwrap_model(trainer.model).criterion),
        "best": job.best.state_dict(),
        "best_epoch": job.best_epoch,
        "metrics": job.metrics,
        "start_metrics": job.start_metrics,
        "history": job.history,
        "remedies": job.remedies.to_state(),
        "random": _random_state(trainer.train_loader.generator),
        "buffer": [int(index) for index in getattr(dataset, "buffer", ())],
    }


def restore(trainer: Any, state: Mapping[str, Any]) -> None:
    """Put `trainer`, set up for its first epoch, where `capture` was called.

    On a CPU, whose data is loaded in this process, the epochs that follow are bit for bit those of an uninterrupted
    fine-tuning. Loading processes of a GPU look ahead and have random states of their own: there they are equivalent.
    """
    job, model = trainer.job, unwrap_model(trainer.model)
    model.load_state_dict(state["model"])
    trainer.ema.ema.load_state_dict(state["ema"])
    trainer.ema.updates = state["ema_updates"]
    _restore_optimizer(trainer.optimizer, state["optimizer"])
    trainer.scaler.load_state_dict(state["scaler"])
    vars(trainer.stopper).update(state["stopper"])
    if state["criterion"]:
        model.criterion = model.init_criterion()
        vars(model.criterion).update(state["criterion"])
    recall(job, state)
    trainer.steps_done = state["steps"]
    trainer.start_epoch = state["epoch"]
    _restore_data(trainer, state)


def recall(job: Any, state: Mapping[str, Any]) -> None:
    """What the earlier attempts found: the best network so far and the history."""
    job.best = plain_copy(job.model)
    job.best.load_state_dict(state["best"])
    job.best_epoch, job.metrics = state["best_epoch"], dict(state["metrics"])
    job.start_metrics, job.history = dict(state["start_metrics"]), [dict(row) for row in state["history"]]
    job.seconds_before = state["seconds"]


def _restore_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    # The peak rate and the kernel are this attempt's: another device or a lowered rate may be why there is another.
    own = [{name: group.get(name) for name in ("initial_lr", "fused")} for group in optimizer.param_groups]
    optimizer.load_state_dict(dict(state))
    for group, values in zip(optimizer.param_groups, own, strict=True):
        group.update(values)


def _restore_data(trainer: Any, state: Mapping[str, Any]) -> None:
    """The order of the images, the images at hand for mosaics, and every random state, in this order."""
    boundary = trainer.epochs - trainer.args.close_mosaic
    if trainer.args.close_mosaic and trainer.start_epoch > boundary:
        trainer._close_dataloader_mosaic()
        trainer.args.close_mosaic = 0  # done: doing it again would draw from the generator once more
    loader = trainer.train_loader.wrapped
    generator: torch.Generator = loader.generator
    if loader.num_workers:
        generator.manual_seed(generator.initial_seed() + trainer.start_epoch)
    else:
        if loader.iterator is None:
            loader.iterator = loader._get_iterator()
        for _ in range(len(loader)):  # where the sampler stands after an epoch: asked to go on, it draws once more
            next(loader.iterator._sampler_iter)
        dataset = loader.dataset
        if trainer.args.close_mosaic:  # else nobody looks at what was loaded last
            for index in state["buffer"]:
                dataset.load_image(index)
        generator.set_state(state["random"]["loader"])
    _set_random_state(state["random"])


def _random_state(generator: torch.Generator) -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": [
            str(kind),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "loader": generator.get_state(),
    }


def _set_random_state(state: Mapping[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def _plain_values(thing: object) -> dict[str, Any]:
    """The counters of a loss that changes from epoch to epoch (that of the end-to-end heads); {} for all others."""
    return {name: value for name, value in vars(thing).items() if _is_plain(value)} if hasattr(thing, "update") else {}


def _is_plain(value: object) -> bool:
    return isinstance(value, (bool, int, float))


def measured(row: Mapping[str, float]) -> dict[str, float]:
    """The accuracies in a row of the history: what is left without losses and bookkeeping."""
    return {name: value for name, value in row.items() if "/" not in name and name not in ("epoch", "lr", "seconds")}
