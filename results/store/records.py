"""The record of one trial, checked at its boundary, and the append-only file that holds them."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, get_args

from pydantic import Field, PlainValidator, model_validator

from paretoprune.base.atomic import fsync_directory
from paretoprune.base.image_size import ImageSize, plain_size
from paretoprune.base.stored_size import StoredSize
from paretoprune.results.errors import DuplicateTrialError, RecordError, SchemaVersionError, StoreError
from paretoprune.results.store.accuracy import missing_metric
from paretoprune.results.store.persisted import (
    Count,
    Metrics,
    Number,
    Persisted,
    Ratio,
    metric,
    parse_json,
    shortened,
    text,
)

SCHEMA_VERSION = 1
RECORD_VERSION: Literal[4] = 4
"""Of a trial's record; 1 has no `history` and no `violations`, 2 no `imgsz` and no `branches_removed`, 3 no
`precision`. All are read, this one is written."""
Fidelity = Literal["refit", "epochs", "full"]
FIDELITIES: tuple[str, ...] = get_args(Fidelity)
BEYOND_BOUNDS = "beyond the bounds"
ACCURACY_BOUNDS = frozenset({"min_map", "max_drop"})
SOURCE, FORETOLD = "latency_source", "foretold"
"""The metric that says of a latency that it was not measured, and its value."""
DEPLOY_PRECISION = "deploy_precision"
"""The metric that says what the file computes in whose accuracy and latency these are; networks in PyTorch lack it."""
CI95, PI95 = "speedup_ci95", "speedup_pi95"
"""Metrics, [low, high] each: a measured speed-up's 95 % interval, which another measurement at another time meets as
often; and the one that a prediction gives in place of a measurement. A trial has one of the two."""
PHASES = {
    "prune": "removing channels",
    "recover": "recovery without epochs",
    "stats": "counting work and size",
    "latency": "timing",
    "evaluate": "validation without epochs",
    "finetune": "short fine-tuning",
    "deploy": "exporting and validating the file",
    "wait_for_latency": "waiting for a remote timing",
    "wait_for_device": "waiting for device",
    "save": "saving",
}
"""Names of a record's phases, for readers."""

_log = logging.getLogger(__name__)


class TrialState(str, Enum):
    """How a trial ended. All three are final: a record never changes."""

    COMPLETED = "completed"
    STOPPED = "stopped"
    FAILED = "failed"


ENDINGS = (TrialState.COMPLETED.value, TrialState.STOPPED.value, BEYOND_BOUNDS, TrialState.FAILED.value)
"""What `TrialRecord.ending` can be, in the order in which they are shown."""


def _trial_id(value: object) -> str:
    usable = isinstance(value, str) and 0 < len(value) <= 200 and value not in (".", "..")
    if not usable or any(letter in "/\\" or ord(letter) < 32 for letter in str(value)):
        raise RecordError(
            "trial_id", f"trial_id must be usable as a file name (no / or \\), but got {shortened(value)}"
        )
    return str(value)


def _history(value: object) -> list[dict[str, Any]]:
    if not isinstance(value, (list, tuple)):
        raise RecordError("history", f"history must be a list of rows, but got {type(value).__name__}")
    if not all(isinstance(row, Mapping) for row in value):
        raise RecordError("history", f"history must hold mappings, but got {shortened(value)}")
    rows = [
        {text("history", k): metric(f"history[{index}][{k}]", v) for k, v in row.items()}
        for index, row in enumerate(value)
    ]
    epochs = [row.get("epochs") for row in rows]
    whole = [number for number in epochs if type(number) is int and number >= 0]
    if epochs != whole or whole != sorted(set(whole)):
        raise RecordError("history", f"the epochs in history must be whole numbers that rise, but got {epochs}")
    return rows


class TrialRecord(Persisted):
    """One finished trial. Raises RecordError, naming the field, for anything that breaks the rules below.

    trial_id: a file name: no separators, no control characters.
    state: completed trials have at least an accuracy (see `accuracy`) and `latency_ms`; failed ones have an `error`.
    ratios: layer -> fraction of its channels removed, in [0, 1).
    imgsz: size of the trial's input; None: the run's. branches_removed: branches that were removed whole.
    precision: that the trial's file computes in; None: the run's.
    metrics: name -> finite number, text, or list of those, or a mapping of such (in it None, too). NaN and infinity are
        refused.
    epochs: epochs of fine-tuning done. fidelity: "refit" (no epoch), "epochs" or "full".
    seconds: phase -> wall seconds. finished_at: unix seconds.
    history: accuracy on the way, a row an epoch: `epochs` (rising, 0: right after recovery) and figures by name.
    retries: what went wrong and was tried again, a line each: a lost worker, half the batch, a lower rate.
    violations: bound of the run -> by how much the trial is beyond it (above 0); {}: it keeps to all, it is feasible.
    """

    schema_version: Literal[4] = RECORD_VERSION
    trial_id: Annotated[str, PlainValidator(_trial_id)]
    state: TrialState
    plan_hash: str
    ratios: dict[str, Ratio]
    metrics: Metrics
    epochs: Count
    fidelity: Fidelity
    finished_at: Number
    seconds: dict[str, Annotated[Number, Field(ge=0)]] = Field(default_factory=dict)
    device: str = ""
    node: str = ""
    error: str | None = None
    provenance: str = ""
    history: Annotated[list[dict[str, Any]], PlainValidator(_history)] = Field(default_factory=list)
    retries: list[str] = Field(default_factory=list)
    violations: dict[str, Number] = Field(default_factory=dict)
    imgsz: StoredSize | None = None
    branches_removed: list[str] = Field(default_factory=list)
    precision: str | None = None

    @model_validator(mode="after")
    def _check_together(self) -> TrialRecord:
        """The rules that tie several fields."""
        if self.fidelity == "refit" and self.epochs:
            raise RecordError("fidelity", f'fidelity "refit" means no epoch, but got epochs={self.epochs}')
        if self.state is TrialState.FAILED and not self.error:
            raise RecordError("error", f"a failed trial must say why, but trial {self.trial_id!r} has no error line")
        missing = missing_metric(self.metrics)
        if self.state is TrialState.COMPLETED and missing:
            raise RecordError("metrics", f"completed trial {self.trial_id!r} must have the metric {missing}")
        return self

    @property
    def fidelity_label(self) -> str:
        """The trial's fidelity, in words; trials are compared only where this is equal."""
        if self.fidelity == "epochs":
            return "1 epoch" if self.epochs == 1 else f"{self.epochs} epochs"
        return "refit only" if self.fidelity == "refit" else "full fine-tuning"

    @property
    def feasible(self) -> bool:
        """Whether the trial keeps to the run's bounds."""
        return not self.violations

    @property
    def ending(self) -> str:
        """How the trial ended, in words for people: its state, or that it is beyond the run's bounds.

        The accuracy of a stopped trial is not its last one, so a bound on accuracy does not yet speak against it.
        """
        held = ACCURACY_BOUNDS if self.state is TrialState.STOPPED else frozenset()
        return BEYOND_BOUNDS if self.violations.keys() - held else self.state.value

    def number(self, name: str) -> float | None:
        """A metric as a float, or None where the record does not have it as a number."""
        value = self.metrics.get(name)
        return float(value) if isinstance(value, (int, float)) else None

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready mapping, the inverse of `from_json`."""
        size = None if self.imgsz is None else plain_size(self.imgsz)
        content = {name: getattr(self, name) for name in type(self).model_fields}
        return content | {"state": self.state.value, "imgsz": size}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> TrialRecord:
        """Raises SchemaVersionError for another schema, RecordError for missing or unknown fields."""
        if content.get("schema_version") not in (1, 2, 3, RECORD_VERSION):
            raise SchemaVersionError("a trial record", content.get("schema_version"), RECORD_VERSION)
        content = {**content, "schema_version": RECORD_VERSION}  # what older ones lack has its default
        if isinstance(content.get("metrics"), Mapping):
            content["metrics"] = present_metrics(content["metrics"])
        return cls(**content)


def as_record(
    name: str, metrics: Mapping[str, Any], imgsz: ImageSize | None = None, precision: str | None = None
) -> TrialRecord:
    """A network that is no trial, measured as trials are, in the form in which they are compared."""
    values: dict[str, Any] = {"state": TrialState.COMPLETED, "plan_hash": "", "ratios": {}, "epochs": 0}
    values |= {"fidelity": "refit", "finished_at": 0.0, "metrics": dict(metrics)}
    return TrialRecord(trial_id=name, imgsz=imgsz, precision=precision, **values)


def present_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's metrics under today's names: older runs gave a prediction's interval the name of a measured one's."""
    names = {CI95: PI95} if metrics.get(SOURCE) == FORETOLD else {}
    return {names.get(name, name): value for name, value in metrics.items()}


def speedup_interval(metrics: Mapping[str, Any], name: str = CI95) -> tuple[float, float] | None:
    """(low, high) of the measured speed-up, or with `PI95` of the predicted one; None where there is none."""
    bounds = metrics.get(name)
    if not isinstance(bounds, Sequence) or len(bounds) != 2:
        return None
    return float(bounds[0]), float(bounds[1])


def likely_speedups(metrics: Mapping[str, Any]) -> tuple[float, float] | None:
    """(low, high) of the speed-up as far as it is known, measured or predicted; None where it is not."""
    return speedup_interval(metrics) or speedup_interval(metrics, PI95)


def of_device(metrics: Mapping[str, Any], device: str) -> Mapping[str, Any]:
    """The figures of latency on a further kind of device, `latency_ms_pi` as `latency_ms`; "": the metrics as they
    are."""
    end = f"_{device}"
    found = {name.removesuffix(end): value for name, value in metrics.items() if name.endswith(end)}
    return found if device else metrics


class RecordStore:
    """`trials.jsonl`: one JSON record a line, append-only, the source of truth of a run.

    A torn last line (the writer died) is skipped by `read` and cut off by the next `append`; a torn line anywhere else
    means that somebody else wrote here, and is an error with its line number.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._known_ids: set[str] = set()
        self._known_size = -1  # of the file that _known_ids was read from; saves parsing it again at every append
        self._read: tuple[tuple[int, int, int], list[TrialRecord]] | None = None

    def read(self) -> list[TrialRecord]:
        """All records in the order of their arrival; [] where the file is not there yet. Raises StoreError."""
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            return []
        version = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if self._read is None or self._read[0] != version:  # a report asks five times, of thousands of records
            self._read = version, _parse(self.path, self.path.read_bytes())[0]
        return list(self._read[1])

    def append(self, record: TrialRecord) -> None:
        """Add one record and return when it is on disk. Raises DuplicateTrialError, StoreError, OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(record.to_json(), allow_nan=False).encode("utf-8") + b"\n"
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # two processes repairing and appending at once would tear lines
            if os.fstat(file.fileno()).st_size != self._known_size:
                self._repair(file)
            if record.trial_id in self._known_ids:
                raise DuplicateTrialError(record.trial_id, str(self.path))
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
            self._known_ids.add(record.trial_id)
            self._known_size = os.fstat(file.fileno()).st_size
        fsync_directory(self.path.parent)

    def _repair(self, file: BinaryIO) -> None:
        """Read the ids that are there, and make the file end with a whole line."""
        file.seek(0)
        content = file.read()
        records, intact_bytes = _parse(self.path, content)
        if intact_bytes < len(content):
            _log.warning("%s: cut off a torn last line of %d bytes", self.path, len(content) - intact_bytes)
            file.truncate(intact_bytes)
        elif content and not content.endswith(b"\n"):
            file.write(b"\n")  # the last record is whole, only its newline was lost
            file.flush()
        self._known_ids = {known.trial_id for known in records}
        self._known_size = os.fstat(file.fileno()).st_size


def _parse(path: Path, content: bytes) -> tuple[list[TrialRecord], int]:
    """The records, and how many leading bytes hold them (less than all where the last line is torn)."""
    records: list[TrialRecord] = []
    seen: set[str] = set()
    lines = content.split(b"\n")
    last = max((number for number, line in enumerate(lines, start=1) if line.strip()), default=0)
    offset = 0
    for number, line in enumerate(lines[:last], start=1):
        if line.strip():  # editors leave blank lines
            try:
                values = parse_json(line)
            except ValueError:  # also UnicodeDecodeError
                if number == last:
                    return records, offset
                problem = "not a whole JSON record, and not the last line: restore it or delete it"
                raise StoreError(path, number, problem) from None
            record = _record(path, number, values)
            if record.trial_id in seen:
                raise StoreError(path, number, f"trial {record.trial_id!r} has a second record: delete one of them")
            seen.add(record.trial_id)
            records.append(record)
        offset += len(line) + 1
    return records, len(content)


def _record(path: Path, number: int, values: object) -> TrialRecord:
    if not isinstance(values, dict):
        raise StoreError(path, number, f"a record must be a JSON object, but got {type(values).__name__}")
    try:
        return TrialRecord.from_json(values)
    except RecordError as error:
        raise StoreError(path, number, f"{error}: restore the line or delete it") from error
