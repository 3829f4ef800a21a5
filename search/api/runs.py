"""Runs: begin one, go on with one, look at it, finish its picks, report it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretoprune.base.messages import Listener, heard_by, note, speaking
from paretoprune.base.setting_names import with_present_names
from paretoprune.results.store.bounds import Bounds
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.config.inputs import (
    check_comparable,
    check_dataset_same,
    check_places,
    check_weights,
    missing,
    placed,
)
from paretoprune.search.config.paths import resolve_paths
from paretoprune.search.config.run_config import RunConfig, build_config, merge, nest, read_yaml
from paretoprune.search.config.stored import save_run_config
from paretoprune.search.errors import ArgumentError, InterruptedRunError, SearchError
from paretoprune.search.storage.object_store import ObjectStoreRun, is_uri, remote_of
from paretoprune.search.sweep.preflight import (
    ValidatedRun,
    check_batches,
    check_natives,
    check_teachable,
    check_training,
    existing_run,
    prepare,
)

if TYPE_CHECKING:
    from paretoprune.results.analysis.frames import DataFrame
    from paretoprune.search.finalists.finetune_picks import FinetunedPicks
    from paretoprune.search.monitoring.status import RunStatus
    from paretoprune.search.sweep.sweep import SweepOutcome

# Options of a search -> the settings that they are.
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "classes": ("data.classes",),
    "trials": ("search.trials",),
    "epochs": ("trial.epochs",),
    "imgsz": ("model.imgsz",),
    "strategy": ("trial.strategy",),
    "latency_target": ("latency.target",),
    "recover": ("recover.method",),
    "distill": ("trial.distill", "finetune.distill"),
    "min_map": ("search.min_map",),
    "max_latency_ms": ("search.max_latency_ms",),
    "max_latency_ratio": ("search.max_latency_ratio",),
    "min_speedup": ("search.min_speedup",),
    "max_params_m": ("search.max_params_m",),
    "hours": ("search.max_hours",),
    "gpu_hours": ("search.max_gpu_hours",),
    "stopping": ("search.early_stopping",),
    "plan": ("search.initial_plans",),
    "from_run": ("search.warm_start_run",),
    "address": ("resources.address",),
    "trust_checkpoint": ("model.trust_checkpoint",),
}
OF_FINETUNE = ("epochs", "distill", "teacher", "gpus_per_pick", "trust_checkpoint")  # settings of the section finetune


class Run:
    """A run's folder, or its address in an object store. Raises where no search began there.

    ``outcome``: how the search ended that this object drove, None where it drove none.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder: RunFolder = existing_run(mirrored(path))[0]
        self.outcome: SweepOutcome | None = None

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def path(self) -> Path:
        """The folder."""
        return self.folder.path

    @property
    def config(self) -> RunConfig:
        """Every setting, with its value."""
        return existing_run(self.path)[1]

    @property
    def baseline(self) -> dict[str, Any]:
        """The unpruned model's metrics, measured as a trial's are."""
        return dict(self.folder.read_baseline()["metrics"])

    def front(self, *, pick: str | Sequence[str] = (), **bounds: float | None) -> DataFrame:
        """The front as a data frame, the most accurate trial first; units are in the columns' names.

        ``pick``: only these: knee, best, fastest, smallest, "within:0.02" (the fastest that loses at most this
        accuracy), "speedup:2" (the most accurate that is at least this many times as fast), "3" (so many), "spread:5"
        or trial ids. Bounds: ``max_drop`` (accuracy lost, 0.02: two points), ``min_map``, ``max_latency_ms``,
        ``max_latency_ratio``, ``min_speedup``, ``max_params_m``, ``max_gflops``.
        """
        from paretoprune.results.analysis.frames import front_frame

        return front_frame(self.folder, bounds_of(bounds), listed(pick))

    def trials(self) -> DataFrame:
        """All finished trials as a data frame, those that failed or were stopped too."""
        from paretoprune.results.analysis.frames import trials_frame

        return trials_frame(self.folder.read_records(), self.folder.read_baseline(), self.folder.objectives())

    def status(self) -> RunStatus:
        """How far it is: ``.progress`` (done, running, left, ...), ``.driver``, None where none is alive."""
        from paretoprune.search.monitoring.status import run_status

        search = self.config.search
        return run_status(self.folder, search.trials, search.objectives)

    def resume(self, *, on_progress: Listener | None = None, **options: Any) -> Run:
        """Go on after any kind of end, or with more ``trials`` extend a finished run.

        Options, as the command's: ``trials``, ``hours``, ``gpu_hours``, ``address``; ``model`` and ``data``: where
        they lie now, after a move.
        """
        with heard_by(on_progress):
            return _drive(prepare_resume(self.path, **options))

    def finetune(self, *, on_progress: Listener | None = None, **options: Any) -> DataFrame:
        """Fine-tune picks fully and measure them again together; a data frame with a row for each finished network.

        ``pick`` and bounds as :meth:`front` takes them (none: three picks), or ``trial``: ids. Options, as the
        command's: ``native`` (smaller stock models, trained with the same budget), ``free_moves`` (as so many
        of which the unpruned model is trained with that budget, too), ``epochs``, ``distill``,
        ``teacher`` (a checkpoint whose outputs are learned beside the labels), ``gpus_per_pick``,
        ``trust_checkpoint``, ``address``, ``model``, ``data``; other settings of the section by their names:
        ``settings={"finetune.train.mosaic": 0.5}``.

        Raises after all ended where some failed; the others are kept, and the same call takes up what is left.
        """
        from paretoprune.results.analysis.frames import frame_of

        with heard_by(on_progress):
            done = finetune_picks(self.path, **options)
        if done.failed:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in done.failed.items())
            raise SearchError(f"fine-tuning failed for {len(done.failed)} networks ({reasons}); the others are kept")
        return frame_of(done.rows)

    def report(self, **places: str | Path | None) -> Path:
        """Write report.html (opens offline), front.csv and figures; returns the report's path.

        ``model`` and ``data``: where they lie now, after a move.
        """
        return report(self.path, **places)


def search(
    model: str | Path,
    data: str | Path,
    *,
    run: str | Path | None = None,
    config: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    on_progress: Listener | None = None,
    **options: Any,
) -> Run:
    """Search a checkpoint's pruning trade-offs on a dataset (data.yaml, a classifier's folder), in the folder ``run``.

    Called again on the same folder (None: runs/<model's name>), it goes on. Options, as the command's: ``classes``
    (names or numbers of those that are kept), ``trials``, ``epochs``, ``imgsz``, ``strategy``, ``latency_target``,
    ``recover``, ``distill``, ``min_map``, ``max_latency_ms``, ``max_latency_ratio``, ``min_speedup``, ``max_params_m``,
    ``hours``, ``gpu_hours``, ``stopping``, ``plan``, ``from_run``, ``address``, ``trust_checkpoint``. Every other
    setting by its name:
    ``settings={"space.round_to": 16}``. ``config``: a YAML file of settings, which options go before. ``on_progress``
    is called with lines that else go to stderr.

    Raises :class:`paretoprune.UserError`, a ValueError, for everything that a person can put right, before any work.
    """
    with heard_by(on_progress):
        return _drive(prepare_search(model, data, run=run, config=config, settings=settings, **options))


def prepare_search(
    model: str | Path,
    data: str | Path,
    *,
    run: str | Path | None = None,
    config: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> ValidatedRun:
    """The checked run of :func:`search`."""
    check_names("a search", options, OPTIONS)
    given = {"model.path": model, "data.path": data}
    given |= {key: value for name, value in options.items() for key in OPTIONS[name]}
    composed = compose(None if config is None else Path(config), given, nest(settings or {}))
    return prepare(composed, mirrored(run or Path("runs") / Path(model).stem))


def prepare_resume(
    run: str | Path, *, model: str | Path | None = None, data: str | Path | None = None, **options: Any
) -> ValidatedRun:
    """The checked run of :meth:`Run.resume`."""
    check_names("resume", options, ("trials", "hours", "gpu_hours", "address"))
    folder, config = existing_run(mirrored(run))
    config = placed(config, _text(model), _text(data))
    check_places(folder, config)
    over = nest({key: value for name, value in options.items() if value is not None for key in OPTIONS[name]})
    if over:
        config = build_config(merge(config.model_dump(mode="json"), over), "the options")
    return prepare(config, folder.path, moved=bool(model or data))


def compose(file: Path | None, options: Mapping[str, Any], settings: Mapping[str, Any]) -> RunConfig:
    """Defaults, then the file, then the (dotted) options that were given, then the (nested) settings."""
    values: dict[str, Any] = {}
    if file is not None:
        values = read_yaml(file)
        # On their own first, so that a mistake in the file is reported with the file's name.
        build_config(merge({"model": {"path": "model.pt"}, "data": {"path": "data.yaml"}}, values), str(file))
    values = merge(values, nest({key: _plain(key, value) for key, value in options.items() if value is not None}))
    return build_config(resolve_paths(merge(values, with_present_names(settings))), "the settings")


def finetune_picks(
    run: str | Path,
    *,
    pick: str | Sequence[str] = (),
    trial: str | Sequence[str] = (),
    native: str | Path | Sequence[str | Path] = (),
    free_moves: int = 0,
    address: str | None = None,
    model: str | Path | None = None,
    data: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> FinetunedPicks:
    """What :meth:`Run.finetune` does; failures are told in the result."""
    from paretoprune.search.finalists.finetune_picks import choose_free_moves, choose_picks, promote

    limits = [name for name in options if name in Bounds.__dataclass_fields__]
    check_names("finetune", options, (*OF_FINETUNE, *Bounds.__dataclass_fields__))
    picks, trials, natives = listed(pick), listed(trial), listed(native)
    if picks and trials:
        raise ArgumentError("give `pick` or `trial`, not both")
    folder, before = existing_run(mirrored(run))
    config = placed(before, _text(model), _text(data))
    check_places(folder, config)
    check_weights(folder, config.model.path)
    check_dataset_same(folder, config)
    if config != before:
        save_run_config(folder, config)  # the next command finds them there
    own = nest(settings or {})
    for section in own:
        if section != "finetune":
            raise ArgumentError(f"finetune takes settings of the section finetune, but got `{section}`: leave it out")
    changed = {"finetune": {name: options[name] for name in OF_FINETUNE if options.get(name) is not None}}
    changed = resolve_paths(merge(changed, own))
    config = build_config(merge(config.model_dump(mode="json"), changed), "the options")
    if address is not None:
        config = config.model_copy(update={"resources": config.resources.model_copy(update={"address": address})})
    bounds = bounds_of({name: options[name] for name in limits})
    chosen = choose_picks(folder, config.search.objectives, picks or trials, bounds)
    with speaking(at_once=False) as say:
        say("checking the models")
        check_batches(config, "finetune")
        check_teachable(config)
        check_training(config)
        check_natives(config, natives)
    moves = choose_free_moves(folder, chosen, free_moves)
    return promote(folder, config, chosen, natives=natives, free_moves=moves)


def report(*runs: str | Path, model: str | Path | None = None, data: str | Path | None = None) -> Path:
    """Write a run's report; of several runs, one page that lays them over each other (runs.html in the first one's).

    ``model`` and ``data``: where one run's lie now, after a move.
    """
    from paretoprune.results.analysis.strategy_comparison import ComparisonFolder
    from paretoprune.results.report.report import write_report
    from paretoprune.results.report.run_comparison_page import write_overlay

    if not runs:
        raise ArgumentError("a report needs at least one run; give its folder")
    if len(runs) > 1 and (model or data):
        raise ArgumentError("`model` and `data` say where one run's lie now; give one run with them")
    folders = [mirrored(run) for run in runs]
    for folder in folders:
        if len(runs) > 1 or not ComparisonFolder(folder).json.is_file():  # a comparison needs no search
            _check_run(folder, _text(model), _text(data))
    check_comparable([RunFolder(folder) for folder in folders])
    with sent_back(folders[0]), speaking(at_once=False) as say:
        say("writing the report")
        return write_report(folders[0]) if len(folders) == 1 else write_overlay(folders)


def mirrored(run: str | Path) -> Path:
    """The folder of a run; of one in an object store the mirror here, brought up to date."""
    return ObjectStoreRun(run).pull() if isinstance(run, str) and is_uri(run) else Path(run)


@contextmanager
def sent_back(run: Path) -> Iterator[None]:
    """What the body writes into a mirror goes to its object store at the end."""
    yield
    if (remote := remote_of(run)) is not None:
        remote.push()


def bounds_of(values: Mapping[str, Any]) -> Bounds:
    """The bounds by their names."""
    check_names("a selection", values, Bounds.__dataclass_fields__)
    return Bounds(**values)


def listed(given: str | Path | Sequence[str | Path]) -> list[str]:
    """One or several, as texts."""
    return [str(given)] if isinstance(given, (str, Path)) else [str(item) for item in given]


def check_names(what: str, given: Mapping[str, Any], known: Mapping[str, Any] | Sequence[str]) -> None:
    """:class:`ArgumentError` for an argument that there is none of."""
    for name in given:
        if name not in known:
            raise ArgumentError(f"{what} takes {', '.join(known)}, but got `{name}`; leave it out")


def _drive(prepared: ValidatedRun) -> Run:
    from paretoprune.search.sweep.sweep import run_sweep

    outcome = run_sweep(prepared)
    run = Run(prepared.folder.path)
    run.outcome = outcome
    if outcome.interrupted:  # a script must not go on with its next step
        raise InterruptedRunError(
            f"interrupted after {outcome.finished} of {outcome.total} trials, which are kept; resume with "
            f"{run}.resume()"
        )
    return run


def _check_run(run: Path, model: str | None, data: str | None) -> None:
    """A run's model and dataset are still its own; where they are not at hand, a report is written all the same."""
    folder, before = existing_run(run)
    config = placed(before, model, data)
    check_weights(folder, config.model.path)
    gone = missing(config)
    if "dataset" not in gone:
        check_dataset_same(folder, config)
    for what, option in gone.items():
        note(f"the {what} of {folder.path} is not where it was and was not compared; {option} says where it lies now")
    if config != before:
        save_run_config(folder, config)


def _text(path: str | Path | None) -> str | None:
    return None if path is None else os.fspath(path)


def _plain(key: str, value: Any) -> Any:
    """Settings hold texts, and ``search.initial_plans`` a list of them."""
    if key == "search.initial_plans":
        return listed(value)
    return str(value) if isinstance(value, Path) else value
