"""Early stopping at the rungs: each worker decides by itself, from the files of all trials of the run.

A trial writes its rung into its ``events.jsonl`` before it asks (see :mod:`search.stopping.rungs`), and nobody else
writes there. So there is no process that could die with decisions in it, and a resumed run goes on deciding from the
same files. Two trials that reach a rung at once may not see each other; the rule allows for that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paretoprune.base.file_names import EVENTS, RECORD
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.stopping.rule import StoppingRule
from paretoprune.search.stopping.rungs import RUNG_EVENT, EarlyStopper, RungReport
from paretoprune.search.storage.event_log import read_events


class LocalEarlyStopper:
    """Reads the trials' folders below ``trials``; those of finished trials once."""

    def __init__(self, trials: Path, rule: StoppingRule) -> None:
        self._trials = trials
        self._rule = rule
        self._finished: dict[str, list[RungReport]] = {}

    def stops(self, report: RungReport) -> bool:
        """See :class:`search.stopping.rungs.EarlyStopper`. Where the folder cannot be read, the trial goes on."""
        try:
            return self._rule.stops(report, self.reports())
        except OSError:
            return False

    def reports(self) -> list[RungReport]:
        """The last report of every trial at every rung (a trial that was begun again has two)."""
        found = []
        for folder in sorted(self._trials.iterdir()):
            if folder.name not in self._finished:
                done = (folder / RECORD).is_file()  # before reading: what is written meanwhile counts next time
                reports = rung_reports(folder / EVENTS, folder.name)
                if done:
                    self._finished[folder.name] = reports
                found += reports
            else:
                found += self._finished[folder.name]
        return found


class RemoteEarlyStopper:
    """For a worker that does not see the run folder: the courier, on the driver's machine, decides there."""

    def __init__(self, courier: Any, folder: RunFolder, rule: StoppingRule) -> None:
        self._courier = courier
        self._folder = folder
        self._rule = rule

    def stops(self, report: RungReport) -> bool:
        """See :class:`search.stopping.rungs.EarlyStopper`. Where the driver's machine is silent, the trial goes on."""
        import ray

        name = f"{self._folder.trials_dir.name}/{report.trial_id}/{EVENTS}"
        events = (self._folder.trial_dir(report.trial_id) / EVENTS).read_bytes()
        try:
            ray.get(self._courier.deliver.remote({name: events}))
            return bool(ray.get(self._courier.stops.remote(report, self._rule)))
        except ray.exceptions.RayError:
            return False


def judge_of(folder: RunFolder, rule: StoppingRule, courier: Any = None) -> EarlyStopper:
    """This process's judge for the run; it remembers what it read of finished trials."""
    if courier is not None:
        return RemoteEarlyStopper(courier, folder, rule)
    key = (str(folder.path), rule)
    if key not in _JUDGES:
        _JUDGES.clear()  # a worker serves one run at a time
        _JUDGES[key] = LocalEarlyStopper(folder.trials_dir, rule)
    return _JUDGES[key]


_JUDGES: dict[tuple[str, StoppingRule], LocalEarlyStopper] = {}


def rung_reports(events: Path, trial_id: str) -> list[RungReport]:
    """The rungs in an events file, the last line of each counts; [] where there is no file."""
    reports: dict[int, RungReport] = {}
    for entry in read_events(events):
        if entry.get("event") != RUNG_EVENT:
            continue
        try:
            figures = int(entry["epochs"]), float(entry["accuracy"]), dict(entry["costs"])
            report = RungReport(trial_id, *figures, str(entry.get("precision", "")))
        except (ValueError, KeyError, TypeError, OverflowError):  # written by another version, or damaged
            continue
        reports[report.epochs] = report
    return list(reports.values())
