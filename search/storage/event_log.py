"""A trial's ``events.jsonl`` (one JSON object per line, for machines) and the seconds each phase took."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from paretoprune.cluster.device_lock import seconds_waited
from paretoprune.results.store.persisted import parse_json

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
    def phase(self, name: str) -> Iterator[None]:
        """Time the body as ``name`` and write its begin and end as events."""
        self.current = name
        self.event("phase_started", phase=name)
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


def last_phase(events: Path) -> str:
    """The phase that began last, "" before the first one or where the file cannot be read."""
    phases = events_of(events, "phase_started")
    return str(phases[-1].get("phase", "")) if phases else ""
