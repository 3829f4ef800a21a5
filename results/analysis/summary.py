"""Everything the report says, as one value object: what was won, the tables, failures, commands, environment."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from paretoprune.base import formatting
from paretoprune.base.image_size import ImageSize, size_text
from paretoprune.results.analysis.figures import (
    FrontFigure,
    HypervolumeCurve,
    PickMove,
    Point,
    TimeFigure,
    front_figure,
    hypervolume_curve,
    time_figure,
)
from paretoprune.results.analysis.finalists import FinishedRow, PairwiseComparison, finished_rows, rivalries
from paretoprune.results.analysis.frames import precision_of
from paretoprune.results.analysis.latency_places import LatencyPlace, latency_places
from paretoprune.results.analysis.layer_effects import Insight, insight
from paretoprune.results.analysis.precisions import PrecisionTable, precision_table
from paretoprune.results.analysis.repeat_commands import Commands, commands
from paretoprune.results.analysis.sensitivity import SensitivityFigure, sensitivity_figure
from paretoprune.results.analysis.trial_outcomes import Course, course
from paretoprune.results.analysis.widths import WidthsFigure, widths_figure
from paretoprune.results.selection.selection import (
    DEFAULT_MAX_DROP,
    KNEE,
    choose,
    comparable,
    fastest_within_drop,
    front,
    knee,
    lead_pick,
)
from paretoprune.results.selection.uncertainty import AccuracyNoise, Standing, accuracy_noise, standings
from paretoprune.results.store.accuracy import sample_text
from paretoprune.results.store.bounds import ROUNDING
from paretoprune.results.store.records import DEPLOY_PRECISION, ENDINGS, TrialRecord, TrialState
from paretoprune.results.store.run_files import unpruned_words
from paretoprune.results.store.run_folder import RunFolder

SUGGESTED_PICKS = 3
_IDS_SHOWN = 12


@dataclass(frozen=True)
class Headline:
    """The first thing a reader sees: one sentence, the network it speaks of, and a line of context below it."""

    sentence: str
    detail: str
    move: PickMove | None


@dataclass(frozen=True)
class Failure:
    """Trials that failed for the same reason; `trial_ids` are at most a dozen of `count`."""

    reason: str
    count: int
    trial_ids: tuple[str, ...]


@dataclass(frozen=True)
class Summary:
    """One run, ready to be shown. sizes: of the input by trial and free move; {} where all had one. precisions: of
    their files, likewise.

    judged: which accuracies are of a sample of the validation images; "" where none is.
    """

    title: str
    model: str
    data: str
    device: str
    imgsz: ImageSize | None
    sizes: Mapping[str, ImageSize]
    precision: str
    precisions: Mapping[str, str]
    headline: Headline
    counts: Mapping[str, int]
    excluded: tuple[str, ...]
    front: FrontFigure
    finished: tuple[FinishedRow, ...]
    rivalries: tuple[PairwiseComparison, ...]
    one_session: bool
    standings: Mapping[str, Standing]
    noise: AccuracyNoise
    judged: str
    sensitivity: SensitivityFigure | None
    widths: tuple[WidthsFigure, ...]
    insight: Insight | None
    hypervolume: HypervolumeCurve
    course: Course
    time: TimeFigure
    failures: tuple[Failure, ...]
    commands: tuple[Commands, ...]
    environment: Mapping[str, str]
    latency_places: tuple[LatencyPlace, ...]
    span: str
    by_precision: PrecisionTable | None = None

    @property
    def ends(self) -> str:
        """How many trials ended how: "12 completed, 3 stopped"; "" before the first one."""
        return ", ".join(f"{number:,} {ending}" for ending, number in self.counts.items() if number)

    @property
    def has_test(self) -> bool:
        """Whether finished networks were also evaluated on a test split."""
        return any(row.test is not None for row in self.finished)

    @property
    def inputs_differ(self) -> bool:
        """Whether networks differ in the size of the input or in their file's precision."""
        return bool(self.sizes or self.precisions)

    def input_of(self, name: str) -> str:
        """The size of a network's input and its file's precision in words; of one that is no trial the run's."""
        size, precision = self.sizes.get(name, self.imgsz), self.precisions.get(name, self.precision)
        words = [*([f"{size_text(size)} px"] if size else []), *([precision] if precision else [])]
        return ", ".join(words) or formatting.DASH

    @property
    def latency_title(self) -> str:
        """The latency axis' title, with unit and what was measured."""
        size = f", {size_text(self.imgsz)} px" if self.imgsz and not self.sizes else ""
        what = "whole prediction" if self.span == "predict" else "inference"
        return f"Latency (ms per {what}{size}, {self.device or 'unnamed device'})"


def summarise(folder: RunFolder) -> Summary:
    """Read a run folder and compute everything. Raises ResultsError where a file breaks its contract."""
    baseline, records, objectives = folder.read_baseline(), folder.read_records(), folder.objectives()
    picks = choose(records, baseline, SUGGESTED_PICKS, objectives)
    selected, natives, session = folder.read_selected(), folder.read_natives(), folder.read_session()
    moves, tuned = folder.read_free_moves(), folder.read_tuned_moves()
    figure = front_figure(records, baseline, picks, selected, objectives, natives, moves, tuned)
    careful = fastest_within_drop(records, baseline, DEFAULT_MAX_DROP)
    lead = lead_pick(selected, baseline) or careful or knee(records, objectives)
    noise, members = accuracy_noise(baseline), front(records, objectives)
    model = formatting.readable(str(baseline.get("model") or "model"))
    ratios = {record.trial_id: record.ratios for record in records}
    layers = baseline.get("layers") or []
    kept = baseline.get("classes")  # where these are not all
    own, varied = baseline.get("imgsz"), any(record.imgsz for record in records)
    measured, precise = (*records, *moves), {item.precision for item in (*records, *moves)} - {None}
    return Summary(
        title=formatting.readable(folder.path.resolve().name),
        model=Path(model).name,
        data=formatting.readable(str(baseline.get("data") or "") + (f" (classes: {', '.join(kept)})" if kept else "")),
        device=str(baseline.get("device") or ""),
        imgsz=own,
        sizes={item.trial_id: item.imgsz or own for item in measured} if varied and own else {},
        precision=str(baseline["metrics"].get(DEPLOY_PRECISION, "")),
        precisions={item.trial_id: precision_of(item, baseline) or "" for item in measured} if precise else {},
        headline=headline(figure, lead.trial_id if lead else None, Path(model).stem, len(records)),
        counts={ending: sum(record.ending == ending for record in records) for ending in ENDINGS},
        excluded=_excluded(figure),
        front=figure,
        finished=finished_rows(figure, selected, natives, tuned),
        rivalries=rivalries(session),
        one_session=bool(session),
        standings=standings(members, comparable(records), objectives, noise),
        noise=noise,
        judged=sample_text(baseline["metrics"]),
        sensitivity=sensitivity_figure(baseline),
        widths=tuple(
            widths_figure(move.trial_id, move.chosen_as, ratios[move.trial_id], layers)
            for move in figure.picks
            if layers and move.trial_id in ratios
        ),
        insight=insight(records, baseline, objectives),
        hypervolume=hypervolume_curve(records, baseline, objectives),
        course=course(records),
        time=time_figure(records, [item.seconds for item in (*selected, *natives, *tuned)]),
        failures=_failures(records),
        commands=commands(folder, baseline, figure, selected),
        environment={str(name): str(value) for name, value in (baseline.get("environment") or {}).items()},
        latency_places=latency_places(baseline, records),
        span=str((baseline["metrics"].get("latency_conditions") or {}).get("span", "network")),
        by_precision=precision_table(baseline, moves, session),
    )


def headline(figure: FrontFigure, lead: str | None, model: str, trials: int) -> Headline:
    """The headline: of the network that a careful person would take, and where a free move beats it.

    lead: id of the finished pick, before there is one of the trial, that is the fastest within DEFAULT_MAX_DROP of the
    unpruned model's accuracy, or stands in for it where none is within; the sentence then says so. trials: number that
    ended.
    """
    move = next((item for item in figure.picks if item.trial_id == lead), None)
    done = move is not None and move.after is not None
    members = {item.name: item for item in (*figure.front, *figure.dominated)}
    at = (move.after or move.before) if move else members.get(lead or "")
    if at is None:
        ended = (
            f"{formatting.count(trials, 'trial')} ended without a result." if trials else "No trial has finished yet."
        )
        return Headline(f"The search over {model} has no result yet", ended, None)
    base, label = figure.finished_baseline if done else figure.baseline, figure.baseline.accuracy_label
    within = f"within {DEFAULT_MAX_DROP:g} of"
    close = at.accuracy >= base.accuracy - DEFAULT_MAX_DROP - ROUNDING
    nobody = f"No {'pick' if done else 'trial'} is {within} {model}'s {label}; {at.name}"
    sentence = f"{f'Pruned, {model}' if close else nobody} is {_compared(at, base)}"
    if better := figure.beaten_by(at.name, after=done):
        trained = " after the same fine-tuning" if better in figure.tuned_moves else ""
        sentence += f"; the unpruned model {unpruned_words(better.name)} is better: "
        sentence += f"{formatting.times(better.speedup)} at {better.accuracy:.3f}{trained}"
    chosen = f"fastest {within} the unpruned model's {label}" if close else (move.chosen_as if move else KNEE)
    if done:
        how = f"after full fine-tuning of {formatting.count(move.epochs, 'epoch')}" if move and move.epochs else ""
        how = how or "after full fine-tuning"
    else:
        how = f"as the trial left it ({at.fidelity})"
    detail = f"{'Pick' if done else 'Trial'} {at.name} ({chosen or 'chosen by id'}), {how}."
    knees = [item.after for item in figure.picks if item.after and item.chosen_as == KNEE] if done else [figure.knee]
    for bend in knees:
        if bend and bend.name != at.name:
            change = formatting.signed(bend.accuracy - base.accuracy)
            detail += f" The knee, {bend.name}: {formatting.times(bend.speedup)} at {bend.accuracy:.3f} ({change})."
    return Headline(sentence, detail if done else f"{detail} No pick has been fully fine-tuned yet.", move)


def _compared(item: Point, baseline: Point) -> str:
    """'1.61 times as fast (12.4 ms → 7.70 ms) at mAP50-95 0.598 (−0.014), with 53 % fewer parameters'."""
    text = (
        f"{formatting.times(item.speedup)} "
        f"({formatting.milliseconds(baseline.latency_ms)} → {formatting.milliseconds(item.latency_ms)}) "
        f"at {item.accuracy_label} {item.accuracy:.3f} ({formatting.signed(item.accuracy - baseline.accuracy)})"
    )
    if item.params_m and baseline.params_m:
        fewer = round(100 * (1 - item.params_m / baseline.params_m))
        text += f", with {fewer} % fewer parameters" if fewer > 0 else ""
    return text


def _excluded(figure: FrontFigure) -> tuple[str, ...]:
    """One line for each kind of trial that is shown but does not compete."""
    kinds = Counter((item.why_not_comparable, item.fidelity) for item in figure.apart)
    return tuple(
        f"{formatting.count(number, 'trial')} {why} ({fidelity})" for (why, fidelity), number in sorted(kinds.items())
    )


def _failures(records: Sequence[TrialRecord]) -> tuple[Failure, ...]:
    """Failed trials by reason, the most frequent first."""
    reasons: defaultdict[str, list[str]] = defaultdict(list)
    for record in records:
        if record.state is TrialState.FAILED:
            reasons[record.error or ""].append(record.trial_id)
    ordered = sorted(reasons.items(), key=lambda item: -len(item[1]))
    return tuple(Failure(reason, len(ids), tuple(ids[:_IDS_SHOWN])) for reason, ids in ordered)
