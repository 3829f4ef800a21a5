"""Progress of a run, read from its files: works from any terminal, while the driver runs or after it died."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paretoprune.base.file_names import EVENTS
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.monitoring.command_line import command_line
from paretoprune.search.monitoring.progress import Progress, progress_of, summary_line, trial_line
from paretoprune.search.storage.driver_lock import Driver, alive_driver
from paretoprune.search.storage.event_log import last_phase
from paretoprune.search.storage.request import unfinished


@dataclass(frozen=True)
class RunStatus:
    """``driver`` is None where none is alive; then ``running`` trials of ``progress`` are unfinished ones."""

    run: Path
    driver: Driver | None
    progress: Progress
    phases: dict[str, str]
    last_trials: tuple[str, ...]

    def to_row(self) -> dict[str, Any]:
        """Flat and plain, for JSON and CSV."""
        alive = self.driver is not None
        host = {"driver_host": self.driver.host, "driver_pid": self.driver.pid} if self.driver else {}
        return {"run": str(self.run), "alive": alive, **host, **asdict(self.progress), "phases": self.phases}


def run_status(folder: RunFolder, total: int, objectives: Sequence[str]) -> RunStatus:
    """Read a run's files; raises what reading its records raises."""
    records = folder.read_records()
    driver = alive_driver(folder.path)
    open_trials = [request.trial_id for request in unfinished(folder, {record.trial_id for record in records})]
    running = len(open_trials) if driver else 0
    return RunStatus(
        run=folder.path,
        driver=driver,
        progress=progress_of(records, total, running, driver.slots if driver else 1, objectives),
        phases={name: last_phase(folder.trial_dir(name) / EVENTS) for name in open_trials},
        last_trials=tuple(trial_line(record) for record in records[-5:]),
    )


def status_lines(status: RunStatus) -> list[str]:
    """For people: who drives it, the last trials, the summary, what runs."""
    lines = [_driver_line(status)]
    lines.extend(status.last_trials)
    lines.append(summary_line(status.progress))
    verb = "running" if status.driver else "unfinished"
    lines.extend(f"{verb} {name}: {phase or 'waiting'}" for name, phase in status.phases.items())
    return lines


def _driver_line(status: RunStatus) -> str:
    if status.driver is not None:
        return f"{status.run}: driven by pid {status.driver.pid} on {status.driver.host}"
    if status.progress.left:
        return f"{status.run}: no driver is running; resume with `{command_line('resume', status.run)}`"
    return f"{status.run}: finished"
