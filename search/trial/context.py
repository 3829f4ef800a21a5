"""Inputs of a trial: the device's gate, the tools that do its work, its plan. Protocols and plain data only.

``search.trial.operations`` does the work with the pruning room, tests with fakes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from paretoprune.base.image_size import ImageSize
from paretoprune.pruning.plan import Plan

OnEpoch = Callable[[int, Mapping[str, float]], bool]
"""Called after every epoch with its number and metrics; True ends the fine-tuning there."""


class PlanLike(Protocol):
    """What a trial needs of a plan."""

    @property
    def ratios(self) -> Mapping[str, float]: ...
    @property
    def imgsz(self) -> ImageSize | None: ...
    @property
    def branches(self) -> Sequence[str]: ...
    @property
    def precision(self) -> str | None: ...
    @property
    def hash(self) -> str: ...
    def save(self, path: Path, made_with: Mapping[str, Any] | None = None) -> object: ...


@dataclass(frozen=True)
class Tuned:
    """What a fine-tuning gave: the best network, its metrics and the start's, all on the validation split.

    ``best_epoch`` 0: no epoch was better than the start, which is what ``model`` then is. ``retries``: what went wrong
    and was tried again, a line each. ``precision``: what it was computed in, "bf16" or "fp32".
    """

    model: Any
    epochs: int
    best_epoch: int
    start_metrics: Mapping[str, float]
    metrics: Mapping[str, float]
    retries: Sequence[str] = ()
    precision: str = ""


class Measurement(Protocol):
    """A latency measurement that was started: done already on the trial's own device, under way on a remote one."""

    def known(self) -> Mapping[str, Any] | None:
        """What is known without waiting, in the words of a record's metrics but for the baseline; None: nothing."""
        ...

    def result(self) -> Mapping[str, Any]:
        """Wait for all of it. Raises what the measuring raised."""
        ...


@dataclass(frozen=True)
class Measured:
    """A :class:`Measurement` that is complete."""

    values: Mapping[str, Any]

    def known(self) -> Mapping[str, Any]:
        """All of it."""
        return self.values

    def result(self) -> Mapping[str, Any]:
        """All of it."""
        return self.values


class TrialOperations(Protocol):
    """Everything a trial does to a network.

    ``evaluate``, ``finetune`` (batch by batch) and ``start_measure`` take the device by themselves; the others are
    called inside the gate.
    """

    device: str

    def at(self, imgsz: ImageSize | None, precision: str | None = None) -> TrialOperations:
        """The tools for networks of another input size, pixels, or files in another precision; None: the run's."""
        ...

    def use_sample(self, run: Path) -> None:
        """Train and judge trials on the sample of images in the run folder, where there is one; called first."""
        ...

    def logging(self, path: Path) -> AbstractContextManager[None]:
        """Send the libraries' chatter to ``path`` for a while."""
        ...

    def prune(self, plan: Plan) -> tuple[Any, PlanLike]:
        """A new, pruned network, and what was done of ``plan``. Takes the device by itself, and gives it up between the
        parts of long work."""
        ...

    def recover(self, model: Any, plan: PlanLike) -> None:
        """Refit in place, no gradient step. Takes the device by itself, as :meth:`prune` does."""
        ...

    def stats(self, model: Any) -> dict[str, float]:
        """``params_m``, ``gflops``, ``size_mb``."""
        ...

    def start_measure(
        self, model: Any, keep: Callable[[Mapping[str, Any]], None] | None = None, device: str = ""
    ) -> Measurement:
        """Measure latency beside the baseline: at once on the own device, alone on it; elsewhere later.

        ``model`` is trained afterwards: whoever measures it later needs a copy. The values are the fields of
        ``pruning.latency.pair.LatencyResult``; ``keep`` gets them as soon as they are here. ``device``: a further kind
        of ``latency.targets``; "" the main one.
        """
        ...

    def evaluate(self, model: Any) -> dict[str, float]:
        """``map50_95``, ``map50``, ``precision``, ``recall``; of a classifier ``top1``, ``top5``. Where it is known,
        ``val_images``: on how many images."""
        ...

    def deployed(self, model: Any, metrics: Mapping[str, float]) -> dict[str, Any]:
        """``metrics`` with the accuracy of the file that ships in place of the network's in PyTorch, which gets a name
        of its own (``map50_95_fp32``), and what the file computes in (``deploy_precision``); as they are where the
        network itself ships. Takes the device by itself."""
        ...

    def finetune(self, model: Any, folder: Path, on_epoch: OnEpoch | None, start: Mapping[str, float]) -> Tuned:
        """The short fine-tuning. ``start``: what ``evaluate`` gave for ``model``."""
        ...

    def save(self, model: Any, path: Path) -> None:
        """A checkpoint that stock Ultralytics loads."""
        ...

    def release(self) -> None:
        """Give memory of the finished trial back."""
        ...
