"""What the driver asks a worker for: one plan under one trial id, written to the trial's folder before it starts.

A request without a record is an unfinished trial: the next driver takes it up again under the same id. How often its
workers died is kept in it, so that a plan that kills them is given up however many drivers come and go.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

from pydantic import Field

from paretoprune.base.atomic import write_json
from paretoprune.base.file_names import RECORD, REQUEST
from paretoprune.base.stored_size import StoredSize
from paretoprune.pruning.plan import Plan
from paretoprune.results.errors import RecordError
from paretoprune.results.store.persisted import Number, Persisted, Ratio, parse_json
from paretoprune.results.store.records import TrialRecord
from paretoprune.results.store.run_files import read_object
from paretoprune.results.store.run_folder import RunFolder

WORKER_DIED = "worker: its process died (killed, or its machine ran out of memory)"
MEMORY_RAN_OUT = "worker: killed, because its machine ran out of memory"
NODE_LOST = "worker: its node was lost"
CONTACT_LOST = "worker: contact was lost (its process or its node died)"

# How often a trial is begun again after a loss of each kind. A node that goes is seldom the plan's fault.
AGAIN = {WORKER_DIED: 1, MEMORY_RAN_OUT: 1, NODE_LOST: 5, CONTACT_LOST: 2}


class TrialRequest(Persisted):
    """``ratios``: layer -> ratio as the widths realise it; ``provenance``: ladder, the sampler's name, ...

    ``losses``: why earlier workers of this trial were lost. ``foretold``: its latency as a fraction of the unpruned
    network's, where the driver knows it precisely: ``ratio``, and the 95 % interval ``low`` to ``high``. ``imgsz``:
    size of the input; None: the run's. ``branches_removed``: branches to remove whole. ``precision``: that the file
    computes in; None: the run's.
    """

    trial_id: str
    ratios: dict[str, Ratio]
    provenance: str
    losses: list[str] = Field(default_factory=list)
    foretold: dict[str, Number] | None = None
    imgsz: StoredSize | None = None
    branches_removed: list[str] = Field(default_factory=list)
    precision: str | None = None

    def again(self, reason: str) -> TrialRequest | None:
        """The request to hand out after a worker was lost for ``reason``; None where the trial has to be given up."""
        if self.losses.count(reason) >= AGAIN.get(reason, 0):
            return None
        return cast(TrialRequest, self.changed(losses=[*self.losses, reason]))

    def to_text(self) -> str:
        """JSON in one line."""
        return json.dumps(self.model_dump())

    @classmethod
    def from_text(cls, text: str) -> TrialRequest:
        """Inverse of :meth:`to_text`."""
        content = parse_json(text)
        if not isinstance(content, dict):
            raise RecordError("request", f"a request must be a JSON object, but got {type(content).__name__}")
        return cls(**content)

    def save(self, folder: RunFolder) -> None:
        """Write to the trial's folder, atomically."""
        write_json(folder.trial_dir(self.trial_id) / REQUEST, self.model_dump())


def plan_of(item: TrialRequest | TrialRecord) -> Plan:
    """The plan that a request asks for, or that a record is of."""
    return Plan(item.ratios, imgsz=item.imgsz, branches=tuple(item.branches_removed), precision=item.precision)


def trial_number(trial_id: str) -> int:
    """The number in an id that :func:`trial_name` made, -1 for any other name."""
    digits = trial_id[1:]
    return int(digits) if trial_id.startswith("t") and digits.isdigit() else -1


def trial_name(number: int) -> str:
    """``t0007``: sorts in the order of the trials."""
    return f"t{number:04d}"


def requested(folder: RunFolder, trial_id: str) -> TrialRequest | None:
    """What was asked under this id; None where nothing was, or the file is torn."""
    path = folder.trial_dir(trial_id) / REQUEST
    try:
        return TrialRequest.from_text(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def unfinished(folder: RunFolder, finished: set[str]) -> list[TrialRequest]:
    """Requests that have no record, in the order of their ids; a torn request was never started and is ignored."""
    requests = []
    for path in sorted(folder.trials_dir.glob(f"*/{REQUEST}")):
        if path.parent.name in finished or (path.parent / RECORD).is_file():
            continue
        try:
            requests.append(TrialRequest.from_text(path.read_text(encoding="utf-8")))
        except ValueError:
            continue
    return requests


def left_record(trial_dir: Path) -> TrialRecord | None:
    """The record that a worker wrote to the trial's folder, None where there is none; ValueError: it is unreadable."""
    path = trial_dir / RECORD
    return TrialRecord.from_json(read_object(path)) if path.is_file() else None


def adopt_records(folder: RunFolder) -> list[TrialRecord]:
    """Append the records that workers wrote while no driver was alive; all records then, in order of arrival.

    A worker writes ``record.json`` first and the driver appends it: whatever dies in between, nothing is lost.
    """
    records = folder.read_records()
    known = {record.trial_id for record in records}
    folders = [path.parent for path in folder.trials_dir.glob(f"*/{RECORD}") if path.parent.name not in known]
    found = [record for record in map(left_record, folders) if record is not None]
    for record in sorted(found, key=lambda record: record.finished_at):
        folder.store.append(record)
        records.append(record)
    return records
