"""From a pick to a finished network: full fine-tuning as parallel Ray tasks, then one measuring session for all.

Each pick starts from its trial's ``pruned.pt``; the pruned widths stay. ``selected/<id>/metrics.json`` is written last,
so a folder with it is complete, and is not done again under the same settings.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results.accuracy import LABELS, accuracies, accuracy_text
from results.atomic import write_json
from results.bounds import NO_BOUNDS, Bounds
from results.choosing import pick_trials
from results.run_folder import RunFolder
from results.selection import Pick
from search.claim import claimed
from search.courier import carried
from search.driver_lock import DriverLock
from search.errors import SearchError
from search.events import PhaseClock
from search.interrupts import interruptible
from search.joined import MODEL_FOLDER
from search.progress import note
from search.remote import published
from search.tools import make_tools
from search.trial import latency_metrics, one_line
from search.worker import ToolsFactory, WorkerContext, tools_of

if TYPE_CHECKING:
    from search.config import RunConfig

EVENTS = "events.jsonl"
TUNED = "tuned.json"
DEFAULT_PICKS = "3"


@dataclass(frozen=True)
class Promotion:
    """``rows``: one per finished pick, for printing. ``failed``: trial id -> one line."""

    rows: list[dict[str, Any]]
    failed: dict[str, str]


def choose_picks(
    folder: RunFolder, objectives: Sequence[str], wishes: Sequence[str] = (), bounds: Bounds = NO_BOUNDS
) -> list[Pick]:
    """What `wishes` choose (see :func:`results.choosing.pick_trials`; none: three picks) among the run's trials.

    :class:`SearchError` where nothing is found or a trial has no network to start from.
    """
    records = folder.read_records()
    picks = pick_trials(records, folder.read_baseline(), wishes or [DEFAULT_PICKS], bounds, objectives)
    if not picks:
        within = f" with {bounds}" if bounds.given else ""
        raise SearchError(f"a pick needs a completed trial{within}, but {folder.path} has none; see `status`")
    for pick in picks:
        if not folder.trial_checkpoint(pick.trial_id).is_file():
            missing = folder.trial_checkpoint(pick.trial_id)
            raise SearchError(f"trial {pick.trial_id} needs its network, but {missing} is gone; pick another trial")
    return picks


def promote(
    folder: RunFolder, config: RunConfig, picks: Sequence[Pick], factory: ToolsFactory = make_tools
) -> Promotion:
    """Fine-tune ``picks`` fully and measure them; one that fails does not hold up the others."""
    from search.sweep import start_workers

    failed: dict[str, str] = {}
    settings = _recipe(config.finetune.model_dump(mode="json"))
    remedy = "what is done is kept: the same command goes on after the last epoch"
    with DriverLock(folder.path) as lock, published(folder.path), interruptible("fine-tuning the picks", remedy):
        todo = [pick for pick in picks if not _is_done(folder, pick.trial_id, settings)]
        if todo:
            resources, context = start_workers(config, folder, factory)
            lock.describe(resources.slots)
            if not context.gpus:  # fewer picks than slots: the CPUs that would stand idle make them faster
                context = replace(context, cpus=context.cpus * max(1, resources.slots // len(todo)))
            tuning = _with_gpus(context, config.finetune.gpus_per_pick)
            note(f"fine-tuning {len(todo)} picks, at most {config.finetune.epochs} epochs each")
            failed = _finetune_all(tuning, [pick.trial_id for pick in todo], config.finetune.epochs)
            ready = [pick for pick in todo if pick.trial_id not in failed]
            if ready:
                note("measuring them beside the unpruned model")
                _measure_all(context, ready)
    return Promotion([_row(folder, pick.trial_id) for pick in picks if pick.trial_id not in failed], failed)


def _recipe(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a fine-tuning's result depends on."""
    return {name: value for name, value in settings.items() if name != "gpus_per_pick"}


def _with_gpus(context: WorkerContext, wanted: int) -> WorkerContext:
    """A pick's share of the machine where several GPUs train it; :class:`SearchError` where no machine has so many."""
    if wanted == 1:
        return context
    if not context.gpus:
        note(f"no GPU is used here, so finetune.gpus_per_pick={wanted} changes nothing")
        return context
    import ray

    most = max(int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"])
    if wanted > most:
        raise SearchError(
            f"finetune.gpus_per_pick is {wanted}, but no machine of the cluster has over {most} GPUs; ask for fewer"
        )
    return replace(context, gpus=float(wanted))


def finetune_pick(context: WorkerContext, trial_id: str) -> None:
    """In a worker: fine-tune one trial's network into ``selected/<id>/best.pt``, from its last epoch if it died before.

    ``tuned.json`` is written last: with it, and under the same settings, only the measuring is left to do.
    """
    needs = [MODEL_FOLDER, f"trials/{trial_id}"]
    with carried(context, needs, [f"selected/{trial_id}"]) as here:
        _finetune(here, trial_id)


def _finetune(context: WorkerContext, trial_id: str) -> None:
    tools, _ = tools_of(context)
    target = context.folder.selected_dir(trial_id)
    target.mkdir(parents=True, exist_ok=True)
    settings = _recipe(context.settings["finetune"])
    with claimed(target):
        if _tuned(target).get("settings") == settings:
            return
        (target / TUNED).unlink(missing_ok=True)
        (target / EVENTS).unlink(missing_ok=True)  # of an earlier attempt, whose epochs are told again
        clock = PhaseClock(target / EVENTS)

        def on_epoch(epoch: int, metrics: Mapping[str, float]) -> bool:
            clock.event("epoch", epoch=epoch, **accuracies(metrics))
            return False

        with tools.logging(target / "finetune.log"), clock.phase("finetune"):
            model = tools.load(context.folder.trial_checkpoint(trial_id))
            tuned = tools.finetune_fully(model, target, on_epoch)
            tools.save(tuned.model, context.folder.selected_checkpoint(trial_id))
        shutil.copyfile(context.folder.trial_plan(trial_id), target / "plan.json")
        facts = {"epochs": tuned.epochs, "best_epoch": tuned.best_epoch, "retries": list(tuned.retries)}
        write_json(target / TUNED, {"settings": settings, **facts})
    tools.release()


def measure_picks(context: WorkerContext, picks: Sequence[tuple[str, str]]) -> None:
    """In a worker: evaluate and time all picks (trial id, chosen as) in one session, from their files."""
    needs = [MODEL_FOLDER, "baseline.json", "trials.jsonl", "config.yaml"]
    with carried(context, needs, [f"selected/{trial_id}" for trial_id, _ in picks]) as here:
        _measure(here, picks)


def _measure(context: WorkerContext, picks: Sequence[tuple[str, str]]) -> None:
    tools, gate = tools_of(context)
    folder = context.folder
    baseline = folder.read_baseline()["metrics"]
    records = {record.trial_id: record for record in folder.read_records()}
    for trial_id, chosen_as in picks:
        with tools.logging(folder.selected_dir(trial_id) / "finetune.log"):
            model = tools.load(folder.selected_checkpoint(trial_id))  # the file itself, as others will load it
            after: dict[str, Any] = {**tools.evaluate(model), **tools.stats(model)}
            with gate.measuring():
                measured = tools.measure(model)
        after.update(latency_metrics(measured, float(baseline["latency_ms"])))
        session = {**baseline, "latency_measured_ms": float(measured["baseline_median_ms"])}
        content = {
            "before": records[trial_id].metrics,
            "after": after,
            "baseline": session,
            "chosen_as": chosen_as,
            "settings": _recipe(context.settings["finetune"]),
            **{name: value for name, value in _tuned(folder.selected_dir(trial_id)).items() if name != "settings"},
        }
        folder.write_selected(trial_id, content)


def _tuned(target: Path) -> dict[str, Any]:
    """What ``tuned.json`` says about a pick; {} before its fine-tuning is done."""
    path = target / TUNED
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _finetune_all(context: WorkerContext, trial_ids: Sequence[str], epochs: int) -> dict[str, str]:
    """Run the tasks, showing every epoch as it ends; trial id -> reason of those that failed."""
    import ray

    task = ray.remote(num_cpus=context.cpus, num_gpus=context.gpus, max_retries=1)(finetune_pick)
    waiting = {task.remote(context, trial_id): trial_id for trial_id in trial_ids}
    failed: dict[str, str] = {}
    shown: dict[str, int] = {}
    while waiting:
        done, _ = ray.wait(list(waiting), timeout=2.0)
        for trial_id in trial_ids:
            _show_epochs(context.folder, trial_id, epochs, shown)
        for reference in done:
            trial_id = waiting.pop(reference)
            try:
                ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                failed[trial_id] = one_line(error.cause)
            except ray.exceptions.RayError as error:
                failed[trial_id] = one_line(error)
    return failed


def _measure_all(context: WorkerContext, picks: Sequence[Pick]) -> None:
    import ray

    task = ray.remote(num_cpus=context.cpus, num_gpus=context.gpus, max_retries=1)(measure_picks)
    try:
        ray.get(task.remote(context, [(pick.trial_id, pick.chosen_as) for pick in picks]))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None  # the worker's own error, which says what to do


def _show_epochs(folder: RunFolder, trial_id: str, epochs: int, shown: dict[str, int]) -> None:
    last = _last_event(folder.selected_dir(trial_id) / EVENTS, "epoch", ("epoch", *LABELS))
    if last and last["epoch"] != shown.get(trial_id):
        shown[trial_id] = last["epoch"]
        note(f"{trial_id} epoch {last['epoch']}/{epochs}: {accuracy_text(last)}")


def _last_event(path: Path, kind: str, keys: Sequence[str]) -> dict[str, Any]:
    """The ``keys`` of the last event of ``kind`` in an events file, {} where there is none; those it has."""
    if not path.is_file():
        return {}
    for line in reversed(path.read_text(encoding="utf-8").splitlines()):
        try:
            event = json.loads(line)
        except ValueError:  # being written
            continue
        if event.get("event") == kind:
            return {key: event[key] for key in keys if key in event}
    return {}


def _is_done(folder: RunFolder, trial_id: str, settings: Mapping[str, Any]) -> bool:
    """Whether a pick was finished under the same settings."""
    path = folder.selected_dir(trial_id) / "metrics.json"
    if not path.is_file() or not folder.selected_checkpoint(trial_id).is_file():
        return False
    content = json.loads(path.read_text(encoding="utf-8"))
    return bool(content.get("settings") == dict(settings))


def _row(folder: RunFolder, trial_id: str) -> dict[str, Any]:
    selected = next(item for item in folder.read_selected() if item.trial_id == trial_id)
    wanted = (*LABELS, "latency_ms", "latency_ratio", "speedup", "speedup_ci95", "params_m", "gflops")
    return {
        "trial_id": trial_id,
        "chosen_as": selected.chosen_as,
        **{name: selected.after.get(name) for name in wanted},
        "epochs": selected.epochs,
        "plan": str(selected.directory / "plan.json"),
        "checkpoint": str(folder.selected_checkpoint(trial_id)),
    }
