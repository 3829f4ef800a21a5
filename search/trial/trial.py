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
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paretoprune.base.atomic import write_json
from paretoprune.base.device_gate import DeviceGate
from paretoprune.base.errors import typed_line
from paretoprune.base.file_names import EVENTS, MEASURED, PLAN, PRUNED, RECORD, TRIAL_LOG
from paretoprune.cluster.errors import AgentAwayError
from paretoprune.results.store.accuracy import accuracies
from paretoprune.results.store.bounds import NO_BOUNDS, Bounds
from paretoprune.results.store.records import CI95, FORETOLD, PI95, SOURCE, TrialRecord, TrialState
from paretoprune.search.errors import TrialError
from paretoprune.search.stopping.rungs import Course, Everyone, Judge
from paretoprune.search.storage.event_log import PhaseClock
from paretoprune.search.storage.request import TrialRequest, plan_of
from paretoprune.search.trial.context import Measured, Measurement, PlanLike, TrialTools, Tuned

ITSELF: Mapping[str, Any] = {"speedup": 1.0, CI95: (1.0, 1.0)}  # of the unpruned network, over itself: by definition
MADE_WITH = ("importance", "recovery")  # of a trial's ingredients, what makes the network before any epoch

CONDITIONS = (
    "host", "device", "device_name", "driver", "runtime", "runtime_version", "precision", "threads", "batch", "imgsz",
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
class Workplace:
    """Where a trial is worked on: its request, the tools, the device's gate, its folder and clock."""

    request: TrialRequest
    settings: TrialSettings
    tools: TrialTools
    gate: DeviceGate
    folder: Path
    clock: PhaseClock


def run_trial(
    request: TrialRequest,
    settings: TrialSettings,
    tools: TrialTools,
    gate: DeviceGate,
    folder: Path,
    judge: Judge | None = None,
) -> TrialRecord:
    """Evaluate one plan in ``folder`` and return its record, which then also lies there as ``record.json``.

    ``judge`` decides at the rungs; None: every trial goes to its end. Any exception of a phase becomes a failed record
    with a one-line reason, its traceback goes to the trial's log: otherwise one bad plan would end the sweep.
    """
    clock = PhaseClock(folder / EVENTS)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tools.logging(folder / TRIAL_LOG):
            its = tools.at(request.imgsz)
            record = _attempted(Workplace(request, settings, its, gate, folder, clock), judge or Everyone())
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
        CI95: [float(bound) for bound in measured[CI95]],
        **{name: float(measured[name]) for name in ("energy_j",) if name in measured},
        "latency_conditions": {name: measured[name] for name in CONDITIONS if name in measured},
    }


class Latency:
    """A trial's latency: measured at once, or predicted, and then measured if the trial continues to training.

    A timing has the device for itself, so everybody waits for it; a trial that ends at the first rung does not compete,
    and a precise prediction tells the searcher as much. What is trained is always measured. A measurement is kept in
    the trial's folder as soon as it is there, so that a trial that is begun again is not measured again.
    """

    def __init__(self, work: Workplace, model: Any, plan_hash: str) -> None:
        self._work, self._model, self._plan_hash = work, model, plan_hash
        self._measurement: Measurement | None = self._kept()
        settings = work.settings
        may_be_stopped = settings.epochs > 0 and 0 in settings.rungs
        self._foretold = work.request.foretold if settings.foretells and may_be_stopped else None
        if self._foretold is None:
            self.measure()

    def _kept(self) -> Measured | None:
        """What an earlier attempt at this trial measured."""
        try:
            content = json.loads((self._work.folder / MEASURED).read_text(encoding="utf-8"))
            return Measured(content["measured"]) if content["plan_hash"] == self._plan_hash else None
        except (OSError, ValueError, KeyError, TypeError):  # none, or a torn one
            return None

    def _keep(self, values: Mapping[str, Any]) -> None:
        with suppress(OSError):
            write_json(self._work.folder / MEASURED, {"plan_hash": self._plan_hash, "measured": dict(values)})

    def measure(self) -> None:
        """Measure it, or begin to, unless that was done."""
        if self._measurement is None:
            with self._work.clock.phase("latency"):
                self._measurement = self._work.tools.start_measure(self._model, self._keep)

    def costs(self) -> dict[str, float]:
        """What is known of it by now. A measurement elsewhere is waited for only where latency is bounded."""
        bounded = self._work.settings.bounds.limit_latency
        if self._measurement is None or bounded or self._measurement.known() is not None:
            figures = self.figures()
        else:
            figures = {}
        return {name: figures[name] for name in ("latency_ms", "energy_j") if name in figures}

    def figures(self) -> dict[str, Any]:
        """In a record's words; waits for a measurement elsewhere."""
        baseline_ms = self._work.settings.baseline_latency_ms
        foretold = self._foretold
        if self._measurement is not None:
            try:
                return latency_metrics(self._measurement.result(), baseline_ms)
            except AgentAwayError:
                foretold = self._work.request.foretold if self._work.settings.predicts_if_away else None
                if foretold is None:
                    raise
        assert foretold is not None, "measured at once, else"
        ratio, low, high = (foretold[name] for name in ("ratio", "low", "high"))
        figures = {"latency_ms": ratio * baseline_ms, "latency_ratio": ratio, "speedup": 1 / ratio}
        return {**figures, PI95: [1 / high, 1 / low], SOURCE: FORETOLD}


def _attempted(work: Workplace, judge: Judge) -> TrialRecord:
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


def _evaluate(work: Workplace, judge: Judge) -> TrialRecord:
    """The whole trial; what its parts raise is contained by :func:`run_trial`."""
    settings, clock = work.settings, work.clock
    model, plan = _pruned(work)
    with clock.phase("stats"), work.gate.using():
        stats = work.tools.stats(model)
    latency = Latency(work, model, plan.hash)
    course = Course(
        work.request.trial_id, settings.rungs, judge, settings.accuracy, {**stats, **latency.costs()}, clock
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
    accuracy: Mapping[str, float] = tuned.metrics
    if settings.deploys:
        with clock.phase("deploy"):
            accuracy = work.tools.deployed(tuned.model, tuned.metrics)
    with clock.phase("wait_for_latency"):  # only one that is measured elsewhere takes any time here
        figures = latency.figures()
    with clock.phase("save"), work.gate.using():
        work.tools.save(tuned.model, work.folder / PRUNED)
        made_with = {name: settings.ingredients[name] for name in MADE_WITH if name in settings.ingredients}
        plan.save(work.folder / PLAN, made_with)
    metrics = {**accuracy, **_refitted(tuned.start_metrics), **stats, **figures, **settings.ingredients}
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


def _pruned(work: Workplace) -> tuple[Any, PlanLike]:
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
