"""Why trials fail: errors grouped by their reason, and a message when many share one. No Ray here."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from paretoprune.results.store.records import TrialRecord, TrialState

FEWEST_ALIKE = 2  # failures of one reason before half of the trials is worth a line

# What differs from trial to trial in one and the same fault: addresses, paths, numbers.
_VARYING = re.compile(r"0x[0-9a-fA-F]+|(?:/[^\s/'\",;:]+)+/?|[0-9][0-9.,]*")


def essence(reason: str) -> str:
    """A failure's reason without what differs from one trial to the next: addresses, paths, numbers."""
    return _VARYING.sub("#", reason)


def fault_of(record: TrialRecord) -> str | None:
    """The essence of why a trial failed; None where it did not."""
    return essence(record.error or "") if record.state is TrialState.FAILED else None


@dataclass(frozen=True)
class Fault:
    """The reason that ``count`` of ``ended`` trials failed for: the error of the latest of them, ``trial_id``."""

    count: int
    ended: int
    error: str
    trial_id: str

    @property
    def text(self) -> str:
        """For people."""
        return f"{self.count} of {self.ended} trials failed for one reason: {self.error}"


class FaultCounter:
    """Counts, trial by trial, what the trials of one driver failed for."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._ended = 0
        self._told: set[str] = set()

    def saw(self, record: TrialRecord) -> Fault | None:
        """Take a trial in. Its reason, the first time that half of the trials so far, two at least, failed for it."""
        self._ended += 1
        reason = fault_of(record)
        if reason is None:
            return None
        self._counts[reason] += 1
        count = self._counts[reason]
        if reason in self._told or count < FEWEST_ALIKE or 2 * count < self._ended:
            return None
        self._told.add(reason)
        return Fault(count, self._ended, record.error or "", record.trial_id)


def commonest_fault(records: Sequence[TrialRecord]) -> Fault | None:
    """The most frequent error of the failed trials, of equally frequent ones the first; None if none failed."""
    faults = [fault for fault in map(fault_of, records) if fault is not None]
    if not faults:
        return None
    reason, count = Counter(faults).most_common(1)[0]
    last = next(record for record in reversed(records) if fault_of(record) == reason)
    return Fault(count, len(records), last.error or "", last.trial_id)
