"""Progress of a run, read from its files: works from any terminal, while the driver runs or after it died."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paretoprune.base.file_names import EVENTS, TUNED
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.monitoring.command_line import command_line
from paretoprune.search.monitoring.progress import Progress, progress_of, summary_line, trial_line
from paretoprune.search.storage.driver_lock import Driver, alive_driver
from paretoprune.search.storage.event_log import activity
from paretoprune.search.storage.request import unfinished


@dataclass(frozen=True)
class RunStatus:
    """``driver`` is None where none is alive; then ``running`` trials of ``progress`` are unfinished ones.

    ``phases``: what is done now, by trial or network; of the run itself, as the unpruned model, by "run".
    """

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
    phases = {name: activity(folder.trial_dir(name) / EVENTS).text for name in open_trials}
    if driver:
        phases |= _between_trials(folder)
    baseline = folder.read_baseline() if folder.baseline.is_file() else None
    return RunStatus(
        run=folder.path,
        driver=driver,
        progress=progress_of(records, total, running, driver.slots if driver else 1, objectives, baseline),
        phases=phases,
        last_trials=tuple(trial_line(record) for record in records[-5:]),
    )


def _between_trials(folder: RunFolder) -> dict[str, str]:
    """What is done for the run itself, and the full fine-tunings under way."""
    places = [*folder.selected_root.glob("*"), *folder.native_root.glob("*")]
    begun = [place for place in sorted(places) if (place / EVENTS).is_file() and not (place / TUNED).is_file()]
    doing = {"run": activity(folder.path / EVENTS), **{place.name: activity(place / EVENTS) for place in begun}}
    return {name: it.text for name, it in doing.items() if it.text}


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
