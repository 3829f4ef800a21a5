"""The contents of the figures, as values: computed here once, drawn elsewhere without further logic."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from paretoprune.base import formatting
from paretoprune.results.selection.pareto import hypervolume, non_dominated
from paretoprune.results.selection.selection import Pick, comparable, front, knee, main_fidelity
from paretoprune.results.selection.uncertainty import accuracy_noise, beaten_by_free_moves, beaten_picks
from paretoprune.results.store.accuracy import DEFAULT, LABELS, accuracy_label, accuracy_of, on_all_images
from paretoprune.results.store.objectives import (
    DEFAULT_OBJECTIVES,
    direction,
    is_objective,
    metrics_to_losses,
    to_losses,
)
from paretoprune.results.store.records import (
    BEYOND_BOUNDS,
    FORETOLD,
    PHASES,
    PI95,
    SOURCE,
    TrialRecord,
    TrialState,
    likely_speedups,
    speedup_interval,
)
from paretoprune.results.store.run_files import Native, Selected, precision_named, unpruned_words

MOST_DOMINATED = 2000
_SHOWN = (*LABELS, "latency_ms", "params_m", "gflops")


@dataclass(frozen=True)
class Point:
    """One network on the accuracy/latency plane.

    Accuracy is what its task goes by (see `accuracy`); latency is the paired ratio times the run's baseline, in ms.
    """

    name: str
    accuracy: float
    latency_ms: float
    speedup: float
    latency_interval_ms: tuple[float, float] | None
    speedup_ci95: tuple[float, float] | None
    params_m: float | None
    gflops: float | None
    fidelity: str
    ending: str = TrialState.COMPLETED.value
    accuracy_label: str = LABELS[DEFAULT]
    foretold: bool = False
    """Whether its latency was predicted from other plans, not measured."""
    speedup_pi95: tuple[float, float] | None = None
    """Then, in place of `speedup_ci95`: the prediction's own interval."""
    others: Mapping[str, float] = field(default_factory=dict)
    """Whatever else can be an objective, as far as it was measured."""

    @property
    def why_not_comparable(self) -> str:
        """Why it does not compete, of a point that does not."""
        return {TrialState.STOPPED.value: "stopped early", BEYOND_BOUNDS: BEYOND_BOUNDS}.get(
            self.ending, "of another fidelity"
        )


@dataclass(frozen=True)
class PickMove:
    """A pick as the trial left it and, once that is done, after its full fine-tuning of so many epochs."""

    trial_id: str
    chosen_as: str
    before: Point
    after: Point | None
    epochs: int = 0


@dataclass(frozen=True)
class FrontFigure:
    """The accuracy/latency plane of one run.

    front: members of the front over `objectives`. line: the staircase (latency_ms, accuracy) they attain on this plane.
    dominated: completed trials of the same fidelity, at most MOST_DOMINATED of them (a browser draws no more in good
    time); left_out: how many more there are. apart: trials that do not compete: stopped,
    beyond the bounds, or of another fidelity.
    natives: smaller stock models that were given a pick's budget and measured in the same session.
    free_moves: the unpruned model at smaller inputs and in other precisions, the largest first; tuned_moves: those that
    were fine-tuned like the picks. beaten, beaten_picks: trial -> name of the free move that beats it as the trial left
    it, and after full fine-tuning. on_all: the baseline on all validation images, where that of the trials is on a
    sample of them.
    """

    baseline: Point
    front: tuple[Point, ...]
    dominated: tuple[Point, ...]
    apart: tuple[Point, ...]
    line: tuple[tuple[float, float], ...]
    knee: Point | None
    picks: tuple[PickMove, ...]
    fidelity: str
    objectives: tuple[str, ...]
    natives: tuple[Point, ...] = ()
    left_out: int = 0
    free_moves: tuple[Point, ...] = ()
    tuned_moves: tuple[Point, ...] = ()
    beaten: Mapping[str, str] = field(default_factory=dict)
    beaten_picks: Mapping[str, str] = field(default_factory=dict)
    on_all: Point | None = None

    def beaten_by(self, trial_id: str, after: bool = False) -> Point | None:
        """The free move that beats a trial, or (`after`) the pick that it became."""
        name = (self.beaten_picks if after else self.beaten).get(trial_id)
        moves = (*self.tuned_moves, *self.free_moves) if after else self.free_moves
        return next((item for item in moves if item.name == name), None)

    @property
    def finished(self) -> tuple[Point, ...]:
        """The networks that were fully fine-tuned; they are judged on all validation images."""
        return (*(move.after for move in self.picks if move.after), *self.natives, *self.tuned_moves)

    @property
    def finished_baseline(self) -> Point:
        """The baseline as finished networks are judged, where there are any."""
        return (self.on_all if self.finished else None) or self.baseline

    def baseline_of(self, item: Point) -> Point:
        """The baseline judged on the images that a network was judged on."""
        return self.finished_baseline if any(item is other for other in self.finished) else self.baseline

    @property
    def free_lines(self) -> dict[str, tuple[Point, ...]]:
        """Title -> what is to be had without pruning, a line for each precision, from the largest input down; the run's
        own begins with the baseline."""
        own = "Free moves (unpruned)"
        lines = {own: (self.baseline,)}
        for item in self.free_moves:
            precision = precision_named(item.name)
            title = f"Free moves (unpruned, {precision})" if precision else own
            lines[title] = (*lines.get(title, ()), item)
        return {title: items for title, items in lines.items() if items != (self.baseline,)}

    @property
    def others(self) -> tuple[str, ...]:
        """The objectives that have no place of their own in tables: they are given a column each."""
        return tuple(name for name in self.objectives if name not in _SHOWN)

    @property
    def apart_label(self) -> str:
        """Names of the trials that do not compete, for a legend."""
        return " or ".join(sorted({item.why_not_comparable for item in self.apart}, reverse=True)).capitalize()


def point(
    name: str, metrics: Mapping[str, Any], base_ms: float, fidelity: str, ending: str = "completed"
) -> Point | None:
    """A point of the plane, or None where accuracy or latency is missing. base_ms: the run's baseline latency, ms.

    The ratio to the baseline measured beside it, times `base_ms`, is what survives clock drift, so it comes first.
    """
    accuracy, ratio, latency = accuracy_of(metrics), metrics.get("latency_ratio"), metrics.get("latency_ms")
    latency_ms = ratio * base_ms if ratio else latency
    if accuracy is None or not latency_ms:
        return None
    bounds = likely_speedups(metrics)
    return Point(
        name=name,
        accuracy=accuracy,
        latency_ms=float(latency_ms),
        speedup=base_ms / latency_ms,
        latency_interval_ms=(base_ms / bounds[1], base_ms / bounds[0]) if bounds and min(bounds) > 0 else None,
        speedup_ci95=speedup_interval(metrics),
        params_m=metrics.get("params_m"),
        gflops=metrics.get("gflops"),
        fidelity=fidelity,
        ending=ending,
        accuracy_label=accuracy_label(metrics),
        foretold=metrics.get(SOURCE) == FORETOLD,
        speedup_pi95=speedup_interval(metrics, PI95),
        others={name: float(value) for name, value in metrics.items() if is_objective(name) and name not in _SHOWN},
    )


def front_figure(
    records: Sequence[TrialRecord],
    baseline: Mapping[str, Any],
    picks: Sequence[Pick],
    selected: Sequence[Selected],
    objectives: Sequence[str] = DEFAULT_OBJECTIVES,
    natives: Sequence[Native] = (),
    free_moves: Sequence[TrialRecord] = (),
    tuned_moves: Sequence[Native] = (),
) -> FrontFigure:
    """Sort every record into front, dominated and apart; join the picks with their full fine-tuning."""
    base_ms = float(baseline["metrics"]["latency_ms"])
    start = point("baseline", {**baseline["metrics"], "latency_ratio": 1.0}, base_ms, "unpruned")
    assert start is not None  # read_baseline demands both metrics
    noise = accuracy_noise(baseline)
    points = {record.trial_id: _trial_point(record, base_ms) for record in records}
    members = {record.trial_id for record in front(records, objectives)}
    competing = {record.trial_id for record in comparable(records)}
    shown = [item for item in points.values() if item]
    dominated = [item for item in shown if item.name in competing - members]
    on_front = sorted((item for item in shown if item.name in members), key=lambda item: item.latency_ms)
    bend = knee(records, objectives)
    return FrontFigure(
        baseline=start,
        front=tuple(on_front),
        dominated=thinned(dominated, MOST_DOMINATED),
        apart=thinned([item for item in shown if item.name not in competing], MOST_DOMINATED),
        line=_staircase(on_front),
        knee=points[bend.trial_id] if bend else None,
        picks=_moves(points, picks, selected, base_ms),
        fidelity=main_fidelity(records) or "",
        objectives=tuple(objectives),
        natives=tuple(item for item in (_native_point(native, base_ms) for native in natives) if item),
        left_out=max(0, len(dominated) - MOST_DOMINATED),
        free_moves=tuple(item for item in (_free_point(move, base_ms) for move in free_moves) if item),
        tuned_moves=tuple(item for item in (_native_point(move, base_ms) for move in tuned_moves) if item),
        beaten=beaten_by_free_moves(records, free_moves, noise),
        beaten_picks=beaten_picks(selected, free_moves, tuned_moves, accuracy_noise(baseline, on_all=True)),
        on_all=point("baseline", {**on_all_images(baseline["metrics"]), "latency_ratio": 1.0}, base_ms, "unpruned"),
    )


def thinned(items: Sequence[Point], most: int) -> tuple[Point, ...]:
    """At most `most` of the items, evenly spaced in their order, the first and the last among them."""
    if len(items) <= most:
        return tuple(items)
    return tuple(items[round(index)] for index in np.linspace(0, len(items) - 1, most))


def _native_point(native: Native, base_ms: float) -> Point | None:
    epochs = formatting.count(native.epochs, "epoch")
    return point(native.name, _paired(native), base_ms, f"{native.recipe}, {epochs}", "native")


def _free_point(move: TrialRecord, base_ms: float) -> Point | None:
    return point(move.trial_id, move.metrics, base_ms, f"unpruned {unpruned_words(move.trial_id)}", "free move")


def _trial_point(record: TrialRecord, base_ms: float) -> Point | None:
    if record.state is TrialState.FAILED:
        return None
    return point(record.trial_id, record.metrics, base_ms, record.fidelity_label, record.ending)


def _staircase(points: Sequence[Point]) -> tuple[tuple[float, float], ...]:
    """The points of the two-objective front among `points`, by ascending latency (ms) and accuracy."""
    if not points:
        return ()
    plane = np.array([[item.latency_ms, -item.accuracy] for item in points])
    attained = np.unique(plane[non_dominated(plane)], axis=0)
    return tuple((float(latency), float(-loss)) for latency, loss in attained)


def _moves(
    points: Mapping[str, Point | None], picks: Sequence[Pick], selected: Sequence[Selected], base_ms: float
) -> tuple[PickMove, ...]:
    """Finished picks where there are any, otherwise the suggested ones."""
    moves = []
    for item in selected:
        before = points.get(item.trial_id) or point(item.trial_id, item.before, base_ms, "")
        after = point(item.trial_id, _paired(item), base_ms, "full fine-tuning")
        if before:
            moves.append(PickMove(item.trial_id, item.chosen_as, before, after, item.epochs))
    if not selected:
        for pick in picks:
            before = points.get(pick.trial_id)
            if before:
                moves.append(PickMove(pick.trial_id, pick.chosen_as, before, None))
    return tuple(sorted(moves, key=lambda move: -(move.after or move.before).latency_ms))


def _paired(item: Selected | Native) -> dict[str, Any]:
    """The pick's metrics with its ratio to the baseline of the same session, which clock drift leaves alone."""
    latency, beside = item.after.get("latency_ms"), item.baseline.get("latency_ms")
    if item.after.get("latency_ratio") or not (latency and beside):
        return item.after
    return {**item.after, "latency_ratio": latency / beside}


WARM_START = frozenset({"ladder", "sensitivity"})  # provenances of the trials that no sampler proposed


@dataclass(frozen=True)
class HypervolumeCurve:
    """Dominated hypervolume after each comparable trial, as a share of the baseline's box.

    The box spans from zero to the baseline in every objective, so a trial that is no better than the baseline in a
    lower-is-better objective adds nothing. hours: wall clock since the run's first trial began. ladder_trials: how many
    trials of the warm start came first.
    """

    trials: tuple[int, ...]
    hours: tuple[float, ...]
    shares: tuple[float, ...]
    ladder_trials: int


def hypervolume_curve(
    records: Sequence[TrialRecord], baseline: Mapping[str, Any], objectives: Sequence[str] = DEFAULT_OBJECTIVES
) -> HypervolumeCurve:
    """The curve in the order in which trials finished. An objective the baseline lacks raises ObjectiveError."""
    ordered = sorted(comparable(records), key=lambda record: record.finished_at)
    corner = metrics_to_losses(baseline["metrics"], objectives)
    box = float(np.prod(np.abs(corner)))
    corner = np.where([direction(name) == "max" for name in objectives], 0.0, corner)
    best, share, shares = np.empty((0, len(objectives))), 0.0, []
    for row in to_losses(ordered, objectives):
        if not (best <= row).all(axis=1).any():  # otherwise nothing new is attained, and the volume stays
            best = np.vstack([best, row])
            best = best[non_dominated(best)]
            share = hypervolume(best, corner) / box if box > 0 else 0.0
        shares.append(share)
    sampled = [index for index, record in enumerate(ordered) if record.provenance not in WARM_START]
    ladder = sampled[0] if sampled else len(ordered)
    began = min((record.finished_at - sum(record.seconds.values()) for record in records), default=0.0)
    hours = tuple((record.finished_at - began) / 3600 for record in ordered)
    return HypervolumeCurve(tuple(range(1, len(ordered) + 1)), hours, tuple(shares), ladder)


@dataclass(frozen=True)
class Phase:
    """Time of one phase over all trials, in seconds; share is of the total."""

    name: str
    seconds: float
    median_seconds: float
    share: float


@dataclass(frozen=True)
class TimeFigure:
    """How trial time was spent; trials of every state count, since all of them took it."""

    phases: tuple[Phase, ...]
    total_seconds: float
    trials: int


FULL_FINETUNING = "full fine-tuning"


def time_figure(records: Sequence[TrialRecord], finetuning_s: Sequence[float] = ()) -> TimeFigure:
    """Totals per phase, the longest first. finetuning_s: seconds of each full fine-tuning, a phase of its own."""
    spent: defaultdict[str, list[float]] = defaultdict(list)
    for record in records:
        for phase, seconds in record.seconds.items():
            spent[PHASES.get(phase, phase)].append(seconds)
    if any(finetuning_s):
        spent[FULL_FINETUNING] = [seconds for seconds in finetuning_s if seconds]
    total = sum(sum(values) for values in spent.values())
    phases = [
        Phase(name, sum(values), median(values), sum(values) / total if total > 0 else 0.0)
        for name, values in spent.items()
    ]
    return TimeFigure(tuple(sorted(phases, key=lambda phase: -phase.seconds)), total, len(records))
