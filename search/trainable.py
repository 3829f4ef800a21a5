"""The glue to Ray Tune: the trainable that workers run, and the callback that brings records to the driver."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from ray import tune

from results.records import TrialRecord
from search.request import TrialRequest
from search.searcher import Transient
from search.state import SweepState
from search.worker import WorkerContext, work_on_trial


class SweepObserver(Protocol):
    """Who watches a sweep (see ``search.progress``)."""

    def started(self, trial_id: str) -> None: ...
    def finished(self, record: TrialRecord) -> None: ...


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
        return {"done": True, "record": json.dumps(record.to_json())}

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
        self._observer.finished(record)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The worker itself died, or could not start: exceptions of a trial come as records."""
        record = self._state.lose(_trial_id(trial), _reason(trial))
        if record is not None:
            self._observer.finished(record)


class StopSweep(Transient, tune.Stopper):
    """Ends the sweep when somebody asked for it (``asked``), or when its first trials all failed for one reason."""

    def __init__(self, state: SweepState) -> None:
        self.asked = False
        self._state = state

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Single trials are not stopped here."""
        return False

    def stop_all(self) -> bool:
        """Whether the whole sweep ends."""
        return self.asked or self._state.systematic_fault() is not None


def _trial_id(trial: Any) -> str:
    return TrialRequest.from_text(trial.config["request"]).trial_id


def _reason(trial: Any) -> str:
    """One line from the error file that Tune writes on the driver's machine."""
    try:
        text = Path(trial.error_file).read_text(encoding="utf-8").strip()
    except (OSError, TypeError):  # no file was written
        text = ""
    if "ActorDiedError" in text or "ActorUnavailableError" in text or "died unexpectedly" in text:
        return "worker: its process died (killed, out of memory, or its node was lost)"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"worker: {lines[-1][:300]}" if lines else "worker: ended without a record"
