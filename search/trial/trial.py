"""One trial: a plan in, a record out. No Ray and no torch here, so that it can be tested alone.

Phases: prune, recover, stats, latency, evaluate, finetune, deploy (where a file ships), wait_for_latency, save;
``wait_for_device`` gets the seconds in which any of them stood still for others. Work on the device is done under the
gate's ``using()``, a part at a time, the timing of an inference under its ``measuring()``: never beside something else
of the run. Latency comes before training, since epochs do not change it and the decision to train depends on it;
accuracy without any epoch is the first rung of the stopping rule.
"""

from __future__ import annotations

import json
import math
import platform
import threading
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from paretoprune.base.atomic import write_json
from paretoprune.base.device_gate import DeviceGate
from paretoprune.base.errors import typed_line
from paretoprune.base.file_names import EVENTS, MEASURED, PLAN, PRUNED, RECORD, TRIAL_LOG
from paretoprune.cluster.errors import AgentAwayError
from paretoprune.results.store.accuracy import VAL_IMAGES, accuracies
from paretoprune.results.store.bounds import NO_BOUNDS, Bounds
from paretoprune.results.store.objectives import device_of
from paretoprune.results.store.records import CI95, DEPLOY_PRECISION, FORETOLD, PI95, SOURCE, TrialRecord, TrialState
from paretoprune.search.errors import TrialError
from paretoprune.search.stopping.rungs import Course, EarlyStopper, NeverStop
from paretoprune.search.storage.event_log import PhaseClock
from paretoprune.search.storage.request import TrialRequest, plan_of
from paretoprune.search.trial.context import Measured, Measurement, PlanLike, TrialOperations, Tuned

ITSELF: Mapping[str, Any] = {"speedup": 1.0, CI95: (1.0, 1.0)}  # of the unpruned network, over itself: by definition
MADE_WITH = ("importance", "recovery")  # of a trial's ingredients, what makes the network before any epoch

CONDITIONS = (
    "host", "device", "device_name", "driver", "runtime", "runtime_version", "precision", "baseline_precision",
    "threads", "batch", "imgsz", "span", "images",
    "clock_mhz_start", "clock_mhz_end", "power_w_start", "power_w_end", "throttled", "throttle_reasons",
    "temperature_c_start", "temperature_c_end", "governor", "power_mode", "memory_free_mb", "iterations",
    "blocks", "warmup_iterations", "seconds", "converged", "session_halfwidth", "target_halfwidth",
)  # fmt: skip
"""The conditions of a latency that a record keeps (see ``pruning.latency.pair.LatencyResult``)."""


@dataclass(frozen=True)
class TrialSettings:
    """``epochs`` of short fine-tuning; the run's ``baseline_latency_ms``, to which ratios are brought back.

    ``bounds``: a network beyond them is not trained. ``rungs``: epochs after which the judge is asked; ``accuracy``:
    name of the metric that it judges, the task's own where it is "".
    """

    epochs: int
    recover: bool
    baseline_latency_ms: float
    devices_ms: Mapping[str, float] = field(default_factory=dict)
    """Further kind of device -> the unpruned network's latency there."""
    rungs: Sequence[int] = ()
    accuracy: str = ""
    ingredients: Mapping[str, str | bool] = field(default_factory=dict)
    """How the network is made (recovery, importance, distilled), for its record's metrics."""
    bounds: Bounds = NO_BOUNDS
    foretells: bool = False
    """Whether a predicted latency may replace a measured one at the first rung."""
    deploys: bool = False
    """Whether the accuracy is that of the file that ships."""
    predicts_if_away: bool = False
    """Whether it may where the device stays away."""


@dataclass(frozen=True)
class TrialContext:
    """Where a trial is worked on: its request, the tools, the device's gate, its folder and clock."""

    request: TrialRequest
    settings: TrialSettings
    tools: TrialOperations
    gate: DeviceGate
    folder: Path
    clock: PhaseClock


def run_trial(
    request: TrialRequest,
    settings: TrialSettings,
    tools: TrialOperations,
    gate: DeviceGate,
    folder: Path,
    judge: EarlyStopper | None = None,
) -> TrialRecord:
    """Evaluate one plan in ``folder`` and return its record, which then also lies there as ``record.json``.

    ``judge`` decides at the rungs; None: every trial goes to its end. Any exception of a phase becomes a failed record
    with a one-line reason, its traceback goes to the trial's log: otherwise one bad plan would end the sweep.
    """
    clock = PhaseClock(folder / EVENTS)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tools.logging(folder / TRIAL_LOG):
            its = tools.at(request.imgsz, request.precision)
            record = _attempted(TrialContext(request, settings, its, gate, folder, clock), judge or NeverStop())
    except Exception as error:  # noqa: BLE001  contained: see above
        with suppress(OSError), (folder / TRIAL_LOG).open("a", encoding="utf-8", errors="surrogateescape") as log:
            traceback.print_exc(file=log)
        record = failed_record(request, f"{clock.current}: {typed_line(error)}", _hash(request), clock.seconds)
    finally:
        tools.release()
    # First here, then by the driver into trials.jsonl: a driver that died meanwhile finds it at its next start. Where
    # the disk is full, the driver still gets it from Ray, and decides.
    with suppress(OSError):
        write_json(folder / RECORD, record.to_json())
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
        imgsz=request.imgsz,
        branches_removed=list(request.branches_removed),
        precision=request.precision,
        metrics={},
        epochs=0,
        fidelity="refit",
        seconds=dict(seconds or {}),
        device=device,
        node=platform.node(),
        error=reason,
        finished_at=time.time(),
        provenance=request.provenance,
        retries=list(request.losses),
    )


def measured_everywhere(tools: TrialOperations, model: Any, devices: Iterable[str]) -> dict[str, Mapping[str, Any]]:
    """Kind of device -> what is measured there, on all of them at the same time; "" is the main one."""
    pending = {device: tools.start_measure(model, device=device) for device in ("", *devices)}
    return {device: measurement.result() for device, measurement in pending.items()}


def latency_metrics(measured: Mapping[str, Any], baseline_latency_ms: float, device: str = "") -> dict[str, Any]:
    """A measurement beside the baseline in a record's words; of a further kind of ``device`` with its name behind.

    ``latency_ratio`` is candidate / baseline of the same session; ``latency_ms`` is that ratio times the run's
    baseline latency, so that a clock that drifted between trials does not reorder them.
    """
    speedup = float(measured["speedup"])
    if not math.isfinite(speedup) or speedup <= 0:
        raise TrialError(f"a measured speed-up must be above 0, got {speedup}; measure again on a calmer machine")
    found = {
        "latency_ms": baseline_latency_ms / speedup,
        "latency_ratio": 1.0 / speedup,
        "latency_measured_ms": float(measured["median_ms"]),
        "latency_p90_ms": float(measured["p90_ms"]),
        "baseline_latency_measured_ms": float(measured["baseline_median_ms"]),
        "speedup": speedup,
        CI95: [float(bound) for bound in measured[CI95]],
        **{name: float(measured[name]) for name in ("energy_j",) if name in measured},
        "latency_conditions": {name: measured[name] for name in CONDITIONS if name in measured},
    }
    return {f"{name}_{device}": value for name, value in found.items()} if device else found


class Latency:
    """A trial's latency: measured at once, or predicted, and then measured if the trial continues to training.

    A timing has the device for itself, so everybody waits for it; a trial that ends at the first rung does not compete,
    and a precise prediction tells the searcher as much. What is trained is always measured. A measurement is kept in
    the trial's folder as soon as it is there, so that a trial that is begun again is not measured again.
    """

    def __init__(self, work: TrialContext, model: Any, plan_hash: str) -> None:
        self._work, self._model, self._plan_hash = work, model, plan_hash
        settings = work.settings
        self._unpruned_ms = {"": settings.baseline_latency_ms, **settings.devices_ms}  # by kind of device
        self._kept = self._kept_before()
        self._keeping = threading.Lock()  # several devices may answer at the same time
        self._measurements: dict[str, Measurement] = {device: Measured(found) for device, found in self._kept.items()}
        may_be_stopped = settings.epochs > 0 and 0 in settings.rungs
        self._foretold = work.request.foretold if settings.foretells and may_be_stopped else None
        if self._foretold is None:
            self.measure()

    def _kept_before(self) -> dict[str, Mapping[str, Any]]:
        """Kind of device -> what an earlier attempt at this trial measured there."""
        try:
            content = json.loads((self._work.folder / MEASURED).read_text(encoding="utf-8"))
            if content["plan_hash"] != self._plan_hash:
                return {}
            found = {"": content.get("measured"), **content.get("devices", {})}
            return {device: values for device, values in found.items() if values and device in self._unpruned_ms}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or a torn one
            return {}

    def _keep(self, device: str, values: Mapping[str, Any]) -> None:
        with self._keeping, suppress(OSError):
            self._kept[device] = dict(values)
            devices = {name: each for name, each in self._kept.items() if name}
            content = {"plan_hash": self._plan_hash, "measured": self._kept.get(""), "devices": devices}
            write_json(self._work.folder / MEASURED, content)

    def measure(self) -> None:
        """Measure it, or begin to, on every kind of device where that was not done."""
        for device in self._unpruned_ms:
            if device not in self._measurements:
                with self._work.clock.phase("latency"):
                    keep = partial(self._keep, device)
                    self._measurements[device] = self._work.tools.start_measure(self._model, keep, device)

    def costs(self) -> dict[str, float]:
        """What is known of it by now. A measurement elsewhere is waited for only where latency is bounded."""
        figures: dict[str, Any] = {}
        for device in self._unpruned_ms:
            measurement = self._measurements.get(device)
            bounded = self._work.settings.bounds.limit_latency and not device
            if measurement is None or bounded or measurement.known() is not None:
                figures |= self._figures_on(device)
        return {name: value for name, value in figures.items() if name in ("latency_ms", "energy_j") or device_of(name)}

    def figures(self) -> dict[str, Any]:
        """In a record's words; waits for a measurement elsewhere."""
        return {name: value for device in self._unpruned_ms for name, value in self._figures_on(device).items()}

    def _figures_on(self, device: str) -> dict[str, Any]:
        baseline_ms, foretold = self._unpruned_ms[device], self._foretold
        if device in self._measurements:
            try:
                return latency_metrics(self._measurements[device].result(), baseline_ms, device)
            except AgentAwayError:
                may = self._work.settings.predicts_if_away and not device  # nothing is predicted of further kinds
                foretold = self._work.request.foretold if may else None
                if foretold is None:
                    raise
        assert foretold is not None, "measured at once, else"
        ratio, low, high = (foretold[name] for name in ("ratio", "low", "high"))
        figures = {"latency_ms": ratio * baseline_ms, "latency_ratio": ratio, "speedup": 1 / ratio}
        return {**figures, PI95: [1 / high, 1 / low], SOURCE: FORETOLD}


def _attempted(work: TrialContext, judge: EarlyStopper) -> TrialRecord:
    """The trial; from its beginning once more where the device had no memory for it, with all of ours given back."""
    try:
        return _evaluate(work, judge)
    except Exception as error:
        from paretoprune.pruning.training.retries import is_out_of_memory

        # the fine-tuning has tried with half the batch by itself
        if work.clock.current == "finetune" or not is_out_of_memory(error):
            raise
        retry = f"{work.clock.current}: retry after {typed_line(error)}"
    work.tools.release()
    record = _evaluate(work, judge)
    return record.changed(retries=[*record.retries, retry])


def _evaluate(work: TrialContext, judge: EarlyStopper) -> TrialRecord:
    """The whole trial; what its parts raise is contained by :func:`run_trial`."""
    settings, clock = work.settings, work.clock
    model, plan = _pruned(work)
    with clock.phase("stats"), work.gate.using():
        stats = work.tools.stats(model)
    latency = Latency(work, model, plan.hash)
    course = Course(
        work.request.trial_id,
        settings.rungs,
        judge,
        settings.accuracy,
        {**stats, **latency.costs()},
        clock,
        plan.precision or "",
    )
    worth_training = settings.epochs > 0 and not _violations(settings, course.costs)
    with clock.phase("evaluate"):
        start = work.tools.evaluate(model)
    tuned = Tuned(model, 0, 0, start, start)
    if not course.reached(0, start) and worth_training:
        latency.measure()
        course.costs = {**stats, **latency.costs()}

        def on_epoch(epoch: int, metrics: Mapping[str, float]) -> bool:
            clock.event("epoch", epoch=epoch, **accuracies(metrics))
            return course.reached(epoch, metrics)

        with clock.phase("finetune", epochs=settings.epochs):
            tuned = work.tools.finetune(model, work.folder, on_epoch, start)
    accuracy: Mapping[str, Any] = tuned.metrics
    if settings.deploys:
        with clock.phase("deploy"):
            accuracy = work.tools.deployed(tuned.model, tuned.metrics)
    with clock.phase("wait_for_latency"):  # only one that is measured elsewhere takes any time here
        figures = latency.figures()
    with clock.phase("save"), work.gate.using():
        work.tools.save(tuned.model, work.folder / PRUNED)
        made_with = {name: settings.ingredients[name] for name in MADE_WITH if name in settings.ingredients}
        made_with |= {name: accuracy[name] for name in (DEPLOY_PRECISION,) if name in accuracy}
        plan.save(work.folder / PLAN, made_with)
    metrics = {**accuracy, **_refitted(tuned.start_metrics), **stats, **figures, **settings.ingredients}
    metrics |= {name: start[name] for name in (VAL_IMAGES,) if name in start}
    if tuned.precision:
        metrics["training_precision"] = tuned.precision
    cut_short = course.stopped or (settings.epochs > 0 and not worth_training)
    return TrialRecord(
        trial_id=work.request.trial_id,
        state=TrialState.STOPPED if cut_short else TrialState.COMPLETED,
        plan_hash=plan.hash,
        ratios=dict(plan.ratios),
        imgsz=plan.imgsz,
        branches_removed=list(plan.branches),
        precision=plan.precision,
        metrics=metrics,
        epochs=tuned.epochs,
        fidelity="epochs" if tuned.epochs else "refit",
        seconds={name: round(value, 4) for name, value in clock.seconds.items()},
        device=work.tools.device,
        node=platform.node(),
        error=None,
        finished_at=time.time(),
        provenance=work.request.provenance,
        history=course.history,
        retries=[*work.request.losses, *tuned.retries],
        violations=_violations(settings, metrics),
    )


def _refitted(start: Mapping[str, float]) -> dict[str, float]:
    """The accuracy before any epoch, under a name of its own (``map50_95_refit``)."""
    return {f"{name}_refit": value for name, value in accuracies(start).items()}


def _pruned(work: TrialContext) -> tuple[Any, PlanLike]:
    """The network of the plan, recovered without a gradient step."""
    with work.clock.phase("prune"):
        model, plan = work.tools.prune(plan_of(work.request))
    if work.settings.recover:
        with work.clock.phase("recover"):
            work.tools.recover(model, plan)
    return model, plan


def _violations(settings: TrialSettings, metrics: Mapping[str, Any]) -> dict[str, float]:
    """The bounds that are not kept."""
    unpruned = {"metrics": {"latency_ms": settings.baseline_latency_ms}}
    return {name: value for name, value in settings.bounds.violations(metrics, unpruned).items() if value > 0}


def _hash(request: TrialRequest) -> str:
    """The plan's hash for a failed record; an unusable plan has none, and its failure must still be recorded."""
    try:
        return plan_of(request).hash
    except Exception:  # noqa: BLE001  see above
        return ""
