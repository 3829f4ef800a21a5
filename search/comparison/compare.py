"""``paretoprune compare``: strategies with equal ratios, images, seed and epochs, run side by side, measured together.

Each strategy keeps its folder ``RUN/strategies/<name>``. A strategy whose ``result.json`` is there under the same
settings is not run again; one that was interrupted goes on from what its folder holds.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretoprune.base.atomic import write_json
from paretoprune.base.file_names import EVENTS
from paretoprune.base.image_size import plain_size
from paretoprune.base.messages import note, showing, speaking
from paretoprune.results.analysis.strategy_comparison import (
    Comparison,
    ComparisonFolder,
    ComparisonRow,
    compared,
    read_comparison,
    write_comparison,
)
from paretoprune.results.report.report import write_report
from paretoprune.results.store.accuracy import accuracies, accuracy_text
from paretoprune.results.store.persisted import parse_json
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.comparison.operations import StrategyJob, make_strategy_tools, measure_strategies, run_strategy
from paretoprune.search.errors import ConfigError, RunFolderError, SearchError
from paretoprune.search.monitoring.interrupts import interruptible
from paretoprune.search.monitoring.progress import HEARTBEAT_S, activity_lines, duration, working
from paretoprune.search.storage.driver_lock import DriverLock
from paretoprune.search.storage.event_log import EventFeed
from paretoprune.search.sweep.preflight import check_batches, check_device, check_files, check_writable
from paretoprune.search.trial.exclusive_device import measuring_threads
from paretoprune.search.worker.context import ToolsFactory, WorkerContext
from paretoprune.search.worker.ray_output import quiet_ray
from paretoprune.search.worker.ray_tasks import failure_of, result_of

if TYPE_CHECKING:
    from paretoprune.search.config.run_config import RunConfig

SETTINGS = "settings.json"
POLL_SECONDS = 2.0


@dataclass(frozen=True)
class ValidatedRun:
    """A comparison that may start. ``model_hash``: of the checkpoint's bytes, so that a retrained one counts as new."""

    folder: ComparisonFolder
    config: RunConfig
    strategies: tuple[str, ...]
    ratios: dict[str, float]
    epochs: int
    model_hash: str

    def settings(self) -> dict[str, Any]:
        """What a strategy's result depends on; equal settings, equal result."""
        config = self.config
        finetune = config.finetune.model_dump(mode="json", exclude={"epochs", "patience", "trust_checkpoint"})
        return {
            "model": config.model.path,
            "model_hash": self.model_hash,
            "data": config.data.path,
            "imgsz": plain_size(config.model.imgsz),
            "ratios": self.ratios,
            "epochs": self.epochs,
            "seed": config.search.seed,
            "round_to": config.space.round_to,
            "recover": config.recover.model_dump(mode="json"),
            "finetune": finetune,
        }

    def all_settings(self) -> dict[str, Any]:
        """What the measured comparison depends on."""
        found = self.config.latency
        left_out = {"span"} if found.span == "network" else None  # as an older version's comparison has it
        latency = found.model_dump(mode="json", exclude=left_out)
        return {**self.settings(), "latency": latency, "strategies": list(self.strategies)}


def check_names(text: str) -> tuple[str, ...]:
    """The names in a comma-separated list, each once; :class:`ConfigError` where there is none."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise ConfigError(f"--strategies needs at least one name, got {text!r}; separate them by commas")
    return names


def prepare(
    config: RunConfig, strategies: Sequence[str], ratios: Mapping[str, float], epochs: int, run: Path
) -> ValidatedRun:
    """Check everything about a comparison before Ray starts, the cheap things first; nothing is written.

    Raises one of the rooms' errors, each one line: files, ratios, names of strategies, a dataset that does not fit.
    """
    from paretoprune.pruning.plan import check_ratio

    for layer, ratio in ratios.items():
        check_ratio(layer, ratio)
    if config.data.classes is not None:
        raise ConfigError("compare is for whole models, but got `data.classes`: give one that `prune --classes` made")
    check_files(config)
    check_device(config)
    path = run.expanduser().resolve()
    check_writable(path)
    from paretoprune.pruning.strategies import get_strategy
    from paretoprune.pruning.yolo.loading import model_file

    for name in strategies:
        get_strategy(name)
    model = model_file(config.model.path).resolve()
    threads = config.latency.threads or measuring_threads()
    config = config.model_copy(
        update={
            "model": config.model.model_copy(update={"path": str(model)}),
            "latency": config.latency.model_copy(update={"threads": threads}),
        }
    )
    with speaking(at_once=False) as say:
        say("checking the model and the dataset")
        check_ratios(config, ratios, epochs)
    digest = hashlib.sha256(model.read_bytes()).hexdigest()[:16]
    return ValidatedRun(ComparisonFolder(path), config, tuple(strategies), dict(ratios), epochs, digest)


def check_ratios(config: RunConfig, ratios: Mapping[str, float], epochs: int) -> None:
    """The model loads, the dataset fits it, its batches can be trained on, and the ratios take channels away."""
    from paretoprune.cluster.device_lock import DeviceLock
    from paretoprune.pruning.data.dataset import check_dataset
    from paretoprune.pruning.importance import known_criterion
    from paretoprune.pruning.surgery.surgery import resolve
    from paretoprune.pruning.workbench import Workbench

    known_criterion(config.recover.importance)
    bench = Workbench(
        config.model.path,
        config.data.path,
        config.model.imgsz,
        importance=config.recover.importance,
        trust_checkpoint=config.model.trust_checkpoint,
        gate=DeviceLock("cpu"),  # another run of this host may be measuring
    )
    for remark in check_dataset(config.data.path, bench.model):
        note(remark)
    if epochs:
        check_batches(config, "finetune", bench.model)
    if not resolve(bench.table, ratios, config.space.round_to):
        raise SearchError(
            f"the ratios remove no channel at widths in steps of {config.space.round_to}; "
            "give a greater --ratio or --set space.round_to=1"
        )


def compare(prepared: ValidatedRun, factory: ToolsFactory = make_strategy_tools) -> Comparison:
    """Run what is not finished, measure all, write comparison.json, .csv and the report.

    One strategy's failure does not stop the rest.
    Raises :class:`RunFolderError` where another driver is alive or the folder cannot be made, and a worker's own error
    where the measuring fails. Does nothing at all where the same comparison is there already.
    """
    folder = prepared.folder
    try:
        folder.strategies.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(
            f"run folder {folder.path} cannot be made ({error.strerror}); choose another --run"
        ) from error
    remedy = "what is done is kept: the same command goes on"
    with DriverLock(folder.path) as lock, quiet_ray(folder.path), interruptible("comparing", remedy):
        todo = [name for name in prepared.strategies if not _is_done(prepared, name)]
        known = None if todo else read_comparison(folder)
        if known is not None and known.settings == prepared.all_settings() and not known.failed:
            note("nothing to do: the same comparison is there already")
            return known
        return _compared(prepared, todo, lock, factory)


def _compared(prepared: ValidatedRun, todo: Sequence[str], lock: DriverLock, factory: ToolsFactory) -> Comparison:
    from paretoprune.search.sweep.sweep import start_workers

    folder = prepared.folder
    folder.json.unlink(missing_ok=True)  # what it says is no longer what lies in the folders
    for name in todo:
        _claim(prepared, name)
    resources, context = start_workers(prepared.config, RunFolder(folder.path), factory)
    lock.describe(resources.slots)
    failed: dict[str, str] = {}
    if todo:
        # CPUs that stand idle towards the end are not shared out: training depends a little on the number of threads,
        # and a strategy that was taken up again alone must have the same conditions as the others had.
        at_a_time = min(resources.slots, prepared.config.resources.max_concurrent_trials or resources.slots, len(todo))
        note(f"{', '.join(todo)}: {prepared.epochs} epochs each, {at_a_time} at a time")
        failed = _run_all(context, prepared, todo, at_a_time)
    ready = [name for name in prepared.strategies if name not in failed]
    if not ready:
        raise SearchError(f"every strategy failed, the first because of {failed[prepared.strategies[0]]}")
    comparison = _comparison(prepared, ready, failed, _measure(context, folder, ready))
    write_comparison(folder, comparison)
    note(f"written: {write_report(folder.path)}")
    return comparison


def _is_done(prepared: ValidatedRun, name: str) -> bool:
    """Whether a strategy was finished under the same settings."""
    result = prepared.folder.read_result(name)
    return result is not None and result.get("settings") == prepared.settings()


def _claim(prepared: ValidatedRun, name: str) -> None:
    """Make a strategy's folder this comparison's: what other settings left there would be taken for its own."""
    place = prepared.folder.strategy_dir(name)
    stamp = place / SETTINGS
    if place.exists():
        if stamp.is_file() and _read(stamp) == prepared.settings():
            note(f"{name}: going on in {place}")
        else:
            note(f"{name}: {place} is of other settings and is made anew")
            shutil.rmtree(place)
    place.mkdir(parents=True, exist_ok=True)
    prepared.folder.result(name).unlink(missing_ok=True)
    write_json(stamp, prepared.settings())


def _run_all(context: WorkerContext, prepared: ValidatedRun, names: Sequence[str], at_a_time: int) -> dict[str, str]:
    """Run the tasks, showing every epoch as it ends; strategy -> reason of those that failed."""
    import ray

    task = ray.remote(num_cpus=context.cpus, num_gpus=context.gpus, max_retries=1)(run_strategy)
    queue = list(names)
    waiting: dict[Any, str] = {}
    feeds = {name: EventFeed(prepared.folder.strategy_dir(name) / EVENTS) for name in names}
    failed: dict[str, str] = {}

    def lines() -> list[str]:
        running = list(waiting.values())
        counts = f"{len(names) - len(queue) - len(running)}/{len(names)} strategies done, {len(running)} running"
        return [counts, *activity_lines({name: prepared.folder.strategy_dir(name) for name in running})]

    with showing(lines, HEARTBEAT_S):
        while queue or waiting:
            while queue and len(waiting) < at_a_time:
                job = StrategyJob(queue.pop(0), prepared.ratios, prepared.epochs)
                waiting[task.remote(context, job, prepared.settings())] = job.strategy
            done, _ = ray.wait(list(waiting), timeout=POLL_SECONDS)
            for name, feed in feeds.items():
                _show(name, feed)
            for reference in done:
                name = waiting.pop(reference)
                reason = failure_of(reference)
                _show(name, feeds[name])
                if reason:
                    failed[name] = reason
                    note(f"{name}: failed: {failed[name]}; see {prepared.folder.strategy_dir(name)}")
    return failed


def _measure(context: WorkerContext, folder: ComparisonFolder, names: Sequence[str]) -> dict[str, Any]:
    import ray

    task = ray.remote(num_cpus=context.cpus, num_gpus=context.gpus, max_retries=1)(measure_strategies)
    with working("measuring all of them beside the unpruned model", folder.strategies / EVENTS) as look:
        feed = EventFeed(folder.strategies / EVENTS)

        def show() -> None:
            look()
            for event in feed.fresh():
                if event.get("event") == "measured":
                    note(f"{event['strategy']}: {accuracy_text(event)}, {event['speedup']:.2f} times as fast")

        measured: dict[str, Any] = result_of(task.remote(context, list(names)), show)
        show()
    return measured


def _comparison(
    prepared: ValidatedRun, names: Sequence[str], failed: Mapping[str, str], measured: Mapping[str, Any]
) -> Comparison:
    return Comparison(
        settings=prepared.all_settings(),
        baseline=measured["baseline"],
        rows=tuple(_row(prepared.folder, name, measured["strategies"][name]) for name in names),
        device=measured["device"],
        environment=measured["environment"],
        failed=dict(failed),
    )


def _row(folder: ComparisonFolder, name: str, metrics: Mapping[str, Any]) -> ComparisonRow:
    result = folder.read_result(name)
    assert result is not None, "a strategy that did not fail has a result"
    before = result["before_epochs"] or accuracies(metrics)
    figures = {**metrics, **{f"{name}_refit": value for name, value in before.items()}}
    return ComparisonRow(
        strategy=name,
        layers=tuple(result["layers"]),
        skipped=tuple((item["layer"], item["reason"]) for item in result["skipped"]),
        epochs=int(result["epochs"]),
        metrics={key: figures[key] for key in compared(metrics)},
        checkpoint=str(folder.checkpoint(name)),
        plan=str(folder.plan(name)),
        sessions=tuple(str(folder.strategy_dir(name) / session) for session in result["sessions"]),
        notes=result["notes"],
    )


def _show(name: str, feed: EventFeed) -> None:
    for event in feed.fresh():
        if event.get("event") == "epoch":
            where = f"{event['stage']} epoch {event['epoch']}/{event['epochs']}"
            note(f"{name}: {where}: {accuracy_text(event)}")
        elif event.get("event") == "finished":
            note(f"{name}: done after {event['epochs']} epochs in {duration(event['seconds'])}")


def _read(path: Path) -> Any:
    try:
        return parse_json(path.read_bytes())
    except ValueError:  # torn by a full disk: of no settings that we know
        return None
