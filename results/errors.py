"""Errors of this room that a person should read: one line each, saying the condition, what was got and the remedy."""

from __future__ import annotations

from pathlib import Path

from paretoprune.base.errors import UserError


class ResultsError(UserError):
    """Base of every error this room raises for a person."""


class RecordError(ResultsError):
    """A trial record (or another file's content) breaks its contract; `field` names the offending part."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class SchemaVersionError(RecordError):
    """A file was written under a schema version that this code does not read."""

    def __init__(self, where: str, got: object, known: int) -> None:
        super().__init__(
            "schema_version",
            f"{where} must have schema_version {known}, but got {got!r}: read it with the paretoprune that wrote it",
        )
        self.got = got


class StoreError(ResultsError):
    """`trials.jsonl` cannot be trusted at `line_number` (counted from 1)."""

    def __init__(self, path: Path, line_number: int, problem: str) -> None:
        super().__init__(f"{path} line {line_number}: {problem}")
        self.path = path
        self.line_number = line_number


class DuplicateTrialError(ResultsError):
    """A trial that already has a record must not get a second one."""

    def __init__(self, trial_id: str, where: str) -> None:
        super().__init__(f"a trial has one record, but {where} already holds trial {trial_id!r}: use a new trial id")
        self.trial_id = trial_id


class ObjectiveError(ResultsError):
    """An objective is unknown, or a record lacks its metric."""


class RunFolderError(ResultsError):
    """A folder is not a run folder, or one of its files is missing or unreadable."""
