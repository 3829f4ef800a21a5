"""The study's journal on disk, as Optuna's tools read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend


class DriversJournal(JournalFileBackend):
    """Written by one driver, and no truth: the study is built anew from the records at every start.

    So nothing is locked, and nothing waits for the disk: Optuna's own backend does both some 30 times a trial, while
    the slots wait for the driver.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """One write, so that a dashboard that reads meanwhile sees whole lines."""
        text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        with self._path.open("ab") as file:
            file.write(text.encode("utf-8"))
