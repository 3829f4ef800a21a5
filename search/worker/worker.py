"""The code that runs in a worker process: tools made once and kept, the device's lock, a trial or the baseline.

Plain functions over plain data; the sweep's trainable and `search.finalists.finetune_picks` hand them to Ray.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from paretoprune.base.device_gate import DeviceGate
from paretoprune.base.file_names import EVENTS, FREE_MOVES, MODEL_FOLDER, SAMPLE
from paretoprune.base.image_size import plain_size
from paretoprune.pruning.plan import Plan
from paretoprune.pruning.yolo.progress import progress_told
from paretoprune.results.store.objectives import direction
from paretoprune.results.store.records import TrialRecord
from paretoprune.results.store.run_files import free_move_name
from paretoprune.search.config.classes import dataset_of
from paretoprune.search.config.inputs import check_node, weights_hash
from paretoprune.search.config.latency_target import LatencyTarget
from paretoprune.search.config.run_config import RunConfig
from paretoprune.search.space.constraints import bounds_of_search
from paretoprune.search.stopping.early_stopper import judge_of
from paretoprune.search.stopping.rule import StoppingRule, rungs_of
from paretoprune.search.storage.event_log import PhaseClock
from paretoprune.search.storage.importance_cache import SCORES_NAME
from paretoprune.search.storage.request import TrialRequest, left_record
from paretoprune.search.storage.trial_lock import claimed
from paretoprune.search.trial.trial import ITSELF, TrialSettings, latency_metrics, measured_everywhere, run_trial
from paretoprune.search.worker.cluster import is_joined
from paretoprune.search.worker.context import WorkerContext
from paretoprune.search.worker.file_transfer import carried, scratch_folder

FREE_MOVES_LOG = "free_moves.log"

# Importing torch and loading the baseline take longer than many a trial: once per process, for all its trials.
_KEPT: dict[tuple[str, str], tuple[Any, DeviceGate]] = {}


def work_on_trial(context: WorkerContext, request: TrialRequest) -> TrialRecord:
    """Run one trial in this process, or take the record of a worker that an earlier driver left behind with it."""
    with carried(context, [MODEL_FOLDER, SCORES_NAME, SAMPLE], [f"trials/{request.trial_id}"]) as here:
        # What lies in a node's own scratch folder may be of an older run at the same path
        return _run_trial(here, request, look=context.courier is None)


def _run_trial(context: WorkerContext, request: TrialRequest, look: bool) -> TrialRecord:
    config, folder = context.config, context.folder.trial_dir(request.trial_id)
    tools, gate = tools_of(context)
    tools.recall_scores(context.folder.path)
    settings = trial_settings(config, context.baseline_latency_ms, context.devices_ms)
    judge = judge_of(context.folder, stopping_rule(config), context.courier) if settings.rungs else None
    clock = PhaseClock(folder / EVENTS)
    with claimed(folder, lambda holder: clock.event("phase_started", phase=f"waiting for {holder}")):
        return (left_record(folder) if look else None) or run_trial(request, settings, tools, gate, folder, judge)


def trial_settings(
    config: RunConfig, baseline_latency_ms: float, devices_ms: Mapping[str, float] | None = None
) -> TrialSettings:
    """Settings of one trial, from the run's configuration."""
    search, epochs = config.search, config.trial.epochs
    accuracies = [name for name in search.objectives if direction(name) == "max"]
    bounds = bounds_of_search(search)
    return TrialSettings(
        epochs=epochs,
        recover=config.recover.method != "none",
        baseline_latency_ms=baseline_latency_ms,
        devices_ms=devices_ms or {},
        rungs=rungs_of(epochs, search.reduction_factor) if search.early_stopping else (),
        accuracy=accuracies[0] if accuracies else "",
        ingredients=ingredients(config),
        bounds=bounds,
        deploys=config.deploy.in_trials,
        foretells="energy_j" not in search.objectives and not config.latency.targets and not bounds.limit_latency,
        predicts_if_away=config.latency.if_away == "predict",
    )


def stopping_rule(config: RunConfig) -> StoppingRule:
    """Trials are compared by what the run is to make small."""
    costs = tuple(name for name in config.search.objectives if direction(name) == "min")
    return StoppingRule(config.search.reduction_factor, costs)


def ingredients(config: RunConfig) -> dict[str, str | bool]:
    """What a trial's network is made with, as its record says it."""
    found: dict[str, str | bool] = {"recovery": config.recover.method, "importance": config.recover.importance}
    return {**found, "distilled": config.trial.distill} if config.trial.epochs else found


def work_on_baseline(context: WorkerContext) -> dict[str, Any]:
    """Measure the unpruned network the same way as the trials: the content of ``baseline.json``."""
    with carried(context, [MODEL_FOLDER, SAMPLE], ["baseline.log", SCORES_NAME]) as here:
        return {**_measure_baseline(here), "model": context.folder.inside(context.config.model.path)}


def _measure_baseline(context: WorkerContext) -> dict[str, Any]:
    from paretoprune.cluster.environment import describe_environment

    config = context.config
    say = PhaseClock(context.folder.path / EVENTS).step
    say("loading the model")
    tools, gate = tools_of(context)
    model = tools.baseline
    with tools.logging(context.folder.path / "baseline.log"), progress_told(say):
        metrics = _judged(tools, model, config, say)
        say("timing it")
        for device, measured in measured_everywhere(tools, model, config.latency.targets).items():
            own = {**measured, **ITSELF}
            metrics.update(latency_metrics(own, float(measured["median_ms"]), device))
        with gate.using():
            metrics.update(tools.stats(model))
    with progress_told(say):
        described = tools.describe(say)
    tools.keep_scores(context.folder.path)
    return {
        "data": dataset_of(config),
        **({"classes": config.data.classes} if config.data.classes else {}),
        "imgsz": plain_size(config.model.imgsz),
        "weights_hash": weights_hash(Path(config.model.path)),
        "metrics": metrics,
        "device": tools.device,
        "environment": describe_environment(),
        **described,
    }


def _judged(tools: Any, model: Any, config: RunConfig, say: Callable[[str], None]) -> dict[str, Any]:
    """Accuracy of the unpruned network as trials are judged, and on all validation images where these are a sample."""
    say("validating it")
    metrics: dict[str, Any] = dict(tools.evaluate(model))
    if config.deploy.in_trials:
        say("exporting it")
        metrics = tools.deployed(model, metrics)
    return {**metrics, **tools.on_all_images(model, say)}


def work_on_free_moves(context: WorkerContext, plans: Sequence[Plan]) -> None:
    """Measure the unpruned network at the sizes and in the precisions of ``plans`` as trials are, beside itself at the
    run's.

    Each is written to ``free_moves.json`` as soon as it is known: what dies goes on with the next one.
    """
    with carried(context, [MODEL_FOLDER, SAMPLE], [FREE_MOVES, FREE_MOVES_LOG]) as here:
        tools, gate = tools_of(here)
        model = tools.baseline
        known = {move.trial_id for move in here.folder.read_free_moves()}  # by this task, before its worker died
        for plan in (plan for plan in plans if free_move_name(plan.imgsz, plan.precision) not in known):
            sized = tools.at(plan.imgsz, plan.precision)
            with tools.logging(here.folder.path / FREE_MOVES_LOG):
                metrics = _judged(sized, model, here.config, lambda text: None)
                unpruned = {"": context.baseline_latency_ms, **context.devices_ms}
                for device, measured in measured_everywhere(sized, model, context.devices_ms).items():
                    metrics.update(latency_metrics(measured, unpruned[device], device))
                with gate.using():
                    metrics.update(sized.stats(model))
            here.folder.write_free_move(plan.imgsz, metrics, plan.precision)
        tools.release()


def tools_of(context: WorkerContext) -> tuple[Any, DeviceGate]:
    """This process's tools for the run, made at the first call."""
    key = (context.run, repr(sorted(context.settings.items())))
    if key not in _KEPT:
        from paretoprune.cluster.device_lock import DeviceLock, DevicesUsed
        from paretoprune.cluster.devices import device_key
        from paretoprune.cluster.environment import pin_threads
        from paretoprune.pruning.latency.runtimes.base import keep_engines_in

        logging.getLogger("ray.tune").setLevel(logging.ERROR)
        pin_threads(context.cpus)
        device = worker_device(context.config.model.device, context.gpus)
        own = DeviceLock(device_key(device))
        both = LatencyTarget.parse(context.config.latency.target).shares_cpu_with(device)
        gate: DeviceGate = DevicesUsed(own, DeviceLock("cpu")) if both else own
        _KEPT.clear()  # a worker serves one run at a time
        if context.config.deploy.format != "torch":
            keep_engines_in(scratch_folder(context.run))  # Ray ends workers by force
        if context.identity is not None and is_joined(context.config):
            check_node(context.config, context.identity)
        with gate.using():  # loading libraries and the baseline keeps a CPU busy for seconds
            tools = context.factory(context.config, device, gate)
            tools.use_sample(context.folder.path)
            _KEPT[key] = (tools, gate)
    return _KEPT[key]


def worker_device(choice: str, gpus: float) -> str:
    """Ray shows a worker only the GPUs it was given, so the first one visible is its own."""
    if choice == "cpu" or (choice == "auto" and not gpus):
        return "cpu"
    return "cuda:0"
