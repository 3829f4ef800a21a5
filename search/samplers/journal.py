"""The study's journal on disk, as Optuna's tools read it."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend


class SingleWriterJournalBackend(JournalFileBackend):
    """Written by one driver, and no truth: the study is built anew from the records at every start.

    So nothing is locked, nothing waits for the disk and nothing is read back: Optuna's own backend does all three some
    30 times a trial, while the slots wait for the driver.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path
        self._first = 0  # number of the first log in _unread; the storage asks for each number once
        self._unread: list[dict[str, Any]] = []

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """One write, so that a dashboard that reads meanwhile sees whole lines."""
        text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        with self._path.open("ab") as file:
            file.write(text.encode("utf-8"))
        self._unread.extend(logs)

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """What was appended since the last call; anything earlier comes from the file."""
        if log_number_from < self._first:
            yield from super().read_logs(log_number_from)
            return
        fresh = self._unread[log_number_from - self._first :]
        self._first, self._unread = log_number_from + len(fresh), []
        yield from fresh
