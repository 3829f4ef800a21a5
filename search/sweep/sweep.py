"""One sweep: baseline, then trials under Ray Tune until as many have finished as were asked for.

The run folder is the truth. Ray's own storage is a scratch folder inside it, thrown away at the end.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretoprune.base.errors import typed_line
from paretoprune.base.file_names import EVENTS, TRIAL_LOG
from paretoprune.base.messages import note, speaking
from paretoprune.results.store.accuracy import accuracy_text
from paretoprune.results.store.objectives import direction
from paretoprune.results.store.records import BEYOND_BOUNDS, TrialRecord, TrialState
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.config.inputs import IDENTITY, RunIdentity, keep_identity
from paretoprune.search.config.latency_target import LatencyTarget
from paretoprune.search.config.stored import save_run_config
from paretoprune.search.errors import RunFolderError, SearchError
from paretoprune.search.monitoring.command_line import command_line
from paretoprune.search.monitoring.interrupts import died, end_where_stuck, interruptible
from paretoprune.search.monitoring.progress import Reporter, working
from paretoprune.search.monitoring.trackers import integrations, write_missing
from paretoprune.search.samplers.initial_plans import OTHER_RUN, changed_plans, initial_plans_of, read_other_run
from paretoprune.search.samplers.observations import ObservationBuilder
from paretoprune.search.samplers.prior import Prior
from paretoprune.search.samplers.study import SearchStudy
from paretoprune.search.samplers.warm_start import SENSITIVITY
from paretoprune.search.space.constraints import bounds_of_search, make_screen
from paretoprune.search.space.latency_predictor import make_predictor
from paretoprune.search.storage.driver_lock import DriverLock
from paretoprune.search.storage.object_store import published, remote_of
from paretoprune.search.storage.request import adopt_records, plan_of, unfinished
from paretoprune.search.storage.sample import keep_sample
from paretoprune.search.sweep.budget import Budget
from paretoprune.search.sweep.failures import commonest_fault
from paretoprune.search.sweep.free_moves import FreeMoves, missing_moves
from paretoprune.search.sweep.state import SweepState
from paretoprune.search.trial.exclusive_device import note_lock_place
from paretoprune.search.trial.factory import make_tools
from paretoprune.search.trial.remote_latency import check_target
from paretoprune.search.worker.cluster import (
    DynamicSlots,
    check_cluster,
    is_joined,
    watch_joining_nodes,
    with_model_copied,
)
from paretoprune.search.worker.context import ToolsFactory, WorkerContext
from paretoprune.search.worker.file_transfer import start_courier
from paretoprune.search.worker.ray_output import quiet_ray
from paretoprune.search.worker.ray_tasks import result_of
from paretoprune.search.worker.worker import work_on_baseline

if TYPE_CHECKING:
    from paretoprune.cluster.device_lock import DeviceLock
    from paretoprune.cluster.resources import TrialResources
    from paretoprune.search.config.run_config import RunConfig
    from paretoprune.search.sweep.preflight import ValidatedRun
    from paretoprune.search.sweep.tune_trainable import StopSweep

RAY_SCRATCH = "ray"

# Read by Ray Tune when it is imported or a sweep begins. Its tables, loggers and warnings would bury our progress,
# and its result files repeat what the records say.
TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_THRESHOLD_S": "600",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    # Left alone, Tune starts one worker at a time, and gives its trial away when another worker comes free meanwhile:
    # with trials not much longer than a worker's start, slots stay empty for good. Our searcher counts them itself.
    "TUNE_MAX_PENDING_TRIALS_PG": "10000",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours also says what happens, and covers SIGTERM
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@dataclass(frozen=True)
class SweepOutcome:
    """How a sweep ended. ``interrupted``: by Ctrl-C or SIGTERM, with what had finished kept.

    ``infeasible``: trials beyond the bounds, which count as nothing else. ``used_up``: the budget that ended it,
    ``fault``: what half of the trials or more failed for; both for people.
    """

    finished: int
    failed: int
    total: int
    interrupted: bool
    stopped: int = 0
    infeasible: int = 0
    used_up: str = ""
    fault: str = ""


def run_sweep(prepared: ValidatedRun, factory: ToolsFactory = make_tools) -> SweepOutcome:
    """Run (or go on with) the run of ``prepared`` until ``search.trials`` trials have finished.

    Raises :class:`RunFolderError` where another driver is alive or the folder cannot be written any more,
    :class:`SearchError` where trials all fail. Finished trials survive whatever ends this.
    """
    folder = prepared.folder
    try:
        folder.trials_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(
            f"run folder {folder.path} cannot be made ({error.strerror}); choose another --run"
        ) from error
    remedy = f"resume with `{command_line('resume', folder.path)}`"
    with (
        DriverLock(folder.path) as lock,
        published(folder.path),
        quiet_ray(folder.path),
        interruptible("searching", remedy),
    ):
        config = with_model_copied(prepared.config, folder, copy=True)
        prepared = replace(prepared, config=config)
        save_run_config(folder, config)
        keep_identity(folder, prepared.identity)
        keep_sample(folder, config, prepared.identity)
        records = adopt_records(folder)
        write_missing(folder, records)
        finished = len(records) >= config.search.trials and folder.baseline.is_file()
        if finished and not missing_moves(folder, prepared.space):
            # The last driver may have died with every record written, but before every record was added to the study.
            make_state(prepared, records).close()
            _refuse_failures_alone(folder, records)
            return outcome_of(records, config.search.trials)
        for line in (
            changed_plans(config.search.initial_plans, prepared.space, config.model.imgsz, config.deploy.precision)
            if not records
            else ()
        ):
            note(line)
        with interruptible("measuring the unpruned model", remedy):
            known = prepared.identity.content()[IDENTITY] if prepared.identity else None
            resources, context = start_workers(config, folder, factory, known)
            shared = None if context.courier else folder
            following = DynamicSlots(config, resources, watch_joining_nodes(config, shared, resources))
            slots = following()
            lock.describe(slots)
            note(f"{slots} trials at a time, {resources.cpus} CPUs and {resources.gpus:g} GPUs each")
            context = with_baseline(context, prepared.identity)
        budget = Budget(config.search.max_hours, config.search.max_gpu_hours, resources.gpus)
        state = make_state(prepared, records, budget)
        reporter = Reporter(folder, records, config.search.trials, slots, config.search.objectives)
        free_moves = FreeMoves(context, prepared.space, reporter.note)
        try:
            interrupted = bool(state.remaining) and _tune(state, context, resources, following, reporter)
            if not interrupted:
                free_moves.wait()
        finally:
            free_moves.close()
            following.close()
            state.close()
            reporter.close()
            shutil.rmtree(folder.path / RAY_SCRATCH, ignore_errors=True)
    _complain(state, interrupted)
    if not interrupted:
        _refuse_failures_alone(folder, state.records)
    return outcome_of(state.records, config.search.trials, interrupted, budget.used_up(state.records))


def _complain(state: SweepState, interrupted: bool) -> None:
    """Say why a sweep ended early, where nobody asked for it."""
    path = state.folder.path
    if state.broken is not None:
        raise RunFolderError(
            f"run folder {path} cannot be written any more ({typed_line(state.broken)}), so the sweep ended after "
            f"{len(state.records)} trials, which are kept; make room, then `{command_line('resume', path)}`"
        )
    fault = state.systematic_fault()
    if fault is not None and not interrupted:
        last = state.records[-1].trial_id
        raise SearchError(
            f"trials failed with the same error ({fault}), so the sweep ended after {len(state.records)} of "
            f"{state.total}; see {state.folder.trial_dir(last) / TRIAL_LOG}"
        )


def _refuse_failures_alone(folder: RunFolder, records: Sequence[TrialRecord]) -> None:
    """:class:`SearchError` with the commonest reason where every trial failed."""
    fault = commonest_fault(records)
    if fault is None or any(record.state is not TrialState.FAILED for record in records):
        return
    again = command_line("resume", folder.path, "--trials", 2 * len(records))
    raise SearchError(
        f"a search needs trials that end, but all {len(records)} failed, {fault.count} of them for one reason "
        f"({fault.error}); see {folder.trial_dir(fault.trial_id) / TRIAL_LOG}, mend it, then `{again}`"
    )


def make_state(prepared: ValidatedRun, records: list[Any], budget: Budget | None = None) -> SweepState:
    """The study rebuilt from ``records``, with the unpruned network added where it was measured."""
    config, space = prepared.config, prepared.space
    settings = config.search
    baseline = prepared.folder.read_baseline() if prepared.folder.baseline.is_file() else {}
    predictor = make_predictor(baseline, records)
    bounds = bounds_of_search(settings)
    screen = make_screen(bounds, baseline, predictor)
    teller = ObservationBuilder(settings.objectives, bounds, baseline)
    other = read_other_run(config, baseline) if baseline else None
    asked = [*records, *unfinished(prepared.folder, {record.trial_id for record in records})]
    begun = sum(one.provenance == SENSITIVITY for one in asked)
    # Another seed after every start: the same one would repeat the first suggestions. Nothing finished: as configured.
    study = SearchStudy(
        space,
        {name: direction(name) for name in settings.objectives},
        sampler=settings.sampler,
        seed=settings.seed + len(records),
        starts=initial_plans_of(config, space, baseline, other, begun),
        journal=prepared.folder.study,
        refusal=screen.refusal if screen else None,
        prior=Prior.of(space, baseline),
    )
    unpruned = space.uniform(0.0)
    if baseline and not space.plan(unpruned).ratios:
        study.replay(unpruned, teller.told_baseline(), "baseline")
    if other:
        theirs = ObservationBuilder(
            settings.objectives, bounds, baseline
        )  # of its own: how their trials go on is theirs
        for record in other.told:
            theirs.learn(record)
        for record in other.told:
            levels = space.levels_of(plan_of(record))
            if levels is not None:
                study.replay(levels, theirs.told(record), f"{OTHER_RUN}/{record.trial_id}")
    return SweepState(
        prepared.folder,
        space,
        study,
        records,
        settings.trials,
        teller,
        predictor,
        budget,
    )


def start_workers(
    config: RunConfig, folder: RunFolder, factory: ToolsFactory = make_tools, identity: dict[str, Any] | None = None
) -> tuple[TrialResources, WorkerContext]:
    """Connect to Ray and say what a worker gets; ``identity``: of the run's dataset, as ``baseline.json`` holds it."""
    os.environ.update(TUNE_ENVIRONMENT)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    from paretoprune.cluster.ray_connection import connect
    from paretoprune.cluster.waiting import wait_for_room

    wanted = config.resources
    with speaking() as say:
        say(f"starting Ray ({wanted.address or 'this machine'})")
        address = connect(wanted.address, stuck=end_where_stuck).address
        check_target(LatencyTarget.parse(config.latency.target))
        note_lock_place()
        resources = wait_for_room(
            address,
            wanted.gpus_per_trial,
            wanted.cpus_per_trial,
            wanted.max_concurrent_trials or 1,
            wanted.wait_minutes,
            say,
        )
        carries = is_joined(config) and (not config.resources.shared_storage or remote_of(folder.path) is not None)
        if is_joined(config):
            say("checking the cluster's nodes")
            note(f"{check_cluster(config, None if carries else folder, resources)} nodes are ready")
    for name in ("ray", "ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # failed trials are ours to report
    context = WorkerContext(
        settings=config.model_dump(mode="json"),
        run=str(folder.path),
        cpus=resources.cpus,
        gpus=resources.gpus,
        factory=factory,
        courier=start_courier(folder.path) if carries else None,
        identity=identity,
    )
    return resources, context


def with_baseline(context: WorkerContext, identity: RunIdentity | None = None) -> WorkerContext:
    """Measure the unpruned network, unless an earlier start did, in a worker like a trial's.

    ``identity``: of the dataset, kept with the figures.
    """
    import ray

    folder = context.folder
    if not folder.baseline.is_file():
        task = ray.remote(num_cpus=context.cpus, num_gpus=context.gpus, max_retries=1)(work_on_baseline)
        with working("measuring the unpruned model", folder.path / EVENTS) as look:
            content: dict[str, Any] = result_of(task.remote(context), look)
        if identity is not None:
            identity.save_rows(folder)
            content = {**content, **identity.content()}
        folder.write_baseline(content)
    metrics = folder.read_baseline()["metrics"]
    note(f"unpruned: {accuracy_text(metrics)}, {metrics['latency_ms']:.2f} ms")
    devices = {device: float(metrics[f"latency_ms_{device}"]) for device in context.config.latency.targets}
    return replace(context, baseline_latency_ms=float(metrics["latency_ms"]), devices_ms=devices)


def _tune(
    state: SweepState, context: WorkerContext, resources: TrialResources, slots: Callable[[], int], reporter: Reporter
) -> bool:
    """Run Tune until nothing remains; True where a signal ended it early."""
    from ray import tune

    from paretoprune.search.sweep.tune_searcher import RequestSearcher
    from paretoprune.search.sweep.tune_trainable import StopSweep, SweepCallback, TrialRunner

    stopper = StopSweep(state)
    trainable = tune.with_resources(
        tune.with_parameters(TrialRunner, context=context), {"cpu": resources.cpus, "gpu": resources.gpus}
    )
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=RequestSearcher(state, slots, _driver_gate(resources, context.config)),
            num_samples=-1,  # the searcher ends it: a trial whose worker was lost is handed out again
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="sweep",
            storage_path=str(Path(context.run) / RAY_SCRATCH),
            callbacks=[SweepCallback(state, reporter), *integrations(context.config.search.loggers, context.folder)],
            stop=stopper,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=0),
            # Nothing of Tune's is kept; a worker that does not see the run folder would fail at it, and be replaced.
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
        ),
    )
    with _clean_stop(stopper, reporter):
        try:
            tuner.fit()
        except (OSError, tune.TuneError) as error:
            state.broken = state.broken or _full_disk(error)
            if state.broken is None:
                raise
    state.collect()
    return stopper.asked


def _driver_gate(resources: TrialResources, config: RunConfig) -> DeviceLock | None:
    """The lock of this machine's CPU, where latency may be measured on it; the driver then thinks with one thread."""
    from paretoprune.cluster.device_lock import DeviceLock
    from paretoprune.cluster.environment import pin_threads

    if resources.gpus and LatencyTarget.parse(config.latency.target).threads is None:
        return None
    pin_threads(1)
    return DeviceLock("cpu")


def _full_disk(error: BaseException | None) -> OSError | None:
    """The error of a disk that is full behind ``error``: Tune writes its own files in the run folder, too."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return error
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def _clean_stop(stopper: StopSweep, reporter: Reporter) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM ends the sweep with everything finished kept; a second Ctrl-C ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals belong to the main thread
        return

    def on_signal(number: int, frame: object) -> None:
        if stopper.asked or died():
            raise KeyboardInterrupt
        stopper.asked = True
        reporter.note("stopping: finished trials are kept, running ones will be taken up by `paretoprune resume`")

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def outcome_of(records: list[TrialRecord], total: int, interrupted: bool = False, used_up: str = "") -> SweepOutcome:
    """The counts of ``records``."""
    fault = commonest_fault(records)
    return SweepOutcome(
        finished=len(records),
        failed=sum(record.state is TrialState.FAILED for record in records),
        stopped=sum(record.ending == TrialState.STOPPED.value for record in records),
        infeasible=sum(record.ending == BEYOND_BOUNDS for record in records),
        total=total,
        interrupted=interrupted,
        used_up=used_up if len(records) < total else "",
        fault=fault.text if fault is not None and 2 * fault.count >= len(records) else "",
    )
