"""The glue to Ray Tune: the trainable that workers run, and the callback that hands records to the driver."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Protocol

from ray import tune

from paretoprune.results.store.records import TrialRecord
from paretoprune.search.monitoring.interrupts import died
from paretoprune.search.monitoring.trackers import numbers, write_trial
from paretoprune.search.storage.request import CONTACT_LOST, MEMORY_RAN_OUT, NODE_LOST, WORKER_DIED, TrialRequest
from paretoprune.search.sweep.state import SweepState
from paretoprune.search.sweep.tune_searcher import Transient
from paretoprune.search.worker.context import WorkerContext
from paretoprune.search.worker.worker import work_on_trial

_NODE_DEATH = re.compile(r"NODE_DIED|node (was terminated|has died|is dead|died)", re.IGNORECASE)


class SweepObserver(Protocol):
    """Who watches a sweep (see ``search.monitoring.progress``)."""

    def started(self, trial_id: str) -> None: ...
    def finished(self, record: TrialRecord) -> None: ...
    def note(self, text: str) -> None: ...


class TrialRunner(tune.Trainable):
    """One Tune iteration is one whole trial. Actors are reused, so torch is imported once per worker."""

    def setup(self, config: dict[str, Any], context: WorkerContext | None = None) -> None:
        """Called once per actor; the tools are made at the first trial."""
        assert context is not None, "given by tune.with_parameters"
        self._context = context
        self._request = TrialRequest.from_text(config["request"])

    def step(self) -> dict[str, Any]:
        """Run the trial to its record."""
        record = work_on_trial(self._context, self._request)
        return {"done": True, "record": json.dumps(record.to_json()), **numbers(record.metrics)}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next request in the same process."""
        self._request = TrialRequest.from_text(new_config["request"])
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing of Ray's is kept: a trial's state lies in its own folder."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Never called."""


class SweepCallback(Transient, tune.Callback):
    """Brings every record to the state exactly once, and lets the observer see it."""

    def __init__(self, state: SweepState, observer: SweepObserver) -> None:
        self._state = state
        self._observer = observer

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A worker took the trial."""
        self._observer.started(_trial_id(trial))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """The trial's only result is its record."""
        record = TrialRecord.from_json(json.loads(result["record"]))
        self._state.finish(record)
        self._show(record)
        write_trial(self._state.folder, record)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The worker itself died, or could not start: exceptions of a trial come as records."""
        if _trial_id(trial) not in self._state.running or died():
            return  # its record was there before its worker died; or Ray is dead, which is nothing of the trial's
        reason = loss_reason(_error_text(trial))
        record = self._state.lose(_trial_id(trial), reason)
        if record is not None:
            self._show(record)
        elif not self._state.broken:
            self._observer.note(f"{_trial_id(trial)}: {reason}; begun again")

    def _show(self, record: TrialRecord) -> None:
        self._observer.finished(record)
        while self._state.remarks:
            self._observer.note(self._state.remarks.pop(0))


class StopSweep(Transient, tune.Stopper):
    """Ends the sweep when somebody asked for it (``asked``), when its disk is full, or when trials all fail alike."""

    def __init__(self, state: SweepState) -> None:
        self.asked = False
        self._state = state

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Single trials are not stopped here."""
        return False

    def stop_all(self) -> bool:
        """Whether the whole sweep ends."""
        return self.asked or self._state.broken is not None or self._state.systematic_fault() is not None


def _trial_id(trial: Any) -> str:
    return TrialRequest.from_text(trial.config["request"]).trial_id


def _error_text(trial: Any) -> str:
    """Tune's report of the error, on the driver's machine; "" if it could not write one."""
    try:
        return Path(trial.error_file).read_text(encoding="utf-8").strip()
    except (OSError, TypeError):
        return ""


def loss_reason(text: str) -> str:
    """One line about a worker that was lost, from Ray's many."""
    if "ActorUnavailableError" in text or "actor is temporarily unavailable" in text:
        return CONTACT_LOST  # Ray does not know yet whether it lives; where it does, it holds its trial's folder
    if "ActorDiedError" in text or "died unexpectedly" in text or _NODE_DEATH.search(text):
        if "OUT_OF_MEMORY" in text or "running low on memory" in text:
            return MEMORY_RAN_OUT
        return NODE_LOST if _NODE_DEATH.search(text) else WORKER_DIED
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"worker: {lines[-1][:300]}" if lines else "worker: ended without a record"
