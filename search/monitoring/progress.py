"""Progress for people: what goes on now, a line per finished trial, and how many are done, running and left.

What is shown is computed first (:class:`Progress`), from records alone, so ``status`` prints the same from another
terminal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paretoprune.base.file_names import EVENTS
from paretoprune.base.image_size import size_text
from paretoprune.base.messages import is_live, line, showing, speaking
from paretoprune.results.selection.selection import DEFAULT_MAX_DROP, fastest_within_drop, front
from paretoprune.results.store.accuracy import accuracy_of, accuracy_text, missing_metric, trade_off_text
from paretoprune.results.store.records import BEYOND_BOUNDS, FORETOLD, SOURCE, TrialRecord, TrialState
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.storage.event_log import activity

HEARTBEAT_S = 60.0  # of a sweep's or a fine-tuning's log
MOST_RUNNING = 8  # of which it is said what they do


@dataclass(frozen=True)
class Progress:
    """Where a run stands. ``left`` counts the running ones; ``eta_seconds`` is None before the first trial.

    ``infeasible``: trials beyond the bounds; they count neither as stopped nor as failed. ``best``: the most accurate
    trial of the front, ``fastest``: the fastest within 0.02 of the unpruned model, where it is faster; both in words,
    "" without any.
    """

    total: int
    done: int
    failed: int
    stopped: int
    infeasible: int
    running: int
    left: int
    front_size: int
    best: str
    fastest: str
    eta_seconds: float | None


def progress_of(
    records: Sequence[TrialRecord],
    total: int,
    running: int,
    slots: int,
    objectives: Sequence[str],
    baseline: Mapping[str, Any] | None = None,
) -> Progress:
    """Summarise ``records``; the time left assumes the last trials' mean duration over ``slots`` at a time.

    baseline: the content of baseline.json, where there is one.
    """
    on_front = front(records, objectives) if _any_completed(records) else []
    unpruned = baseline["metrics"] if baseline else {}
    best = max(on_front, key=lambda record: accuracy_of(record.metrics) or 0.0, default=None)
    fastest = fastest_within_drop(records, baseline, DEFAULT_MAX_DROP) if baseline and on_front else None
    if fastest is not None and float(fastest.metrics["latency_ms"]) >= float(unpruned["latency_ms"]):
        fastest = None  # that of the unpruned model itself is less
    left = max(0, total - len(records))
    recent = [sum(record.seconds.values()) for record in records[-10:] if record.seconds]
    eta = sum(recent) / len(recent) * left / max(1, slots) if recent else None
    return Progress(
        total=total,
        done=len(records),
        failed=sum(record.state is TrialState.FAILED for record in records),
        stopped=sum(record.ending == TrialState.STOPPED.value for record in records),
        infeasible=sum(record.ending == BEYOND_BOUNDS for record in records),
        running=running,
        left=left,
        front_size=len(on_front),
        best=f"{accuracy_text(best.metrics)}, {_speed(best)}" if best else "",
        fastest=f"{fastest.trial_id}, {trade_off_text(fastest.metrics, unpruned)}" if fastest else "",
        eta_seconds=0.0 if not left else eta,
    )


def counts_text(progress: Progress) -> str:
    """``12/20 done, 2 running, 8 left, 1 failed; about 4 min left``."""
    kinds = {"stopped": progress.stopped, "failed": progress.failed, BEYOND_BOUNDS: progress.infeasible}
    told = "".join(f", {count} {name}" for name, count in kinds.items() if count)
    eta = f"; about {duration(progress.eta_seconds)} left" if progress.eta_seconds and progress.left else ""
    return f"{progress.done}/{progress.total} done, {progress.running} running, {progress.left} left{told}{eta}"


def front_lines(progress: Progress) -> list[str]:
    """``front of 5: best mAP50-95 0.612, 1.10 times as fast`` and ``fastest within 0.02 of the unpruned: t0004, ...``,
    those that there are."""
    best = f"front of {progress.front_size}: best {progress.best}" if progress.best else ""
    fastest = f"fastest within {DEFAULT_MAX_DROP:g} of the unpruned: {progress.fastest}" if progress.fastest else ""
    return list(filter(None, (best, fastest)))


def summary_line(progress: Progress) -> str:
    """Counts, time left and front."""
    return "; ".join([counts_text(progress), *front_lines(progress)])


def trial_line(record: TrialRecord) -> str:
    """One finished trial, columns aligned from line to line."""
    head = f"{record.trial_id:<6} {record.provenance:<11}"
    seconds = f"{sum(record.seconds.values()):6.0f} s"
    if record.state is TrialState.FAILED or missing_metric(record.metrics):
        return f"{head} {record.state.value}: {record.error} {seconds}"
    metrics = record.metrics
    cells = [accuracy_text(metrics), f"latency {metrics['latency_ms']:7.2f} ms"]
    if "speedup" in metrics:
        cells.append(f"({metrics['speedup']:.2f}x{', predicted' if metrics.get(SOURCE) == FORETOLD else ''})")
    if "params_m" in metrics:
        cells.append(f"parameters {metrics['params_m']:6.2f} M")
    cells += [f"at {size_text(record.imgsz)} px"] if record.imgsz else []
    cells += [f"in {record.precision}"] if record.precision else []
    if record.ending == TrialState.STOPPED.value:
        cells.append(f"stopped: {record.fidelity_label}")
    if record.violations:
        cells.append(f"beyond {', '.join(record.violations)}")
    return f"{head} {'  '.join(cells)} {seconds}"


def duration(seconds: float | None) -> str:
    """``45 s``, ``12 min``, ``3 h 05 min``."""
    if seconds is None:
        return "unknown"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


@contextmanager
def working(text: str, events: Path) -> Iterator[Callable[[], None]]:
    """Say that a worker does ``text``, and at each call of what it gives, which part: by the ``events`` it writes."""
    events.unlink(missing_ok=True)  # of an earlier start
    with ExitStack() as stack:
        stack.callback(events.unlink, missing_ok=True)
        say = stack.enter_context(speaking())

        def look() -> None:
            part = activity(events).text
            say(f"{text}: {part}" if part else text)

        look()
        yield look


def activity_lines(places: Mapping[str, Path]) -> list[str]:
    """What the workers do whose folders these are, a line each: ``t0003 fine-tuning, epoch 2 of 3 (41 s)``."""
    lines = []
    for name, place in list(places.items())[:MOST_RUNNING]:
        doing = activity(place / EVENTS)
        spent = f" ({duration(max(0.0, time.time() - doing.since))})" if doing.text else ""
        lines.append(f"{name} {doing.text or 'begins'}{spent}")
    more = len(places) - len(lines)
    return [*lines, f"and {more} more"] if more else lines


class Reporter:
    """Shows a sweep while it runs: a line per finished trial; on a terminal below them where it stands, made anew each
    second, else that in a line wherever nothing was printed for a minute.
    """

    def __init__(
        self, folder: RunFolder, records: Sequence[TrialRecord], total: int, slots: int, objectives: Sequence[str]
    ) -> None:
        self._folder = folder
        self._baseline = folder.read_baseline() if folder.baseline.is_file() else None
        self._records = list(records)
        self._total = total
        self._slots = slots
        self._objectives = objectives
        self._running: dict[str, Path] = {}
        self._count()
        self._stack = ExitStack()
        self._stack.enter_context(showing(self.lines, HEARTBEAT_S, lambda: self._progress.done / max(1, total)))

    def started(self, trial_id: str) -> None:
        """A worker took a trial."""
        self._running = {**self._running, trial_id: self._folder.trial_dir(trial_id)}

    def finished(self, record: TrialRecord) -> None:
        """A trial came back."""
        self._running = {name: place for name, place in self._running.items() if name != record.trial_id}
        self._records.append(record)
        self._count()
        shown = trial_line(record)
        line(shown if is_live() else f"{shown} | {summary_line(self.progress())}")

    def note(self, text: str) -> None:
        """A line of its own."""
        line(text)

    def close(self) -> None:
        """On a terminal, leave the last summary in place of what goes."""
        self._stack.close()
        if is_live():
            line(summary_line(self.progress()))

    def progress(self) -> Progress:
        """Where the sweep stands now."""
        left_s = (self._progress.eta_seconds or 0.0) - (time.monotonic() - self._counted_at)
        # Where all should have ended by now, the estimate is of no use.
        return replace(self._progress, running=len(self._running), eta_seconds=left_s if left_s > 0 else None)

    def lines(self) -> list[str]:
        """Counts and time left, the front in short, what the running trials do."""
        progress = self.progress()
        waited = duration(time.monotonic() - self._counted_at)
        begins = [f"waiting for workers ({waited})"] if progress.left and not self._running else []
        return [counts_text(progress), *front_lines(progress), *activity_lines(self._running), *begins]

    def _count(self) -> None:
        """Anew after each trial: the front of many trials is not found each second."""
        self._progress = progress_of(self._records, self._total, 0, self._slots, self._objectives, self._baseline)
        self._counted_at = time.monotonic()


def _any_completed(records: Sequence[TrialRecord]) -> bool:
    return any(record.state is TrialState.COMPLETED for record in records)


def _speed(record: TrialRecord) -> str:
    speedup = record.number("speedup")
    return f"{speedup:.2f} times as fast" if speedup else f"{record.metrics['latency_ms']:.2f} ms"
