"""Everything that can be wrong with the input, found before Ray starts and said in one line each.

The cheap checks come first: they need neither torch nor the model.
"""

from __future__ import annotations

import os
import random
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretoprune.base.image_size import ImageSize, larger_side
from paretoprune.base.messages import note, speaking
from paretoprune.pruning.names import SEQUENTIAL, STRUCTURAL
from paretoprune.pruning.yolo.image_size import STRIDE, check_shape, stride_of
from paretoprune.results.store.accuracy import DEFAULT, LABELS
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.config.classes import with_class_names, with_class_subset
from paretoprune.search.config.inputs import RunIdentity, check_dataset_same, check_weights, identity_of, is_identified
from paretoprune.search.config.latency_target import LatencyTarget
from paretoprune.search.errors import ConfigError, RunFolderError
from paretoprune.search.monitoring.trackers import check_loggers
from paretoprune.search.samplers.initial_plans import check_other_dataset, check_other_run, check_plans
from paretoprune.search.space.space import Space, build_space, check_patterns, image_sizes
from paretoprune.search.storage.driver_lock import alive_driver
from paretoprune.search.trial.agent_latency import check_agents, pool_of
from paretoprune.search.trial.exclusive_device import measuring_threads
from paretoprune.search.worker.cluster import is_joined, with_model_copied

if TYPE_CHECKING:
    from paretoprune.search.config.run_config import RunConfig

# Which exactly exist, Ultralytics says; anything else need not wait for it to be loaded.
OFFICIAL_NAME = re.compile(r"(yolo|rtdetr)[\w.-]*\.pt", re.IGNORECASE)

_NO_ENERGY = (
    "search.objectives: energy_j needs a GPU that counts its energy, but trials would run on the CPU; take energy_j out"
)


@dataclass(frozen=True)
class ValidatedRun:
    """A run that may start: its folder, its configuration with absolute paths and all defaults decided, its space."""

    folder: RunFolder
    config: RunConfig
    space: Space
    identity: RunIdentity | None = None
    """Of the dataset; None: not asked for."""


def prepare(config: RunConfig, run: Path, moved: bool = False) -> ValidatedRun:
    """Check everything about starting ``config`` in the folder ``run``; nothing is written, but with ``data.classes``
    the network and the dataset of these classes.

    ``moved``: somebody said that the run's model or dataset lies at another place now, as ``config`` has it.

    Raises one of the rooms' errors, each one line.
    """
    with speaking(at_once=False) as say:
        say("checking the model and the dataset")
        return _checked(config, run, moved)


def _checked(config: RunConfig, run: Path, moved: bool) -> ValidatedRun:
    config = _decided(config)
    check_files(config)
    check_energy(config)
    check_device(config)
    check_runtime_here(config)
    check_deployment(config)
    if not Path(config.model.path).is_file():
        config = _fetched(config)
    config = with_class_names(config)
    folder = RunFolder(run.expanduser().resolve())
    config = _with_newer_settings_of(folder, config)
    if config.data.classes is None:
        config = with_model_copied(config, folder, copy=False)
    check_run_folder(folder, config, moved)
    config = with_class_subset(config, folder)
    check_weights(folder, config.model.path)
    check_other_run(config)
    space, sizes, objectives, task = check_model(config)
    identity = identity_of(config, task)
    check_dataset_same(folder, config, identity)
    check_other_dataset(config, identity)
    check_loggers(config.search.loggers, folder.path.name)
    decided = {
        "search": config.search.model_copy(update={"objectives": objectives}),
        "space": config.space.model_copy(update={"imgsz": sizes, "depth": bool(space.depth_axes)}),
    }
    return ValidatedRun(folder, config.model_copy(update=decided), space, identity)


def check_files(config: RunConfig) -> None:
    """The model and the dataset are there; a bare name is left to Ultralytics, which knows some."""
    model, data = config.model.path, config.data.path
    check_model_file(model)
    check_utf8("dataset", data, "Ultralytics' training writes it into a YAML file")
    if not Path(data).exists() and _is_path(data):
        raise ConfigError(f"dataset not found: {data} (expected a data.yaml; for a classifier its folder)")


def check_utf8(what: str, path: str | Path, why: str) -> None:
    """The names of images and models may be of any bytes; some paths go where text must be UTF-8."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(f"the path of the {what} must be UTF-8, since {why}, but got {path}; rename it") from None


def check_model_file(model: str) -> None:
    """``model`` is a checkpoint that exists, or may be an official name; said before torch is loaded."""
    if Path(model).suffix != ".pt":
        raise ConfigError(f"a model must be an Ultralytics checkpoint (.pt), got {model}; give a .pt file")
    if not Path(model).is_file() and not OFFICIAL_NAME.fullmatch(model):
        raise ConfigError(f"the model must exist, but there is no file {model}; check the path")


def check_natives(config: RunConfig, natives: Sequence[str]) -> None:
    """Every native rival is a checkpoint of the run's task, and no two share a name."""
    stems = [Path(path).stem for path in natives]
    if len(set(stems)) != len(stems):
        raise ConfigError(f"native models are identified by their file names, got {', '.join(stems)}; rename one")
    for path in natives:
        check_model_file(path)
    if natives:
        from paretoprune.pruning.training.stock_baseline import check_native
        from paretoprune.pruning.yolo.loading import load_model
        from paretoprune.pruning.yolo.saving import task_of

        task = task_of(load_model(config.model.path, config.model.trust_checkpoint))
        for path in natives:
            check_native(path, task, trusts_native(config, path))


def trusts_native(config: RunConfig, path: str) -> bool:
    """Whether a native rival is loaded as it is: by the option, or because it is the run's own model, which is."""
    own, native = Path(config.model.path), Path(path)
    is_own = own.is_file() and native.is_file() and own.samefile(native)
    return config.finetune.trust_checkpoint or (is_own and config.model.trust_checkpoint)


def check_energy(config: RunConfig) -> None:
    """Energy, where it is an objective, is counted on the GPU on which a trial runs and measures its latency."""
    if "energy_j" not in config.search.objectives:
        return
    target = config.latency.target
    if target != "own":
        raise ConfigError(
            "search.objectives: energy_j is counted on the trial's own GPU while latency is measured there, but "
            f"latency.target is {target}; take energy_j out, or set latency.target to own"
        )
    if config.model.device == "cpu" or config.resources.gpus_per_trial == 0:
        raise ConfigError(_NO_ENERGY)


def check_device(config: RunConfig) -> None:
    """A GPU that was asked for is there; a cluster's nodes are looked at when it is joined."""
    if is_joined(config):
        return
    from paretoprune.cluster.devices import CudaDriver

    if "energy_j" in config.search.objectives and CudaDriver().uuid(0) is None:
        raise ConfigError(_NO_ENERGY)
    wanted = config.model.device == "cuda" or bool(config.resources.gpus_per_trial)
    if wanted and CudaDriver().uuid(0) is None:
        raise ConfigError(
            "the settings ask for a GPU (model.device or resources.gpus_per_trial), but this machine shows none; "
            "check nvidia-smi, or leave the setting out to use the CPU"
        )


def check_runtime_here(config: RunConfig) -> None:
    """The runtime that measures latency can run, here or on the agents' devices; of a cluster only its workers can
    say."""
    for latency in config.latency.everywhere().values():
        agents = LatencyTarget.parse(latency.target)
        if agents.agents:
            check_agents(pool_of(agents, latency.token_file), config.timed_by(latency))
    target = LatencyTarget.parse(config.latency.target)
    if target.agents:
        return
    if config.resources.address is not None or target.resource is not None:
        return
    from paretoprune.cluster.devices import default_device
    from paretoprune.pruning.latency.runtimes import check_runtime

    on_cpu = target.threads is not None or config.model.device == "cpu" or config.resources.gpus_per_trial == 0
    latency = config.latency
    check_runtime(latency.runtime, "cpu" if on_cpu else default_device(), latency.half, latency.span)


def check_deployment(config: RunConfig) -> None:
    """What ships can be made and run here; of a cluster only its workers can say."""
    if config.deploy.format == "torch" or config.resources.address is not None:
        return
    from paretoprune.cluster.devices import default_device
    from paretoprune.pruning.export.precision import check_precision

    on_cpu = config.model.device == "cpu" or config.resources.gpus_per_trial == 0
    for precision in config.space.precision or [config.deploy.precision]:
        check_precision(config.deploy.format, precision, "cpu" if on_cpu else default_device())


def check_run_folder(folder: RunFolder, config: RunConfig, moved: bool = False) -> None:
    """The folder can be written, nobody drives it, and it holds no other configuration (``moved``: see ``prepare``)."""
    check_utf8("run folder", folder.path, "Ray Tune keeps its files there by that name")
    check_writable(folder.path)
    driver = alive_driver(folder.path)
    if driver is not None:
        raise RunFolderError(
            f"run folder {folder.path} is in use by another driver (host {driver.host}, pid {driver.pid}); "
            "wait for it, stop it, or choose another --run",
            driver.host,
            driver.pid,
        )
    if folder.config.is_file():
        _check_same(folder, config, moved)
    elif folder.trials_file.exists():
        raise RunFolderError(
            f"run folder {folder.path} holds trials but no config.yaml, so what they mean is unknown; "
            "choose another --run"
        )


def check_writable(path: Path) -> None:
    """A file can be made in ``path``, or in the nearest folder above it that exists."""
    place = path
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise RunFolderError(
            f"run folder {path} must be writable, but {place} is not ({os.strerror(error.errno or 0)}); "
            "choose another --run"
        ) from error


def check_model(config: RunConfig) -> tuple[Space, list[ImageSize], list[str], str]:
    """The model loads, the dataset fits it, the criterion exists, a teacher that is asked for can teach this kind of
    network, the settings leave something to prune, and a random plan of theirs gives a network that computes the same.

    Also returns the input sizes, the run's own first; the objectives (those given, or the usual ones in the
    words of the model's task) and that task.
    """
    from paretoprune.cluster.device_lock import DeviceLock
    from paretoprune.pruning.data.dataset import check_dataset
    from paretoprune.pruning.importance import known_criterion
    from paretoprune.pruning.strategies import get_strategy
    from paretoprune.pruning.workbench import Workbench
    from paretoprune.pruning.yolo.saving import task_of
    from paretoprune.pruning.yolo.tasks import kind_of, metric_keys

    known_criterion(config.recover.importance)
    bench = Workbench(
        config.model.path,
        config.data.path,
        config.model.imgsz,
        importance=config.recover.importance,
        round_to=config.space.round_to,
        seed=config.search.seed,
        trust_checkpoint=config.model.trust_checkpoint,
        gate=DeviceLock("cpu"),  # another run of this host may be measuring
    )
    for remark in check_dataset(config.data.path, bench.model):
        note(remark)
    wanted = config.space.imgsz
    if wanted is None and config.trial.strategy != STRUCTURAL:
        wanted = []  # these are controls: they show what another way of cutting gives, all else equal
    sizes = image_sizes(config.model.imgsz, wanted, stride_of(bench.model))
    for size in sizes:
        check_shape(task_of(bench.model), size)
    if config.trial.epochs:
        check_batches(config, "trial", bench.model, min(sizes, key=larger_side))
    check_teachable(config, bench.model)
    check_training(config)
    objectives = objectives_of(config, tuple(metric_keys(kind_of(bench.model))))
    # Tracing the model takes a second or two; a pattern that matches no module at all need not wait for it.
    check_patterns([name for name, _ in bench.model.named_modules()], config.space)
    check_plans(config.search.initial_plans, [layer.name for layer in bench.table.layers])
    branches = bench.branches if config.space.depth and config.trial.strategy == STRUCTURAL else None
    precisions = config.space.precision or ()
    space = build_space(bench.table, config.space, config.trial.strategy == SEQUENTIAL, sizes, branches, precisions)
    if get_strategy(config.trial.strategy).exact:
        narrower = space.plan(space.random_narrower(random.Random(config.search.seed)))
        bench.check_surgery(narrower)
    return space, list(sizes), objectives, task_of(bench.model)


def check_batches(config: RunConfig, section: str, model: Any = None, imgsz: ImageSize | None = None) -> None:
    """The training of the ``section`` ("trial", "finetune") is by batches that the run's ``model`` can be trained on,
    at ``imgsz`` (None: the run's).

    Without a ``model`` it is loaded where the batch is of one image, and the dataset is not looked at.
    """
    from paretoprune.pruning.data.dataset import training_images
    from paretoprune.pruning.training.batch_of_one import check_batch
    from paretoprune.pruning.yolo.loading import load_model

    batch = getattr(config, section).batch
    if model is None and batch > 1:
        return
    images = training_images(config.data.path, model, 2) if model is not None else batch
    model = model if model is not None else load_model(config.model.path, config.model.trust_checkpoint)
    check_batch(model, larger_side(imgsz or config.model.imgsz), batch, images, f"{section}.batch")


def check_teachable(config: RunConfig, model: Any = None) -> None:
    """:class:`ConfigError` where a teacher is asked for that cannot teach the run's ``model`` (None: it is loaded)."""
    from paretoprune.pruning.errors import PruningError
    from paretoprune.pruning.training.teacher import check_teacher, own_teacher
    from paretoprune.pruning.yolo.loading import load_model

    own = config.finetune.teacher
    distils = (config.trial.distill and config.trial.epochs) or config.finetune.distill
    if not distils and own is None:
        return
    loaded = model or load_model(config.model.path, config.model.trust_checkpoint)
    if own is not None:
        check_model_file(own)
        own_teacher(own, loaded, config.model.imgsz, config.finetune.trust_checkpoint)
    try:  # else every trial, or every pick, would fail by it
        if distils:
            check_teacher(loaded, config.model.imgsz)
    except PruningError as error:
        raise ConfigError(f"{error} (--no-distill)") from error


def check_training(config: RunConfig) -> None:
    """The user's own training arguments are Ultralytics', and such as may be changed."""
    if config.finetune.train:
        from paretoprune.pruning.training.own_arguments import check_arguments

        check_arguments(config.finetune.train, by_labels=not config.finetune.distill)


def objectives_of(config: RunConfig, accuracies: Sequence[str]) -> list[str]:
    """The run's objectives, checked against the ``accuracies`` that the model's task has, its own one first.

    Where none were given, that one takes the place of the detectors' (a classifier has ``top1``, no ``map50_95``).
    :class:`ConfigError` for one that was given and that the task does not have.
    """
    from paretoprune.results.store.objectives import DIRECTIONS, direction

    wanted = list(config.search.objectives)
    if "objectives" not in config.search.model_fields_set:
        wanted = [accuracies[0] if name == DEFAULT else name for name in wanted]
        devices = [f"latency_ms_{device}" for device in config.latency.targets]
        if devices and config.latency.target == "own":  # named devices are what counts, not the one that searches
            wanted.remove("latency_ms")
        wanted += devices
        if len(wanted) > 3:
            raise ConfigError(
                f"a front has at most three objectives, but there would be {', '.join(wanted)}; "
                "choose of them in search.objectives"
            )
    unknown = [name for name in wanted if direction(name) == "max" and name not in accuracies]
    if unknown:
        known = ", ".join(name for name in DIRECTIONS if name in accuracies)
        raise ConfigError(f"search.objectives: this model's task has {known}, but got {unknown[0]}; choose of these")
    return wanted


def existing_run(run: Path) -> tuple[RunFolder, RunConfig]:
    """The folder and configuration of a run that ``search`` began; :class:`RunFolderError` where there is none."""
    from paretoprune.search.config.stored import load_run_config

    folder = RunFolder(run.expanduser().resolve())
    if not folder.config.is_file():
        what = "it does not exist" if not folder.path.exists() else "it holds no config.yaml"
        raise RunFolderError(f"{run} must be a run folder, but {what}; `paretoprune search` makes one")
    return folder, load_run_config(folder)


def _check_same(folder: RunFolder, config: RunConfig, moved: bool) -> None:
    from paretoprune.search.config.run_config import differing_keys
    from paretoprune.search.config.stored import load_run_config

    stored, config = _decided(load_run_config(folder)), _decided(config)
    if "objectives" not in config.search.model_fields_set:  # then they were not compared: see objectives_of
        usual = [name if name not in LABELS else DEFAULT for name in stored.search.objectives]
        if usual == config.search.objectives:
            config = config.model_copy(
                update={"search": config.search.model_copy(update={"objectives": stored.search.objectives})}
            )
    # Weights and dataset are compared by what they hold, where the run knows it, or has measured nothing yet
    unbound = moved or not folder.baseline.is_file() or is_identified(folder)
    free = ("model.path", "data.path") if unbound else ()
    differing = [key for key in differing_keys(stored, config) if key not in free]
    if differing:
        key = differing[0]
        before, after = stored.flat().get(key), config.flat().get(key)
        more = f" and {len(differing) - 1} more settings" if len(differing) > 1 else ""
        raise RunFolderError(
            f"run folder {folder.path} already holds another configuration: `{key}` is {before!r} there, got {after!r}"
            f"{more}; choose another --run, or resume with `paretoprune resume` (--model, --data: where they lie now)"
        )


def _with_newer_settings_of(folder: RunFolder, config: RunConfig) -> RunConfig:
    """Where settings that older versions did not have were not given, as the run has them."""
    from paretoprune.search.config.run_config import SINCE
    from paretoprune.search.config.stored import load_run_config

    if not folder.config.is_file():
        return config
    stored = _decided(load_run_config(folder))
    for key in (key for keys in SINCE.values() for key in keys):
        section, name = key.split(".")
        ours = getattr(config, section)
        if name not in ours.model_fields_set or getattr(ours, name) is None:
            ours = ours.model_copy(update={name: getattr(getattr(stored, section), name)})
            config = config.model_copy(update={section: ours})
    return config


def _decided(config: RunConfig) -> RunConfig:
    """Defaults that depend on this machine become values, so that config.yaml repeats the run."""
    if config.space.imgsz is not None:
        sizes = list(image_sizes(config.model.imgsz, config.space.imgsz, STRIDE))
        config = config.model_copy(update={"space": config.space.model_copy(update={"imgsz": sizes})})
    if config.space.precision is not None and config.deploy.precision != config.space.precision[0]:
        deploy = config.deploy.model_copy(update={"precision": config.space.precision[0]})
        config = config.model_copy(update={"deploy": deploy})
    target = LatencyTarget.parse(config.latency.target)
    elsewhere = target.resource is not None or target.agents  # which decides by its own cores
    if config.latency.threads is not None or elsewhere:
        return config
    latency = config.latency.model_copy(update={"threads": target.threads or measuring_threads()})
    return config.model_copy(update={"latency": latency})


def _fetched(config: RunConfig) -> RunConfig:
    """A model that was given by its official name, as the file it is in: workers have other working directories."""
    from paretoprune.pruning.yolo.loading import model_file

    path = str(model_file(config.model.path).resolve())
    return config.model_copy(update={"model": config.model.model_copy(update={"path": path})})


def _is_path(text: str) -> bool:
    """Whether ``text`` means a place on disk rather than a name that Ultralytics may know."""
    return os.sep in text or text.startswith(("~", "."))
