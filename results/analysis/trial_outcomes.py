"""How the trials of a run ended over time, and what ending some of them early saved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from paretoprune.base import formatting
from paretoprune.results.store.records import BEYOND_BOUNDS, ENDINGS, TrialRecord, TrialState


@dataclass(frozen=True)
class Course:
    """Counts after each trial that ended, in order of time.

    hours: wall clock since the first trial began. counts: ending (see `TrialRecord.ending`) -> trials that had ended so
    by then, as long as `hours`. stopped_at: (epochs, trials) of those that were stopped, by epochs. untrained: those
    that were not trained because they are beyond the bounds. full_epochs: of a trial that went to its end.
    """

    hours: tuple[float, ...]
    counts: tuple[tuple[str, tuple[int, ...]], ...]
    stopped_at: tuple[tuple[int, int], ...]
    full_epochs: int
    untrained: int = 0

    @property
    def stopping(self) -> str:
        """What stopping and the bounds did, in a sentence each."""
        if not self.untrained:
            return self._stopped
        many = self.untrained > 1
        return (
            f"{self._stopped} {formatting.count(self.untrained, 'trial')} {'were' if many else 'was'} not trained, "
            f"being {BEYOND_BOUNDS}."
        )

    @property
    def _stopped(self) -> str:
        stopped = sum(number for _, number in self.stopped_at)
        if not stopped:
            return "No trial was stopped early."
        where = ", ".join(f"{number:,} after {formatting.count(epochs, 'epoch')}" for epochs, number in self.stopped_at)
        saved = sum(max(0, self.full_epochs - epochs) * number for epochs, number in self.stopped_at)
        asked = self.full_epochs * len(self.hours)
        spared = f", which spared {saved:,} of {asked:,} epochs" if saved else ""
        return f"{stopped:,} of {formatting.count(len(self.hours), 'trial')} stopped early ({where}){spared}."


def course(records: Sequence[TrialRecord]) -> Course:
    """Of all records, whatever became of them; trials whose time is not known end at 0."""
    ordered = sorted(records, key=lambda record: record.finished_at)
    began = min((record.finished_at - sum(record.seconds.values()) for record in ordered), default=0.0)
    running: Counter[str] = Counter()
    columns: dict[str, list[int]] = {ending: [] for ending in ENDINGS}
    for record in ordered:
        running[record.ending] += 1
        for ending, column in columns.items():
            column.append(running[ending])
    cut_short = [record for record in ordered if record.state is TrialState.STOPPED]
    stopped = Counter(record.epochs for record in cut_short if record.ending != BEYOND_BOUNDS)
    return Course(
        hours=tuple((record.finished_at - began) / 3600 for record in ordered),
        counts=tuple((ending, tuple(column)) for ending, column in columns.items() if running[ending]),
        stopped_at=tuple(sorted(stopped.items())),
        full_epochs=max((record.epochs for record in ordered if record.state is TrialState.COMPLETED), default=0),
        untrained=sum(record.ending == BEYOND_BOUNDS for record in cut_short),
    )
