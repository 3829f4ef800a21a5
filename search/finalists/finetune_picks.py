"""From a pick to a finished network: full fine-tuning as parallel Ray tasks, then one measuring session for all.

Each pick starts from its trial's ``pruned.pt``; the pruned widths stay. ``selected/<id>/metrics.json`` is written last,
so a folder with it is complete, and is not done again under the same settings.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretoprune.base.atomic import write_json
from paretoprune.base.file_names import BEST, EVENTS, METRICS, MODEL_FOLDER, PLAN, TEACHER, TUNED
from paretoprune.base.image_size import ImageSize, plain_size
from paretoprune.base.messages import note, showing
from paretoprune.pruning.plan import Plan
from paretoprune.results.analysis.summary import summarise
from paretoprune.results.report.model_card import write_cards
from paretoprune.results.selection.picks import pick_trials
from paretoprune.results.selection.selection import Pick
from paretoprune.results.selection.uncertainty import accuracy_noise, beaten_picks
from paretoprune.results.store.accuracy import LABELS, accuracies, accuracy_text
from paretoprune.results.store.bounds import NO_BOUNDS, Bounds
from paretoprune.results.store.records import DEPLOY_PRECISION, TrialRecord
from paretoprune.results.store.run_files import read_json, unpruned_words
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.config.inputs import IDENTITY
from paretoprune.search.errors import SearchError
from paretoprune.search.finalists.final_evaluation import (
    compare_finalists,
    finished_content,
    finished_networks,
    needs_session,
)
from paretoprune.search.monitoring.interrupts import interruptible
from paretoprune.search.monitoring.progress import HEARTBEAT_S, activity_lines, duration, working
from paretoprune.search.monitoring.trackers import write_finetuning
from paretoprune.search.storage.driver_lock import DriverLock
from paretoprune.search.storage.event_log import PhaseClock, events_of
from paretoprune.search.storage.object_store import published
from paretoprune.search.storage.trial_lock import claimed
from paretoprune.search.sweep.preflight import trusts_native
from paretoprune.search.trial.factory import make_tools
from paretoprune.search.trial.joint_evaluation import NATIVE
from paretoprune.search.worker.context import ToolsFactory, WorkerContext
from paretoprune.search.worker.file_transfer import carried
from paretoprune.search.worker.ray_output import quiet_ray
from paretoprune.search.worker.ray_tasks import failure_of, result_of
from paretoprune.search.worker.worker import tools_of

if TYPE_CHECKING:
    from paretoprune.search.config.run_config import RunConfig
    from paretoprune.search.config.sections import FinetuneSection

DEFAULT_PICKS = "3"
_NEWER: dict[str, Any] = {"train": {}, "teacher": None}
"""Settings that networks of older versions do not say, with what was done then."""
START = "start.pt"


@dataclass(frozen=True)
class Job:
    """One network to fine-tune: a pick by its trial id, or a ``native`` checkpoint and whether that is trusted.

    With an ``imgsz`` or a ``precision`` that is the unpruned model, as a free move.
    """

    name: str
    chosen_as: str = ""
    native: str = ""
    trust: bool = False
    imgsz: ImageSize | None = None
    precision: str | None = None

    @property
    def is_free_move(self) -> bool:
        """Whether it is the unpruned model."""
        return bool(self.imgsz or self.precision)

    @property
    def place(self) -> str:
        """Its folder below the run's."""
        if self.is_free_move:
            return f"free_moves/{self.name}"
        return f"native/{self.name.removeprefix(NATIVE)}" if self.native else f"selected/{self.name}"

    @property
    def start(self) -> str:
        """A native rival's own checkpoint, below the run's folder: workers elsewhere do not see where it came from."""
        return f"{self.place}/{START}"


@dataclass(frozen=True)
class FinetunedPicks:
    """``rows``: one per finished pick, for printing. ``failed``: trial id -> one line."""

    rows: list[dict[str, Any]]
    failed: dict[str, str]


def choose_picks(
    folder: RunFolder, objectives: Sequence[str], wishes: Sequence[str] = (), bounds: Bounds = NO_BOUNDS
) -> list[Pick]:
    """What `wishes` choose (see :func:`results.selection.picks.pick_trials`; none: three picks) among the run's trials.

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
    folder: RunFolder,
    config: RunConfig,
    picks: Sequence[Pick],
    factory: ToolsFactory = make_tools,
    natives: Sequence[str] = (),
    free_moves: Sequence[TrialRecord] = (),
) -> FinetunedPicks:
    """Fine-tune ``picks`` fully, and with the same budget ``natives`` (stock checkpoints) and the unpruned model as in
    ``free_moves``, all in parallel; then judge every finished network of the run together. One that fails does
    not hold up the others.
    """
    from paretoprune.search.sweep.sweep import start_workers

    failed: dict[str, str] = {}
    settings = _recipe(config.finetune.model_dump(mode="json"))
    jobs = [Job(pick.trial_id, pick.chosen_as) for pick in picks]
    jobs += [Job(NATIVE + Path(path).stem, native=path, trust=trusts_native(config, path)) for path in natives]
    model = config.model
    jobs += [
        Job(m.trial_id, native=model.path, trust=model.trust_checkpoint, imgsz=m.imgsz, precision=m.precision)
        for m in free_moves
    ]
    remedy = "what is done is kept: the same command goes on after the last epoch"
    with (
        DriverLock(folder.path) as lock,
        published(folder.path),
        quiet_ray(folder.path),
        interruptible("fine-tuning the picks", remedy),
    ):
        todo = [job for job in jobs if not _is_tuned(folder, job, settings)]
        if todo or needs_session(folder):
            resources, context = start_workers(config, folder, factory, folder.read_baseline().get(IDENTITY))
            lock.describe(resources.slots)
            if not context.gpus:  # fewer networks than slots: the CPUs that would stand idle make them faster
                context = replace(context, cpus=context.cpus * max(1, resources.slots // max(1, len(todo))))
            if todo:
                _bring_models(folder, todo, config.finetune.teacher)
                note(f"fine-tuning {len(todo)} networks, at most {config.finetune.epochs} epochs each")
                failed = _finetune_all(context, todo, config.finetune)
                for job in todo:
                    write_finetuning(folder, job.name, folder.path / job.place / EVENTS)
            if needs_session(folder):
                _compare_all(context)
                write_cards(folder, summarise(folder))
    moves, noise = folder.read_free_moves(), accuracy_noise(folder.read_baseline(), on_all=True)
    beaten = beaten_picks(folder.read_selected(), moves, folder.read_tuned_moves(), noise)
    rows = [_row(folder, job, beaten) for job in jobs if job.name not in failed]
    return FinetunedPicks(rows, failed)


def choose_free_moves(folder: RunFolder, picks: Sequence[Pick], count: int) -> list[TrialRecord]:
    """The ``count`` free moves whose latency is nearest to that of one of the ``picks``.

    :class:`SearchError` where the run measured fewer.
    """
    moves = folder.read_free_moves() if count else []
    if len(moves) < count:
        raise SearchError(
            f"--free-moves {count} needs as many free moves, but {folder.path} measured {len(moves)}; "
            "a search over several sizes or precisions (space.imgsz, space.precision) measures them"
        )

    def apart(move: TrialRecord) -> float:
        own = float(move.metrics["latency_ms"])
        return min(abs(math.log(own / float(pick.record.metrics["latency_ms"]))) for pick in picks)

    return sorted(moves, key=apart)[:count]


def _recipe(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a fine-tuning's result depends on."""
    return {name: value for name, value in settings.items() if name not in ("gpus_per_pick", "trust_checkpoint")}


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


def finetune_job(context: WorkerContext, job: Job) -> None:
    """In a worker: fine-tune one network into its folder's ``best.pt``, a pick from its last epoch if it died before.

    ``tuned.json`` is written last: with it, and under the same settings, only the judging is left to do.
    """
    needs = [MODEL_FOLDER, TEACHER] if job.native else [MODEL_FOLDER, TEACHER, f"trials/{job.name}"]
    with carried(context, needs, [job.place]) as here:
        _finetune(here, job)


def _finetune(context: WorkerContext, job: Job) -> None:
    tools, _ = tools_of(context)
    tools = tools.at(job.imgsz if job.native else Plan.load(context.folder.trial_plan(job.name)).imgsz)
    target = context.folder.path / job.place
    target.mkdir(parents=True, exist_ok=True)
    settings = _recipe(context.settings["finetune"])
    with claimed(target):
        if _is_tuned(context.folder, job, settings):
            return
        for name in (EVENTS, TUNED, METRICS):  # of an earlier attempt, or of other settings
            (target / name).unlink(missing_ok=True)
        clock = PhaseClock(target / EVENTS)

        def on_epoch(epoch: int, metrics: Mapping[str, float]) -> bool:
            clock.event("epoch", epoch=epoch, **accuracies(metrics))
            return False

        extra: dict[str, Any] = {"chosen_as": job.chosen_as}
        section = context.settings["finetune"]
        taught = {"teacher": context.folder.path / TEACHER} if section["teacher"] else {}
        epochs = section["epochs"] + (context.settings["trial"]["epochs"] if job.native else 0)
        with tools.logging(target / "finetune.log"), clock.phase("finetune", epochs=epochs):
            if job.native:
                tuned, recipe = tools.train_native(
                    str(context.folder.path / job.start), target, on_epoch, job.trust, **taught
                )
                extra = {"model": job.native, "recipe": recipe, "trust_checkpoint": job.trust}
                if job.is_free_move:
                    extra["recipe"] = f"unpruned {unpruned_words(job.name)}, {recipe}"
                    extra |= {"imgsz": plain_size(job.imgsz)} if job.imgsz else {}
                    extra |= {DEPLOY_PRECISION: job.precision} if job.precision else {}
            else:
                model = tools.load(context.folder.trial_checkpoint(job.name))
                tuned = tools.finetune_fully(model, target, on_epoch, **taught)
                shutil.copyfile(context.folder.trial_plan(job.name), target / PLAN)
            tools.save(tuned.model, target / BEST)
        facts = {"epochs": tuned.epochs, "best_epoch": tuned.best_epoch, "retries": list(tuned.retries)}
        facts |= {**({"precision": tuned.precision} if tuned.precision else {}), **extra}
        said = {"settings": settings, **facts, "seconds": clock.seconds, "tuned_at": time.time()}
        write_json(target / TUNED, said)
    tools.release()


def _finetune_all(context: WorkerContext, jobs: Sequence[Job], settings: FinetuneSection) -> dict[str, str]:
    """Run the tasks, showing every epoch as it ends; name -> reason of those that failed. A native takes one GPU."""
    import ray

    picks = _with_gpus(context, settings.gpus_per_pick)
    contexts = {job: context if job.native else picks for job in jobs}
    task = ray.remote(finetune_job)
    waiting = {
        task.options(num_cpus=its.cpus, num_gpus=its.gpus, max_retries=1).remote(its, job): job
        for job, its in contexts.items()
    }
    failed: dict[str, str] = {}
    shown: dict[str, int] = {}
    before = context.config.trial.epochs  # of a pick's trial; the others train for as many more
    epochs = {job.name: settings.epochs + (before if job.native else 0) for job in jobs}
    standing = _Standing(context.folder, epochs, shown, waiting)
    with showing(standing.lines, HEARTBEAT_S, standing.share):
        while waiting:
            done, _ = ray.wait(list(waiting), timeout=2.0)
            for job in jobs:
                _show_epochs(context.folder, job, epochs[job.name], shown)
            for reference in done:
                name = waiting.pop(reference).name
                if reason := failure_of(reference):
                    failed[name] = reason
    return failed


@dataclass
class _Standing:
    """How far the fine-tuning is.

    ``epochs``: name -> how many at most, ``shown``: the last that ended, ``waiting``: the jobs under way.
    """

    folder: RunFolder
    epochs: Mapping[str, int]
    shown: Mapping[str, int]
    waiting: Mapping[Any, Job]
    began: float = field(default_factory=time.monotonic)
    share_before: float | None = None

    def share(self) -> float:
        """Of all epochs; one that ended early has done its own."""
        running = {job.name for job in list(self.waiting.values())}
        done = sum(
            min(most, self.shown.get(name, 0)) if name in running else most for name, most in self.epochs.items()
        )
        return done / sum(self.epochs.values())

    def lines(self) -> list[str]:
        """Counts and time left, then a line for each network."""
        share = self.share()
        if self.share_before is None and share > 0:  # what an earlier start had done
            self.share_before, self.began = share, time.monotonic()
        gained = share - (self.share_before or 0.0)
        left = f"; about {duration((time.monotonic() - self.began) / gained * (1 - share))} left" if gained > 0 else ""
        running = list(self.waiting.values())
        counts = f"fine-tuning: {len(self.epochs) - len(running)}/{len(self.epochs)} networks done{left}"
        return [counts, *activity_lines({job.name: self.folder.path / job.place for job in running})]


def _compare_all(context: WorkerContext) -> None:
    import ray

    folder = context.folder
    places = [str(item.directory.relative_to(folder.path)) for item in finished_networks(folder)]
    task = ray.remote(num_cpus=context.cpus, num_gpus=context.gpus, max_retries=1)(compare_finalists)
    with working("evaluating all finished networks beside the unpruned model", folder.path / EVENTS) as look:
        result_of(task.remote(context, places), look)


def _bring_models(folder: RunFolder, jobs: Sequence[Job], teacher: str | None) -> None:
    """Copy the rivals' checkpoints, and the teacher's, into the run's folder; an official name is the file that
    Ultralytics keeps it in."""
    from paretoprune.pruning.yolo.loading import model_file

    if teacher is not None:
        shutil.copyfile(model_file(teacher), folder.path / TEACHER)
    for job in jobs:
        if job.native:
            (folder.path / job.place).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(model_file(job.native), folder.path / job.start)


def _show_epochs(folder: RunFolder, job: Job, epochs: int, shown: dict[str, int]) -> None:
    last = _last_event(folder.path / job.place / EVENTS, "epoch", ("epoch", *LABELS))
    if last and last["epoch"] != shown.get(job.name):
        shown[job.name] = last["epoch"]
        note(f"{job.name} epoch {last['epoch']}/{epochs}: {accuracy_text(last)}")


def _last_event(path: Path, kind: str, keys: Sequence[str]) -> dict[str, Any]:
    """The ``keys`` of the last event of ``kind`` in an events file, {} where there is none; those it has."""
    events = events_of(path, kind)
    return {key: events[-1][key] for key in keys if key in events[-1]} if events else {}


def _is_tuned(folder: RunFolder, job: Job, settings: Mapping[str, Any]) -> bool:
    """Whether a network was finished under the same settings, and from the same checkpoint."""
    target = folder.path / job.place
    said = finished_content(target)
    if said is None or not (target / BEST).is_file():
        return False
    known = {**_NEWER, **(said.get("settings") or {})}
    return known == dict(settings) and said.get("model", "") == job.native


def _row(folder: RunFolder, job: Job, beaten: Mapping[str, str]) -> dict[str, Any]:
    target = folder.path / job.place
    content = read_json(target / METRICS)
    wanted = [
        suffixed for name in LABELS for suffixed in (name, f"{name}_change", f"{name}_change_ci95", f"test_{name}")
    ]
    wanted += ["latency_ms", "latency_ratio", "speedup", "speedup_ci95", "params_m", "gflops"]
    return {
        "trial_id": job.name,
        "kind": "free move" if job.is_free_move else "native" if job.native else "pick",
        "chosen_as": content.get("chosen_as") or content.get("recipe", ""),
        **{name: content["after"].get(name) for name in wanted},
        "epochs": content.get("epochs"),
        "beaten_by_free_move": beaten.get(job.name),
        "plan": None if job.native else str(target / PLAN),
        "checkpoint": str(target / BEST),
    }
