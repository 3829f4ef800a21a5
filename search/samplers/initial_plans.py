"""Initial plans of a run, before its sampler is asked: the user's plans, another run's, the warm start."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretoprune.base.image_size import ImageSize, size_text
from paretoprune.base.messages import note
from paretoprune.pruning.plan import Plan
from paretoprune.results.store.objectives import device_of
from paretoprune.results.store.records import TrialRecord, TrialState
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.config.inputs import (
    IDENTITY,
    RunIdentity,
    differences_from,
    stored_identity,
    told,
    weights_hash,
)
from paretoprune.search.errors import ConfigError
from paretoprune.search.samplers.warm_start import InitialPlan, warm_start
from paretoprune.search.space.constraints import bounds_of_search
from paretoprune.search.space.space import Space
from paretoprune.search.storage.request import plan_of

if TYPE_CHECKING:
    from paretoprune.search.config.run_config import RunConfig

PLAN, OTHER_RUN = "plan", "from-run"
# What a trial's figures depend on, beside its plan and the model: equal settings, equal figures.
_DECISIVE = ("model.imgsz", "data.", "recover.", "trial.", "latency.", "deploy.", "space.round_to")
_WITHOUT_EFFECT = ("trial.workers",)
_SAME_RATIO = 1e-4  # ratios in plan files are rounded


@dataclass(frozen=True)
class OtherRun:
    """Trials of a finished run. ``told``: of equal settings and on the same device, so that their figures are ours,
    stopped and failed ones among them, whose plans would end no better;
    ``retried``: plans of its front that are tried again, since theirs would not be."""

    told: tuple[TrialRecord, ...]
    retried: tuple[TrialRecord, ...]


def initial_plans_of(
    config: RunConfig, space: Space, baseline: Mapping[str, Any], other: OtherRun | None = None, begun: int = 0
) -> list[InitialPlan]:
    """The plans to try first, in this order and each once: given by the user, of another run, the warm start.

    ``begun``: how many plans by sensitivity earlier drivers have handed out; what was known then decided which.
    """
    starts = [InitialPlan(space.nearest(plan), PLAN) for plan in read_plans(config.search.initial_plans)]
    if other is not None:
        starts += [InitialPlan(space.nearest(plan_of(record)), OTHER_RUN) for record in other.retried]
    if config.search.warm_start:
        warm = warm_start(space, config.search.trials, baseline.get("sensitivity", ()))
        starts += warm[begun:] if warm and warm[0].revised else warm
    first: dict[tuple[int, ...], InitialPlan] = {}
    for start in starts:
        first.setdefault(start.levels, start)
    return list(first.values())


def read_plans(paths: Sequence[str]) -> list[Plan]:
    """The plans of files; raises what :meth:`pruning.plan.Plan.load` raises."""
    return [Plan.load(Path(path)) for path in paths]


def check_plans(paths: Sequence[str], layers: Sequence[str]) -> None:
    """Every plan is readable and of this model; :class:`ConfigError` names the file and the layer that is not."""
    for path, plan in zip(paths, read_plans(paths), strict=True):
        unknown = [layer for layer in plan.ratios if layer not in layers]
        if unknown:
            raise ConfigError(
                f"search.initial_plans: {path} must be of this model, but it prunes {unknown[0]}, which the model "
                "does not have; give a plan of this model"
            )


def changed_plans(paths: Sequence[str], space: Space, imgsz: ImageSize, precision: str = "fp32") -> list[str]:
    """A line for each plan that the space does not hold as it is: what it is tried with in place of it. ``imgsz`` and
    ``precision``: the run's."""
    lines = []
    for path, plan in zip(paths, read_plans(paths), strict=True):
        tried = space.plan(space.nearest(plan))
        changed = [f"{name} {old:g} -> {new:g}" for name, old, new in _differences(plan.ratios, tried.ratios, space)]
        old, new = plan.imgsz or imgsz, tried.imgsz or imgsz
        if old != new:
            changed.insert(0, f"imgsz {size_text(old)} -> {size_text(new)}")
        if plan.precision not in (None, tried.precision or precision):
            changed.insert(0, f"precision {plan.precision} -> {tried.precision or precision}")
        if lost := sorted(set(plan.branches) ^ set(tried.branches)):
            changed.insert(0, f"{'without removing' if lost[0] in plan.branches else 'removing'} {lost[0]}")
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            lines.append(
                f"search.initial_plans: {path} lies outside the search space and is tried with "
                f"{', '.join(changed[:3])}{more}; to try it as it is, widen space.imgsz, space.precision, "
                "space.max_ratio, space.exclude, space.blocks, space.depth, or lower space.round_to"
            )
    return lines


def _differences(
    given: Mapping[str, float], tried: Mapping[str, float], space: Space
) -> Iterator[tuple[str, float, float]]:
    """Layer, ratio given, ratio tried, where they differ. A ratio given for any layer of a group is that of all."""
    groups = [group.layers for axis in space.width_axes for group in axis.groups]
    free = {layer for layers in groups for layer in layers}
    for layers in [*groups, *((layer,) for layer in given if layer not in free)]:
        name = next((layer for layer in layers if layer in given), layers[0])
        old, new = given.get(name, 0.0), tried.get(name, 0.0)
        if abs(old - new) > _SAME_RATIO:
            yield name, old, new


def check_other_dataset(config: RunConfig, now: RunIdentity) -> None:
    """``search.warm_start_run`` is a run on the same dataset, as far as it knows.

    :class:`ConfigError` says what differs.
    """
    if config.search.warm_start_run is None:
        return
    folder = RunFolder(Path(config.search.warm_start_run))
    known = stored_identity(folder)
    if known is None:
        note(f"run {folder.path} does not know its dataset's content, so its path decides whether it is the same")
        return
    found = differences_from(folder, known, now)
    if found:
        raise ConfigError(
            f"search.warm_start_run: {folder.path} must be of the same dataset, but it is not that of "
            f"{config.data.path}: {told(found)}; give a run on this dataset, or leave it out"
        )


def check_other_run(config: RunConfig) -> None:
    """``search.warm_start_run`` is a run on the same weights and image size.

    :class:`ConfigError` says where it is not.
    """
    path = config.search.warm_start_run
    if path is None:
        return
    folder = RunFolder(Path(path))
    if not folder.config.is_file() or not folder.baseline.is_file():
        raise ConfigError(
            f"search.warm_start_run: {path} must be a run folder with its baseline, but it is not; check it"
        )
    from paretoprune.search.config.stored import load_run_config

    theirs, baseline = load_run_config(folder), folder.read_baseline()
    own, its = size_text(config.model.imgsz), size_text(theirs.model.imgsz)
    if its != own:
        raise ConfigError(
            f"search.warm_start_run: {path} must be at {own} px, but it is at {its} px; give another run or the same "
            "--imgsz"
        )
    ours = weights_hash(Path(config.model.path))
    known = baseline.get("weights_hash")
    if known is None:  # a run made before hashes were kept: its checkpoint, where it still is
        known = weights_hash(Path(theirs.model.path)) if Path(theirs.model.path).is_file() else "unknown"
    if known != ours:
        raise ConfigError(
            f"search.warm_start_run: {path} must be of the same weights, but its model has the hash {known} and "
            f"{config.model.path} has {ours}; give a run on this checkpoint"
        )


def read_other_run(config: RunConfig, baseline: Mapping[str, Any]) -> OtherRun | None:
    """The trials of ``search.warm_start_run``, measured on the hardware of our own ``baseline``."""
    if config.search.warm_start_run is None:
        return None
    from paretoprune.results.selection.selection import front
    from paretoprune.search.config.stored import load_run_config

    folder = RunFolder(Path(config.search.warm_start_run))
    records, theirs = folder.read_records(), load_run_config(folder)
    their_baseline = folder.read_baseline()
    same_data = IDENTITY in baseline and IDENTITY in their_baseline  # then it was compared, wherever it lies
    if same_settings(config, theirs, same_data) and _hardware(their_baseline) == _hardware(baseline):
        rebased = [_rebased(record, baseline["metrics"]) for record in records]
        return OtherRun(tuple(record for record in rebased if _ends_here_too(record, config, theirs)), ())
    return OtherRun((), tuple(front(records, folder.objectives())))


def _ends_here_too(record: TrialRecord, ours: RunConfig, theirs: RunConfig) -> bool:
    """Whether the trial would have ended the same way in our run. Under other objectives or wider bounds, one that was
    cut short might go on."""
    if record.state is not TrialState.STOPPED:
        return True
    if record.ending == TrialState.STOPPED.value:
        return ours.search.early_stopping and ours.search.objectives == theirs.search.objectives
    costs = {name: value for name, value in record.metrics.items() if name in ("latency_ms", "params_m", "gflops")}
    return any(value > 0 for value in bounds_of_search(ours.search).violations(costs, {}).values())


def same_settings(one: RunConfig, other: RunConfig, same_data: bool = False) -> bool:
    """Whether equal plans give equal figures under both configurations of one model.

    ``same_data``: the dataset is known to be the same, also where it lies at another place.
    """
    before, after = one.flat(), other.flat()
    free = {*_WITHOUT_EFFECT, "data.path"} if same_data else set(_WITHOUT_EFFECT)
    names = [name for name in {*before, *after} if name.startswith(_DECISIVE) and name not in free]
    return all(before.get(name) == after.get(name) for name in names)


def _hardware(baseline: Mapping[str, Any]) -> tuple[Any, ...]:
    environment = baseline.get("environment") or {}
    return (baseline.get("device"), environment.get("cpu_model"), environment.get("gpu0_name"))


def _rebased(record: TrialRecord, unpruned: Mapping[str, Any]) -> TrialRecord:
    """The record with its latency on every device over our own baseline's: the ratio survives another day's clock."""
    names = [name for name in unpruned if name == "latency_ms" or device_of(name)]
    ratios = {name: record.number(name.replace("latency_ms", "latency_ratio")) for name in names}
    ours = {name: ratio * float(unpruned[name]) for name, ratio in ratios.items() if ratio is not None}
    return record.changed(metrics={**record.metrics, **ours})
