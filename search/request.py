"""What the driver asks a worker for: one plan under one trial id, written to the trial's folder before it starts.

A request without a record is an unfinished trial: the next driver takes it up again under the same id.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from results.atomic import write_json
from results.records import TrialRecord
from results.run_folder import RunFolder

REQUEST_NAME = "request.json"
RECORD_NAME = "record.json"


@dataclass(frozen=True)
class TrialRequest:
    """``ratios``: layer -> ratio as the widths realise it; ``provenance``: ladder, the sampler's name, ..."""

    trial_id: str
    ratios: dict[str, float]
    provenance: str

    def to_text(self) -> str:
        """JSON in one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> TrialRequest:
        """Inverse of :meth:`to_text`."""
        return cls(**json.loads(text))

    def save(self, folder: RunFolder) -> None:
        """Write to the trial's folder, atomically."""
        write_json(folder.trial_dir(self.trial_id) / REQUEST_NAME, asdict(self))


def trial_number(trial_id: str) -> int:
    """The number in an id that :func:`trial_name` made, -1 for any other name."""
    digits = trial_id[1:]
    return int(digits) if trial_id.startswith("t") and digits.isdigit() else -1


def trial_name(number: int) -> str:
    """``t0007``: sorts in the order of the trials."""
    return f"t{number:04d}"


def requested(folder: RunFolder, trial_id: str) -> TrialRequest | None:
    """What was asked under this id; None where nothing was, or the file is torn."""
    path = folder.trial_dir(trial_id) / REQUEST_NAME
    try:
        return TrialRequest.from_text(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return None


def unfinished(folder: RunFolder, finished: set[str]) -> list[TrialRequest]:
    """Requests that have no record, in the order of their ids; a torn request was never started and is ignored."""
    requests = []
    for path in sorted(folder.trials_dir.glob(f"*/{REQUEST_NAME}")):
        if path.parent.name in finished or (path.parent / RECORD_NAME).is_file():
            continue
        try:
            requests.append(TrialRequest.from_text(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            continue
    return requests


def adopt_records(folder: RunFolder) -> list[TrialRecord]:
    """Append the records that workers wrote while no driver was alive; all records then, in order of arrival.

    A worker writes ``record.json`` first and the driver appends it: whatever dies in between, nothing is lost.
    """
    records = folder.read_records()
    known = {record.trial_id for record in records}
    paths = [path for path in folder.trials_dir.glob(f"*/{RECORD_NAME}") if path.parent.name not in known]
    found = [TrialRecord.from_json(json.loads(path.read_text(encoding="utf-8"))) for path in paths]
    for record in sorted(found, key=lambda record: record.finished_at):
        folder.store.append(record)
        records.append(record)
    return records
