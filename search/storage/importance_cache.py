"""The channels' importance, kept in the run: all workers cut by the same scores, which only the first one computes.

With a criterion that looks at images they take a minute of a CPU, which each worker of a cluster would spend again.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from paretoprune.base.arrays import read_arrays
from paretoprune.base.atomic import write_bytes

SCORES_NAME = "importance.npz"
"""Below the run folder: ``scores`` (class_count,) and ``made_from``, the settings they follow from, as JSON."""


def keep_scores(run: Path, made_from: Mapping[str, Any], scores: np.ndarray) -> None:
    """Write them; raises OSError where the folder cannot be written."""
    buffer = io.BytesIO()
    np.savez(buffer, scores=scores, made_from=np.array(_text(made_from)))
    write_bytes(run / SCORES_NAME, buffer.getvalue())


def kept_scores(run: Path, made_from: Mapping[str, Any]) -> np.ndarray | None:
    """The scores (class_count,) that the run keeps; None where it has none that follow from ``made_from``."""
    try:
        content = read_arrays(run / SCORES_NAME)
        same = str(content["made_from"]) == _text(made_from)
        scores = content["scores"]
    except (OSError, ValueError, KeyError):
        return None  # they can be computed again
    return scores if same and scores.ndim == 1 and scores.dtype.kind == "f" else None


def _text(made_from: Mapping[str, Any]) -> str:
    return json.dumps(made_from, sort_keys=True)
