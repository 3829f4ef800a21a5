"""What a sweep has asked for and what has come back: the one place that joins study, records and trial folders.

Called by the driver only, from one thread. No Ray here.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from paretoprune.base.errors import typed_line
from paretoprune.base.file_names import TRIAL_LOG
from paretoprune.results.store.records import TrialRecord
from paretoprune.results.store.run_files import free_move_name
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.errors import TrialError
from paretoprune.search.samplers.observations import ObservationBuilder
from paretoprune.search.samplers.study import SearchStudy
from paretoprune.search.space.prediction import LatencyPredictor, NoPredictor
from paretoprune.search.space.space import Space
from paretoprune.search.storage.request import (
    TrialRequest,
    left_record,
    plan_of,
    requested,
    trial_name,
    trial_number,
    unfinished,
)
from paretoprune.search.sweep.budget import Budget
from paretoprune.search.sweep.failures import FaultCounter, fault_of
from paretoprune.search.trial.trial import failed_record

# So many trials failing for one reason, the first of this driver or later in a row: the fault is the run's, not the
# plans'. Later the bar is higher: a sampler may well walk along the edge of what can be pruned.
SAME_FAULT = 4
SAME_FAULT_LATER = 8


class SweepState:
    """Requests out, records in. ``records`` holds every finished trial, in the order of their arrival."""

    def __init__(
        self,
        folder: RunFolder,
        space: Space,
        study: SearchStudy,
        records: Sequence[TrialRecord],
        total: int,
        teller: ObservationBuilder,
        predictor: LatencyPredictor | None = None,
        budget: Budget | None = None,
    ) -> None:
        """Replay ``records`` into ``study`` and queue the trials that an earlier driver left unfinished.

        ``total``: finished trials at the end; ``predictor``: learns latency from the records; ``budget``: None is
        without limit.
        """
        self.folder = folder
        self._store = folder.store  # one for all: each would read the whole file at its first append
        self.records = list(records)
        self.total = total
        self._space = space
        self._study = study
        self._teller = teller
        self._predictor = predictor or NoPredictor()
        self.budget = budget or Budget()
        self._numbers: dict[str, int] = {}
        self._running: dict[str, TrialRequest] = {}
        for record in self.records:
            self._teller.learn(record)
        for record in self.records:
            self._replay(record)
        # The unpruned model at every size and precision: free moves, which others measure once, never asked as trials
        moves = space.unpruned if space.image_sizes or space.precisions else []
        plans = {free_move_name(plan.imgsz, plan.precision): space.levels_of(plan) for plan in moves}
        self._unpruned = {name: levels for name, levels in plans.items() if levels is not None}
        for levels in self._unpruned.values():
            self._study.skip(levels)
        self._free_moves: set[str] = set()
        finished = {record.trial_id for record in self.records}
        left = unfinished(folder, finished)
        self._waiting = [request for request in left if space.levels_of(plan_of(request)) is not None]
        self._known = len(self.records)  # of earlier drivers, whose faults may be mended by now
        self._faults = FaultCounter()
        self.remarks: list[str] = []
        """Lines that are to be shown and have not been; the caller shows and thereby removes them."""
        self.broken: OSError | None = None
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
        """The next trial, written to its folder first; None when enough are under way, when the budget is used up, or
        when no new plan is left.

        None, too, once the run folder cannot be written any more (``broken``).
        """
        if self.broken or len(self._running) >= self.remaining or self.budget.used_up(self.records):
            return None
        try:
            request = self._resumed() or self._asked()
            if request is not None:
                request.save(self.folder)
        except OSError as error:
            self.broken = error
            return None
        if request is not None:
            self._running[request.trial_id] = request
            self.budget.began(request.trial_id)
        return request

    def finish(self, record: TrialRecord) -> None:
        """Append a record and tell the study; a second record of one trial is ignored (a worker may report twice).

        Where the disk does not take it, the sweep is over (``broken``): the trial stays unfinished, and is taken from
        its folder, or done again, by the next driver.
        """
        if self.broken or record.trial_id not in self._running:
            return
        try:
            self._store.append(record)
            self._running.pop(record.trial_id)
            self.budget.ended(record.trial_id)
            self.records.append(record)
            fault = self._faults.saw(record)
            if fault is not None:
                log = self.folder.trial_dir(fault.trial_id) / TRIAL_LOG
                self.remarks.append(f"{fault.text}; see {log}")
            self._tell(record)
        except OSError as error:
            self.broken = error

    def _tell(self, record: TrialRecord) -> None:
        self._predictor.learn(record)
        number = self._numbers.pop(record.trial_id)
        self._teller.learn(record)
        told = self._teller.told(record)
        if told is None:
            self._study.fail(number, record.error or record.state.value)
            return
        try:
            self._study.tell(number, told)
        except TrialError:  # the record stays; the sampler just cannot learn from a trial without its objectives
            return

    def lose(self, trial_id: str, reason: str) -> TrialRecord | None:
        """A trial whose worker died: the record it may have left on disk, else a failed one.

        None where the trial is to be begun again (from its last epoch): it is the next one to be handed out.
        """
        request = self._running.get(trial_id)
        if request is None or self.broken:
            return None
        record = self._left_behind(trial_id)
        if record is None:
            again = request.again(reason)
            if again is not None:
                self._queue_again(again)
                return None
            record = failed_record(request, reason, plan_of(request).hash).changed(retries=request.losses)
        self.finish(record)
        return record

    def _queue_again(self, request: TrialRequest) -> None:
        try:
            request.save(self.folder)
        except OSError as error:
            self.broken = error
        del self._running[request.trial_id]
        self._waiting.insert(0, request)

    def collect(self) -> None:
        """Take the records of trials that finished on disk while the sweep was already ending."""
        for trial_id in self.running:
            record = self._left_behind(trial_id)
            if record is not None:
                self.finish(record)

    def systematic_fault(self) -> str | None:
        """The reason, where this driver's first trials, or many in a row later on, failed for the same one."""
        new = [fault_of(record) for record in self.records[self._known :]]
        for last in (new, new[-SAME_FAULT_LATER:]):
            enough = SAME_FAULT if last is new else SAME_FAULT_LATER
            if len(last) >= enough and len(set(last)) == 1 and last[0] is not None:
                return self.records[-1].error
        return None

    def close(self) -> None:
        """End of the sweep: nothing stays RUNNING in the study. Unfinished trials keep their requests for a resume."""
        with suppress(OSError):  # a full disk: the next driver builds the study anew in any case
            self._study.close()

    def _replay(self, record: TrialRecord) -> None:
        # As it was asked: a strategy that leaves layers whole realises other ratios than those it was given.
        asked = requested(self.folder, record.trial_id)
        levels = self._space.levels_of(plan_of(asked or record))
        if levels is None:
            return
        try:
            self._study.replay(levels, self._teller.told(record), record.trial_id)
        except TrialError:
            self._study.replay(levels, None, record.trial_id)

    def _resumed(self) -> TrialRequest | None:
        if not self._waiting:
            return None
        request = self._waiting.pop(0)
        if request.trial_id in self._numbers:
            return request  # its worker was lost; the study still has it running
        levels = self._space.levels_of(plan_of(request))
        assert levels is not None, "filtered at the start"
        suggestion = self._study.ask_for(levels, request.provenance, request.trial_id)
        self._numbers[request.trial_id] = suggestion.number
        return request

    def _observe_free_moves(self) -> None:
        """Add the unpruned model at smaller inputs and in other precisions to the study, as far as it was measured."""
        for move in self.folder.read_free_moves():
            levels = self._unpruned.get(move.trial_id)
            if levels is not None and move.trial_id not in self._free_moves:
                self._free_moves.add(move.trial_id)
                self._predictor.learn(move)
                with suppress(TrialError):  # measured without one of the run's objectives: nothing to learn
                    self._study.replay(levels, self._teller.told(move), move.trial_id)

    def _asked(self) -> TrialRequest | None:
        self._observe_free_moves()
        trial_id = trial_name(self._next)
        suggestion = self._study.ask(trial_id)
        if suggestion is None:
            return None
        self._next += 1
        self._numbers[trial_id] = suggestion.number
        plan = self._space.plan(suggestion.levels)
        prediction = self._predictor.predict(plan)
        return TrialRequest(
            trial_id=trial_id,
            ratios=dict(plan.ratios),
            imgsz=plan.imgsz,
            branches_removed=list(plan.branches),
            precision=plan.precision,
            provenance=suggestion.provenance,
            foretold=prediction.foretold() if prediction is not None and prediction.is_precise else None,
        )

    def _left_behind(self, trial_id: str) -> TrialRecord | None:
        try:
            return left_record(self.folder.trial_dir(trial_id))
        except ValueError as error:
            return failed_record(self._running[trial_id], f"unreadable record: {typed_line(error)}", "")
