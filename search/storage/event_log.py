"""A trial's ``events.jsonl`` (one JSON object per line, for machines) and the seconds each phase took."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from paretoprune.cluster.device_lock import seconds_waited
from paretoprune.results.store.persisted import parse_json
from paretoprune.results.store.records import PHASES

WAITING = "wait_for_device"
"""Name for the seconds in which a phase waited for another job on the device."""


class PhaseClock:
    """Times named phases; a phase entered twice adds up. ``current`` is the phase that runs, for error lines.

    The seconds in which the phase's thread stood still at a device's lock are not the phase's own, but those of
    :data:`WAITING`.
    """

    def __init__(self, events: Path) -> None:
        self._events = events
        self.seconds: dict[str, float] = {}
        self.current = "start"

    @contextmanager
    def phase(self, name: str, **values: object) -> Iterator[None]:
        """Time the body as ``name`` and write its begin, with ``values``, and its end as events."""
        self.current = name
        self.event("phase_started", phase=name, **values)
        began, waited_before = time.monotonic(), seconds_waited()
        try:
            yield
        finally:
            waited = seconds_waited() - waited_before
            spent = time.monotonic() - began - waited
            self._add(name, spent)
            if waited:
                self._add(WAITING, waited)
            self.event("phase_ended", phase=name, seconds=round(spent, 4), waited=round(waited, 4))

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def step(self, text: str) -> None:
        """Say what is done now, in words for people (see `activity`); unsaid where the folder is not there."""
        with suppress(OSError):
            self.event("step", text=text)

    def event(self, kind: str, **values: object) -> None:
        """Append one event with the time (unix seconds)."""
        line = json.dumps({"time": round(time.time(), 3), "event": kind, **values})
        with self._events.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")


def read_events(events: Path) -> list[dict[str, Any]]:
    """The events of a file, in their order; [] where it is not there or cannot be read.

    A line that is no event is passed over: the last one is being written right now, or was when its process was killed.
    """
    try:
        lines = events.read_bytes().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            entry = parse_json(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            found.append(entry)
    return found


def events_of(events: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind, as `read_events` gives them."""
    return [entry for entry in read_events(events) if entry.get("event") == kind]


class EventFeed:
    """The events that were appended to a file since one last looked; what is there at the start is passed over."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.is_file() else 0

    def fresh(self) -> Iterator[dict[str, Any]]:
        """New events; a line that is still being written waits for the next look."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as stream:
            stream.seek(self._offset)
            for line in stream:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                yield parse_json(line)


class Activity(NamedTuple):
    """What a worker does now, in words ("" where its file says nothing), and since when, unix seconds."""

    text: str
    since: float


def activity(events: Path) -> Activity:
    """By the events of a worker: "validation without epochs", "fine-tuning, epoch 2 of 3", or the words of a step.

    The epoch is the one under way, whose number is one above that of the last which ended.
    """
    found, epochs = Activity("", 0.0), 0
    for entry in read_events(events):
        kind, since = entry.get("event"), float(entry.get("time", 0.0))
        if kind == "step":
            found = Activity(str(entry.get("text", "")), since)
        elif kind == "phase_started":
            phase, epochs = str(entry.get("phase", "")), int(entry.get("epochs", 0))
            words = f"fine-tuning, epoch 1 of {epochs}" if epochs else PHASES.get(phase, phase)
            found = Activity(words, since)
        elif kind == "finished":
            found = Activity("finished", since)
        elif kind == "epoch":
            epochs = int(entry.get("epochs", epochs))
            stage = f"{entry['stage']}, " if entry.get("stage") else ""
            found = Activity(f"fine-tuning, {stage}epoch {min(int(entry['epoch']) + 1, epochs)} of {epochs}", since)
    return found
