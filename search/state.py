"""What a sweep has asked for and what has come back: the one place that joins study, records and trial folders.

Called by the driver only, from one thread. No Ray here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from results.records import TrialRecord, TrialState
from results.run_folder import RunFolder
from search.errors import TrialError
from search.request import RECORD_NAME, TrialRequest, requested, trial_name, trial_number, unfinished
from search.space import Space
from search.study import SearchStudy
from search.trial import failed_record, one_line

SAME_FAULT = 4  # this many first trials failing for one reason: the fault is the run's, not the plans'


class SweepState:
    """Requests out, records in. ``records`` holds every finished trial, in the order of their arrival."""

    def __init__(
        self,
        folder: RunFolder,
        space: Space,
        study: SearchStudy,
        records: Sequence[TrialRecord],
        total: int,
        plan_hash: Callable[[dict[str, float]], str],
    ) -> None:
        """Replay ``records`` into ``study`` and queue the trials that an earlier driver left unfinished.

        ``total``: finished trials at the end; ``plan_hash``: ratios -> hash, for trials whose worker died.
        """
        self.folder = folder
        self.records = list(records)
        self.total = total
        self._space = space
        self._study = study
        self._plan_hash = plan_hash
        self._numbers: dict[str, int] = {}
        self._running: dict[str, TrialRequest] = {}
        for record in self.records:
            self._replay(record)
        finished = {record.trial_id for record in self.records}
        left = unfinished(folder, finished)
        self._waiting = [request for request in left if space.levels_of(request.ratios) is not None]
        names = [*finished, *(request.trial_id for request in left)]
        self._next = 1 + max((trial_number(name) for name in names), default=-1)

    @property
    def remaining(self) -> int:
        """Trials still to finish, running ones included."""
        return max(0, self.total - len(self.records))

    @property
    def running(self) -> list[str]:
        """Ids of the trials that were handed out and have not come back."""
        return list(self._running)

    def next(self) -> TrialRequest | None:
        """The next trial, written to its folder first; None when enough are under way or no new plan is left."""
        if len(self._running) >= self.remaining:
            return None
        request = self._resumed() or self._asked()
        if request is not None:
            request.save(self.folder)
            self._running[request.trial_id] = request
        return request

    def finish(self, record: TrialRecord) -> None:
        """Append a record and tell the study; a second record of one trial is ignored (a worker may report twice)."""
        if self._running.pop(record.trial_id, None) is None:
            return
        self.folder.store.append(record)
        self.records.append(record)
        number = self._numbers.pop(record.trial_id)
        if record.state is not TrialState.COMPLETED:
            self._study.fail(number, record.error or record.state.value)
            return
        try:
            self._study.tell(number, record.metrics)
        except TrialError:  # the record stays; the sampler just cannot learn from a trial without its objectives
            return

    def lose(self, trial_id: str, reason: str) -> TrialRecord | None:
        """A trial whose worker died: the record it may have left on disk, else a failed one."""
        request = self._running.get(trial_id)
        if request is None:
            return None
        record = self._left_behind(trial_id) or failed_record(request, reason, self._plan_hash(request.ratios))
        self.finish(record)
        return record

    def collect(self) -> None:
        """Take the records of trials that finished on disk while the sweep was already ending."""
        for trial_id in self.running:
            record = self._left_behind(trial_id)
            if record is not None:
                self.finish(record)

    def systematic_fault(self) -> str | None:
        """The reason, where the first trials all failed for the same one."""
        first = self.records[:SAME_FAULT]
        reasons = {record.error for record in first}
        same = len(first) == SAME_FAULT and len(reasons) == 1
        return reasons.pop() if same and all(record.state is TrialState.FAILED for record in self.records) else None

    def close(self) -> None:
        """End of the sweep: nothing stays RUNNING in the study. Unfinished trials keep their requests for a resume."""
        self._study.close()

    def _replay(self, record: TrialRecord) -> None:
        # As it was asked: a strategy that leaves layers whole realises other ratios than those it was given.
        asked = requested(self.folder, record.trial_id)
        levels = self._space.levels_of(asked.ratios if asked else record.ratios)
        if levels is None:
            return
        completed = record.state is TrialState.COMPLETED
        try:
            self._study.replay(levels, record.metrics if completed else None, record.trial_id)
        except TrialError:
            self._study.replay(levels, None, record.trial_id)

    def _resumed(self) -> TrialRequest | None:
        if not self._waiting:
            return None
        request = self._waiting.pop(0)
        levels = self._space.levels_of(request.ratios)
        assert levels is not None, "filtered at the start"
        suggestion = self._study.ask_for(levels, request.provenance, request.trial_id)
        self._numbers[request.trial_id] = suggestion.number
        return request

    def _asked(self) -> TrialRequest | None:
        trial_id = trial_name(self._next)
        suggestion = self._study.ask(trial_id)
        if suggestion is None:
            return None
        self._next += 1
        self._numbers[trial_id] = suggestion.number
        return TrialRequest(trial_id, self._space.ratios(suggestion.levels), suggestion.provenance)

    def _left_behind(self, trial_id: str) -> TrialRecord | None:
        path = self.folder.trial_dir(trial_id) / RECORD_NAME
        if not path.is_file():
            return None
        try:
            return TrialRecord.from_json(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            return failed_record(self._running[trial_id], f"unreadable record: {one_line(error)}", "")
