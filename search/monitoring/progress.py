"""Progress for people: one aligned line per finished trial, and how many are done, running and left.

What is shown is computed first (:class:`Progress`), from records alone, so ``status`` prints the same from another
terminal.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Protocol

from paretoprune.base.messages import Listener, listener
from paretoprune.results.selection.selection import front
from paretoprune.results.store.accuracy import accuracy_text, missing_metric
from paretoprune.results.store.records import BEYOND_BOUNDS, FORETOLD, SOURCE, TrialRecord, TrialState


@dataclass(frozen=True)
class Progress:
    """Where a run stands. ``left`` counts the running ones; ``eta_seconds`` is None before the first trial.

    ``infeasible``: trials beyond the bounds; they count neither as stopped nor as failed.
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
    eta_seconds: float | None


def progress_of(
    records: Sequence[TrialRecord], total: int, running: int, slots: int, objectives: Sequence[str]
) -> Progress:
    """Summarise ``records``; the time left assumes the last trials' mean duration over ``slots`` at a time."""
    on_front = front(records, objectives) if _any_completed(records) else []
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
        best=_ends(on_front),
        eta_seconds=0.0 if not left else eta,
    )


def summary_line(progress: Progress) -> str:
    """``12/20 done, 2 running, 8 left, 1 failed; front 5: ...; about 4 min left``."""
    kinds = {"stopped": progress.stopped, "failed": progress.failed, BEYOND_BOUNDS: progress.infeasible}
    told = "".join(f", {count} {name}" for name, count in kinds.items() if count)
    counts = f"{progress.done}/{progress.total} done, {progress.running} running, {progress.left} left{told}"
    ends = f"; front {progress.front_size}: {progress.best}" if progress.front_size else ""
    eta = f"; about {duration(progress.eta_seconds)} left" if progress.eta_seconds and progress.left else ""
    return counts + ends + eta


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


class Reporter(Protocol):
    """Shows a sweep while it runs."""

    def started(self, trial_id: str) -> None: ...
    def finished(self, record: TrialRecord) -> None: ...
    def note(self, text: str) -> None: ...
    def close(self) -> None: ...


class PlainReporter:
    """One line per finished trial with the summary behind it, on stderr; for logs and pipes."""

    def __init__(
        self, records: Sequence[TrialRecord], total: int, slots: int, objectives: Sequence[str], stream: IO[str]
    ) -> None:
        self._records = list(records)
        self._total = total
        self._slots = slots
        self._objectives = objectives
        self._stream = stream
        self._running: set[str] = set()

    def started(self, trial_id: str) -> None:
        """A worker took a trial."""
        self._running.add(trial_id)

    def finished(self, record: TrialRecord) -> None:
        """A trial came back."""
        self._running.discard(record.trial_id)
        self._records.append(record)
        progress = self.progress()
        self._show(f"{trial_line(record)} | {summary_line(progress)}")

    def note(self, text: str) -> None:
        """A line of its own."""
        self._show(text)

    def close(self) -> None:
        """Nothing to put away."""

    def progress(self) -> Progress:
        """Where the sweep stands now."""
        return progress_of(self._records, self._total, len(self._running), self._slots, self._objectives)

    def _show(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class ListenerReporter(PlainReporter):
    """The plain lines, handed to a function of whoever began the sweep."""

    def __init__(
        self, records: Sequence[TrialRecord], total: int, slots: int, objectives: Sequence[str], hearing: Listener
    ) -> None:
        super().__init__(records, total, slots, objectives, sys.stderr)
        self._hearing = hearing

    def _show(self, text: str) -> None:
        self._hearing(text)


class RichReporter(PlainReporter):
    """On a terminal: finished trials scroll by above one live line with the summary."""

    def __init__(
        self, records: Sequence[TrialRecord], total: int, slots: int, objectives: Sequence[str], stream: IO[str]
    ) -> None:
        super().__init__(records, total, slots, objectives, stream)
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        columns = (BarColumn(20), TimeElapsedColumn(), TextColumn("{task.description}"))
        self._bar = Bar(*columns, console=Console(file=stream), transient=True)
        self._task = self._bar.add_task("", total=total, completed=len(self._records))
        self._bar.start()
        self._refresh()

    def started(self, trial_id: str) -> None:
        """A worker took a trial."""
        super().started(trial_id)
        self._refresh()

    def finished(self, record: TrialRecord) -> None:
        """A trial came back."""
        self._running.discard(record.trial_id)
        self._records.append(record)
        self._show(trial_line(record))
        self._refresh()

    def close(self) -> None:
        """Leave the last summary on the screen."""
        self._bar.stop()
        print(summary_line(self.progress()), file=self._stream, flush=True)

    def _show(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _refresh(self) -> None:
        self._bar.update(self._task, completed=len(self._records), description=summary_line(self.progress()))


def make_reporter(records: Sequence[TrialRecord], total: int, slots: int, objectives: Sequence[str]) -> Reporter:
    """To the listener where there is one; else live on a terminal, plain lines otherwise."""
    if (hearing := listener()) is not None:
        return ListenerReporter(records, total, slots, objectives, hearing)
    kind = RichReporter if sys.stderr.isatty() else PlainReporter
    return kind(records, total, slots, objectives, sys.stderr)


def _any_completed(records: Sequence[TrialRecord]) -> bool:
    return any(record.state is TrialState.COMPLETED for record in records)


def _ends(on_front: Sequence[TrialRecord]) -> str:
    """The front's most accurate and its other end, as ``0.612 at 1.10x ... 0.401 at 2.30x``."""
    ends = [on_front[0], on_front[-1]] if len(on_front) > 1 else list(on_front)
    return " ... ".join(_point(record) for record in ends)


def _point(record: TrialRecord) -> str:
    speedup = record.number("speedup")
    behind = f"{speedup:.2f}x" if speedup else f"{record.metrics['latency_ms']:.2f} ms"
    return f"{accuracy_text(record.metrics)} at {behind}"
