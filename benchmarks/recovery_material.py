"""What the recovery benchmark measures: a trained detector with its data, its plans, and ways to fine-tune."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from torch import nn

from benchmarks.surgery import commit
from paretoprune.pruning.evaluation.evaluator import Evaluator
from paretoprune.pruning.importance import Evidence, score
from paretoprune.pruning.importance.allocation import share_left
from paretoprune.pruning.plan import Plan
from paretoprune.pruning.surgery.surgery import prune, resolve
from paretoprune.pruning.training.finetune import finetune
from paretoprune.pruning.training.settings import FinetuneSettings
from paretoprune.pruning.workbench import Workbench
from paretoprune.pruning.yolo.saving import plain_copy
from paretoprune.pruning.yolo.ultralytics_logging import preserved_random_state, quiet_ultralytics

LESS = (15, 30, 45)  # per cent of the multiply-adds that a plan removes


@dataclass
class Subject:
    """A checkpoint, its data and everything that is made of them once. Networks are on the CPU.

    `seed`: of the choice of calibration images and of what is looked at in them.
    """

    name: str
    checkpoint: str
    data: str
    imgsz: int
    seed: int = 0

    @cached_property
    def bench(self) -> Workbench:
        bench = Workbench(self.checkpoint, self.data, self.imgsz, seed=self.seed)
        bench.scores = self.kept(bench.importance, lambda: bench.scores)
        return bench

    def kept(self, criterion: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Scores that a run before this one computed, too, where the code is the same; shape (class_count,)."""
        code = commit()
        path = Path(tempfile.gettempdir()) / f"recovery-{self.name}-{criterion}-{self.seed}-{code}.npy"
        if code == "unknown" or code.endswith("-dirty"):
            return make()
        if not path.is_file():
            np.save(path, make())
        found: np.ndarray = np.load(path)
        return found

    @cached_property
    def evaluator(self) -> Evaluator:
        return Evaluator(self.data, self.imgsz, "cpu", workers=0)

    def map50_95(self, model: nn.Module) -> float:
        return round(self.evaluator.run(model)["map50_95"], 4)

    def uniform(self, less: int) -> dict[int, int]:
        """Widths by group id: one ratio for all layers, the one whose multiply-adds come nearest to `less` % fewer."""
        shares = {}
        for ratio in np.arange(0.01, 0.8, 0.005):
            widths = resolve(self.bench.table, {"*": float(ratio)}, self.bench.round_to)
            shares[abs(self.share(widths) - 1 + less / 100)] = widths
        return shares[min(shares)]

    def by_sensitivity(self, less: int) -> dict[int, int]:
        """Widths by group id: what the product's allocation takes for `less` % fewer multiply-adds."""
        ratios = self.bench.allocated(1 - less / 100)
        assert ratios is not None, f"{less} % fewer multiply-adds are out of reach"
        return resolve(self.bench.table, ratios, self.bench.round_to)

    def share(self, widths: Mapping[int, int]) -> float:
        """Multiply-adds under these widths over the unpruned network's."""
        return share_left(self.bench.table, self.bench.conv_costs, widths)

    def scores(self, criterion: str) -> np.ndarray:
        """The criterion's scores, shape (class_count,)."""
        kept: dict[str, np.ndarray] = self.__dict__.setdefault("_scores", {})
        if criterion not in kept:
            bench = self.bench
            evidence = Evidence(bench.model, bench.table, bench.calibration, bench.seed, bench.device)
            kept[criterion] = self.kept(criterion, partial(score, criterion, evidence))
        return kept[criterion]

    def pruned(self, widths: Mapping[int, int], criterion: str) -> tuple[nn.Module, Plan]:
        return prune(self.bench.model, self.bench.table, widths, self.scores(criterion))

    def recovered(self, widths: Mapping[int, int], criterion: str = "", how: str = "refit") -> nn.Module:
        """The pruned network after a recovery without gradients."""
        model, plan = self.pruned(widths, criterion or self.bench.importance)
        self.bench.recover(model, plan, how)
        return model


# -- fine-tuning -----------------------------------------------------------------------------------------------------

UNMIXED = "without mixed precision"
ARMS: dict[str, dict[str, Any]] = {
    "ours": {},
    "with distillation": {"distill": True},
    "Ultralytics' defaults": {"stock": True},
    UNMIXED: {"amp": False},
    "without warm-up": {"patches": {"rate_factor": "no_rise"}},
    "without averaging": {"patches": {"averaging": "no_average"}},
    "learning rate 5e-4": {"lr": 5e-4},
    "with mosaic": {"mosaic": True},
}
"""What is changed in each arm against ours; precision is mixed on CPUs with AMX and on GPUs only."""


def tune(subject: Subject, start: nn.Module, epochs: int, seed: int, arm: str, folder: Path) -> dict[str, Any]:
    """Fine-tune a copy of `start` and say what the best and the last epoch scored, the start not counted."""
    what = dict(ARMS[arm])
    if what.pop("stock", False):
        course, seconds = stock_course(subject, start, epochs, seed, folder)
        return {"map50_95": max(course), "last": course[-1], "tune_seconds": seconds}
    patches = what.pop("patches", {})
    settings = FinetuneSettings(epochs=epochs, imgsz=subject.imgsz, seed=seed, workers=0, **what)
    teacher = subject.bench.model if settings.distill else None
    with contextlib.ExitStack() as stack:
        for name, replacement in patches.items():
            stack.enter_context(mock.patch(f"paretoprune.pruning.training.trainer.{name}", _REPLACED[replacement]))
        result = finetune(start, subject.data, settings, folder, teacher=teacher)
    course = [row["map50_95"] for row in result.history]
    best = max(course)
    return {
        "map50_95": round(result.metrics["map50_95"], 4),
        "epochs_alone": round(best, 4),
        "last": round(course[-1], 4),
        "tune_seconds": round(result.seconds, 1),
    }


def _no_rise(step: int, steps: int, final: float = 0.05) -> float:
    return final + (1 - final) * (1 + float(np.cos(np.pi * min(1.0, step / max(1, steps - 1))))) / 2


def _no_average(steps: int) -> tuple[float, float]:
    return 0.0, 1.0


_REPLACED = {"no_rise": _no_rise, "no_average": _no_average}


def stock_course(subject: Subject, start: nn.Module, epochs: int, seed: int, folder: Path) -> tuple[list[float], float]:
    """mAP50-95 after each epoch of `YOLO.train` with its defaults, kept from bringing the unpruned network back."""
    import time

    from ultralytics.models.yolo.detect import DetectionTrainer

    course: list[float] = []

    def look(trainer: Any) -> None:
        course.append(subject.map50_95(plain_copy(trainer.ema.ema)))

    begin = time.monotonic()
    with quiet_ultralytics(folder / "train.log"), preserved_random_state(), _no_files(DetectionTrainer):
        overrides = {"model": "pruned.pt", "data": subject.data, "epochs": epochs, "imgsz": subject.imgsz, "seed": seed}
        silent = {"save_dir": str(folder), "workers": 0, "plots": False, "verbose": False, "val": False}
        trainer = DetectionTrainer(overrides={**overrides, **silent, "device": "cpu", "exist_ok": True})
        trainer.model = plain_copy(start)  # a module: `setup_model` leaves it as it is
        trainer.add_callback("on_train_epoch_end", look)
        trainer.train()
    return course, round(time.monotonic() - begin, 1)


@contextlib.contextmanager
def _no_files(trainer: type[Any]) -> Iterator[None]:
    """Neither checkpoints nor a last validation from them: the course is looked at epoch by epoch."""
    with contextlib.ExitStack() as stack:
        for name in ("save_model", "final_eval"):
            stack.enter_context(mock.patch.object(trainer, name, return_value=None))
        stack.enter_context(mock.patch.object(trainer, "validate", return_value=({}, 0.0)))
        yield
