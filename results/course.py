"""How the trials of a run ended over time, and what ending some of them early saved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from results import wording
from results.records import TrialRecord, TrialState


@dataclass(frozen=True)
class Course:
    """Counts after each trial that ended, in order of time.

    hours: wall clock since the first trial began. counts: state -> trials that had ended so by then, as long as
    `hours`. stopped_at: (epochs, trials) of those that were stopped, by epochs. full_epochs: of a trial that was not.
    """

    hours: tuple[float, ...]
    counts: tuple[tuple[TrialState, tuple[int, ...]], ...]
    stopped_at: tuple[tuple[int, int], ...]
    full_epochs: int

    @property
    def stopping(self) -> str:
        """What stopping did, in one sentence."""
        stopped = sum(number for _, number in self.stopped_at)
        if not stopped:
            return "No trial was stopped early."
        where = ", ".join(f"{number:,} after {wording.count(epochs, 'epoch')}" for epochs, number in self.stopped_at)
        saved = sum(max(0, self.full_epochs - epochs) * number for epochs, number in self.stopped_at)
        asked = self.full_epochs * len(self.hours)
        spared = f", which spared {saved:,} of {asked:,} epochs" if saved else ""
        return f"{stopped:,} of {wording.count(len(self.hours), 'trial')} stopped early ({where}){spared}."


def course(records: Sequence[TrialRecord]) -> Course:
    """Of all records, whatever became of them; trials whose time is not known end at 0."""
    ordered = sorted(records, key=lambda record: record.finished_at)
    began = min((record.finished_at - sum(record.seconds.values()) for record in ordered), default=0.0)
    running: Counter[TrialState] = Counter()
    columns: dict[TrialState, list[int]] = {state: [] for state in TrialState}
    for record in ordered:
        running[record.state] += 1
        for state, column in columns.items():
            column.append(running[state])
    stopped = Counter(record.epochs for record in ordered if record.state is TrialState.STOPPED)
    return Course(
        hours=tuple((record.finished_at - began) / 3600 for record in ordered),
        counts=tuple((state, tuple(column)) for state, column in columns.items() if running[state]),
        stopped_at=tuple(sorted(stopped.items())),
        full_epochs=max((record.epochs for record in ordered if record.state is TrialState.COMPLETED), default=0),
    )
