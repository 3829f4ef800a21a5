"""The record of a sequence's finished sessions: `sessions.json` beside their checkpoints, written last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paretoprune.base.atomic import write_json
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.plan import Plan
from paretoprune.pruning.workbench import Workbench

SCHEMA_VERSION = 1
SESSIONS_NAME = "sessions.json"


@dataclass(frozen=True)
class Session:
    """A finished session: which block, by which layer, the epochs it spent, what it cut."""

    block: int
    layer: str
    epochs: int
    plan: Plan


class Sessions:
    """The finished sessions in one folder.

    Args:
        folder: of the sequence; made at the first write.
        identity: of everything that decides what the sessions give; another one's sessions are refused.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder, self.identity = folder, identity
        self.path = folder / SESSIONS_NAME

    def checkpoint(self, number: int) -> Path:
        """Where session `number`, counted from 1, leaves its network."""
        return self.folder / f"session-{number}.pt"

    def read(self) -> list[Session]:
        """The finished sessions in order; none where nothing was written yet.

        Raises:
            PruningError: the file is unreadable or of another sequence, or a checkpoint that it names is gone.
        """
        if not self.path.exists():
            return []
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            belongs, rows = content["identity"], content["sessions"]
            found = [Session(int(r["block"]), str(r["layer"]), int(r["epochs"]), _plan(r)) for r in rows]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            remedy = "remove the folder to start again"
            raise PruningError(f"{self.path} must list finished sessions, but got {error!r:.120}; {remedy}.") from None
        if belongs != self.identity:
            raise PruningError(
                f"{self.folder} must hold sessions of this very sequence, but they are of another (model, ratios, "
                "epochs, importance or recovery differ); give another folder or remove this one."
            )
        missing = [k for k in range(1, len(found) + 1) if not self.checkpoint(k).is_file()]
        if missing:
            raise PruningError(
                f"every finished session must have its checkpoint, but {self.checkpoint(missing[0])} is gone; remove "
                "the folder to start again."
            )
        return found

    def write(self, sessions: Sequence[Session]) -> None:
        """Write under a temporary name, then rename: a session counts entirely or not at all."""
        content = {
            "schema_version": SCHEMA_VERSION,
            "identity": self.identity,
            "sessions": [
                {
                    "block": s.block,
                    "layer": s.layer,
                    "epochs": s.epochs,
                    "checkpoint": self.checkpoint(number).name,
                    "plan": s.plan.to_json(),
                }
                for number, s in enumerate(sessions, 1)
            ],
        }
        write_json(self.path, content)


def finished_epochs(folder: Path) -> int:
    """Epochs that the finished sessions in `folder` took; 0 where there are none, or where they cannot be read."""
    path = folder / SESSIONS_NAME
    if not path.is_file():
        return 0
    try:
        return sum(int(row["epochs"]) for row in json.loads(path.read_text(encoding="utf-8"))["sessions"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return 0  # `Sessions.read` says what is wrong with it


def _plan(row: dict[str, Any]) -> Plan:
    return Plan.from_json(row["plan"], f"the plan of session layer {row['layer']}")


def identity(bench: Workbench, steps: Sequence[tuple[str, float, int]], recover: str) -> str:
    """What a sequence's result follows from, 16 hex digits: the baseline's weights, its sessions and the settings."""
    settings: list[object] = [
        bench.data,
        bench.imgsz,
        bench.calibration_images,
        bench.importance,
        bench.round_to,
        bench.seed,
    ]
    settings.append(repr(bench.refit_settings))
    text = json.dumps([bench.table.fingerprint, [list(s) for s in steps], recover, settings])
    digest = hashlib.sha256(text.encode())
    for tensor in bench.model.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
