"""One trial: a plan in, a record out. No Ray and no torch here, so that it can be tested alone.

Phases: prune, recover, finetune (or evaluate, without epochs), save, wait_for_device, latency. Work on the device is
done under the gate's ``using()``, the latency under its ``measuring()``: it is never measured beside something else of
the run.
"""

from __future__ import annotations

import math
import platform
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from results.atomic import write_json
from results.records import TrialRecord, TrialState
from search.errors import TrialError
from search.events import PhaseClock
from search.request import RECORD_NAME, TrialRequest

TRIAL_LOG = "trial.log"
CHECKPOINT_NAME = "pruned.pt"
PLAN_NAME = "plan.json"

OnEpoch = Callable[[int, Mapping[str, float]], bool]
"""Called after every epoch with its number and metrics; True ends the fine-tuning there."""


class DeviceGate(Protocol):
    """Shared and exclusive use of a device (see ``cluster.device_lock.DeviceLock``)."""

    def using(self) -> AbstractContextManager[None]: ...
    def measuring(self) -> AbstractContextManager[None]: ...


class PlanLike(Protocol):
    """What a trial needs of a plan."""

    @property
    def ratios(self) -> Mapping[str, float]: ...
    @property
    def hash(self) -> str: ...
    def save(self, path: Path) -> object: ...


@dataclass(frozen=True)
class Tuned:
    """What a fine-tuning gave: the best network, its metrics and the start's, all on the validation split.

    ``best_epoch`` 0: no epoch was better than the start, which is what ``model`` then is.
    """

    model: Any
    epochs: int
    best_epoch: int
    start_metrics: Mapping[str, float]
    metrics: Mapping[str, float]


class TrialTools(Protocol):
    """Everything a trial does to a network; ``search.tools`` does it with the pruning room, tests with fakes.

    ``evaluate`` and ``finetune`` take the device by themselves, batch by batch; the others are called inside the gate.
    """

    device: str

    def logging(self, path: Path) -> AbstractContextManager[None]:
        """Send the libraries' chatter to ``path`` for a while."""
        ...

    def plan_hash(self, ratios: Mapping[str, float]) -> str:
        """The hash that the plan of ``ratios`` has."""
        ...

    def prune(self, ratios: Mapping[str, float]) -> tuple[Any, PlanLike]:
        """A new, pruned network."""
        ...

    def recover(self, model: Any, plan: PlanLike) -> None:
        """Refit in place, no gradient step."""
        ...

    def stats(self, model: Any) -> dict[str, float]:
        """``params_m``, ``gflops``, ``size_mb``."""
        ...

    def evaluate(self, model: Any) -> dict[str, float]:
        """``map50_95``, ``map50``, ``precision``, ``recall``."""
        ...

    def finetune(self, model: Any, folder: Path, on_epoch: OnEpoch | None) -> Tuned:
        """The short fine-tuning."""
        ...

    def save(self, model: Any, path: Path) -> None:
        """A checkpoint that stock Ultralytics loads."""
        ...

    def measure(self, model: Any) -> dict[str, Any]:
        """Latency beside the baseline: the fields of ``pruning.latency.LatencyResult``."""
        ...

    def release(self) -> None:
        """Give memory of the finished trial back."""
        ...


@dataclass(frozen=True)
class TrialSettings:
    """``epochs`` of short fine-tuning; the run's ``baseline_latency_ms``, to which ratios are brought back."""

    epochs: int
    recover: bool
    baseline_latency_ms: float


def run_trial(
    request: TrialRequest,
    settings: TrialSettings,
    tools: TrialTools,
    gate: DeviceGate,
    folder: Path,
    on_epoch: OnEpoch | None = None,
) -> TrialRecord:
    """Evaluate one plan in ``folder`` and return its record, which then also lies there as ``record.json``.

    Any exception of a phase becomes a failed record with a one-line reason, its traceback goes to the trial's log:
    otherwise one bad plan would end the sweep. Only an unwritable folder raises (OSError).
    """
    folder.mkdir(parents=True, exist_ok=True)
    clock = PhaseClock(folder / "events.jsonl")
    try:
        with tools.logging(folder / TRIAL_LOG):
            record = _evaluate(request, settings, tools, gate, folder, clock, on_epoch)
    except Exception as error:  # noqa: BLE001  contained: see above
        with (folder / TRIAL_LOG).open("a", encoding="utf-8") as log:
            traceback.print_exc(file=log)
        record = failed_record(request, f"{clock.current}: {one_line(error)}", _hash(tools, request), clock.seconds)
    finally:
        tools.release()
    # First here, then by the driver into trials.jsonl: a driver that died meanwhile finds it at its next start.
    write_json(folder / RECORD_NAME, record.to_json())
    clock.event("finished", state=record.state.value)
    return record


def failed_record(
    request: TrialRequest, reason: str, plan_hash: str, seconds: Mapping[str, float] | None = None, device: str = ""
) -> TrialRecord:
    """The record of a trial that gave no figures."""
    return TrialRecord(
        trial_id=request.trial_id,
        state=TrialState.FAILED,
        plan_hash=plan_hash,
        ratios=dict(request.ratios),
        metrics={},
        epochs=0,
        fidelity="refit",
        seconds=dict(seconds or {}),
        device=device,
        node=platform.node(),
        error=reason,
        finished_at=time.time(),
        provenance=request.provenance,
    )


def one_line(error: BaseException) -> str:
    """``Type: first line`` of an exception, at most 300 characters."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text[:300]


def latency_metrics(measured: Mapping[str, Any], baseline_latency_ms: float) -> dict[str, Any]:
    """A measurement beside the baseline in a record's words.

    ``latency_ratio`` is candidate / baseline of the same session; ``latency_ms`` is that ratio times the run's
    baseline latency, so that a clock that drifted between trials does not reorder them.
    """
    speedup = float(measured["speedup"])
    if not math.isfinite(speedup) or speedup <= 0:
        raise TrialError(f"a measured speed-up must be above 0, got {speedup}; measure again on a calmer machine")
    return {
        "latency_ms": baseline_latency_ms / speedup,
        "latency_ratio": 1.0 / speedup,
        "latency_measured_ms": float(measured["median_ms"]),
        "latency_p90_ms": float(measured["p90_ms"]),
        "baseline_latency_measured_ms": float(measured["baseline_median_ms"]),
        "speedup": speedup,
        "speedup_ci95": [float(bound) for bound in measured["speedup_ci95"]],
    }


def _evaluate(
    request: TrialRequest,
    settings: TrialSettings,
    tools: TrialTools,
    gate: DeviceGate,
    folder: Path,
    clock: PhaseClock,
    on_epoch: OnEpoch | None,
) -> TrialRecord:
    with clock.phase("prune"), gate.using():
        model, plan = tools.prune(request.ratios)
    if settings.recover:
        with clock.phase("recover"), gate.using():
            tools.recover(model, plan)
    tuned = _tuned(model, settings, tools, folder, clock, on_epoch)
    metrics: dict[str, Any] = {**tuned.metrics, "map50_95_refit": tuned.start_metrics["map50_95"]}
    with clock.phase("save"):
        metrics.update(tools.stats(tuned.model))
        tools.save(tuned.model, folder / CHECKPOINT_NAME)
        plan.save(folder / PLAN_NAME)
    measured = _measure(tools, gate, tuned.model, clock)
    metrics.update(latency_metrics(measured, settings.baseline_latency_ms))
    return TrialRecord(
        trial_id=request.trial_id,
        state=TrialState.COMPLETED,
        plan_hash=plan.hash,
        ratios=dict(plan.ratios),
        metrics=metrics,
        epochs=tuned.epochs,
        fidelity="epochs" if tuned.epochs else "refit",
        seconds={name: round(value, 4) for name, value in clock.seconds.items()},
        device=tools.device,
        node=platform.node(),
        error=None,
        finished_at=time.time(),
        provenance=request.provenance,
    )


def _tuned(
    model: Any,
    settings: TrialSettings,
    tools: TrialTools,
    folder: Path,
    clock: PhaseClock,
    on_epoch: OnEpoch | None,
) -> Tuned:
    """The network to judge. The fine-tuning validates its start itself, so that is not done twice."""
    if settings.epochs:
        with clock.phase("finetune"):
            return tools.finetune(model, folder, on_epoch)
    with clock.phase("evaluate"):
        accuracy = tools.evaluate(model)
    return Tuned(model, 0, 0, accuracy, accuracy)


def _measure(tools: TrialTools, gate: DeviceGate, model: Any, clock: PhaseClock) -> dict[str, Any]:
    """Latency alone on the device. The wait for it is a phase of its own: it is not the trial's work."""
    with ExitStack() as stack:
        with clock.phase("wait_for_device"):
            stack.enter_context(gate.measuring())
        with clock.phase("latency"):
            return tools.measure(model)


def _hash(tools: TrialTools, request: TrialRequest) -> str:
    """The plan's hash for a failed record; an unusable plan has none, and its failure must still be recorded."""
    try:
        return tools.plan_hash(request.ratios)
    except Exception:  # noqa: BLE001  see above
        return ""
