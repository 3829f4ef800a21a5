"""The objectives a run can have. The one owner of the sign: from here on arrays are `losses`, and lower is better."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paretoprune.results.errors import ObjectiveError
from paretoprune.results.store.accuracy import LABELS
from paretoprune.results.store.records import TrialRecord

DIRECTIONS: dict[str, str] = {
    "map50_95": "max",
    "map50": "max",
    "map50_95_mask": "max",
    "map50_mask": "max",
    "map50_95_pose": "max",
    "map50_pose": "max",
    "map50_95_box": "max",
    "map50_box": "max",
    "top1": "max",
    "top5": "max",
    "latency_ms": "min",
    "params_m": "min",
    "gflops": "min",
    "size_mb": "min",
    "energy_j": "min",
}
TITLES: dict[str, tuple[str, str]] = {
    **{name: (label, "") for name, label in LABELS.items()},
    "map50": ("mAP50", ""),
    "map50_95_mask": ("mask mAP50-95", ""),
    "map50_mask": ("mask mAP50", ""),
    "map50_95_pose": ("pose mAP50-95", ""),
    "map50_pose": ("pose mAP50", ""),
    "map50_95_box": ("box mAP50-95", ""),
    "map50_box": ("box mAP50", ""),
    "top5": ("top-5 accuracy", ""),
    "latency_ms": ("latency", "ms"),
    "params_m": ("parameters", "M"),
    "gflops": ("GFLOPs", ""),
    "size_mb": ("size", "MB"),
    "energy_j": ("energy", "J"),
}
"""Objective -> what people call it, and its unit."""
DEFAULT_OBJECTIVES: tuple[str, ...] = ("map50_95", "latency_ms")

Losses = NDArray[np.float64]
_ON_DEVICE = re.compile(r"latency_ms_([a-z][a-z0-9]{0,15})")  # a further kind of device has its name behind


def device_of(name: str) -> str:
    """The further kind of device whose latency an objective is; "" of every other objective."""
    found = _ON_DEVICE.fullmatch(name)
    return found.group(1) if found else ""


def direction(name: str) -> str:
    """ "max" or "min"; KeyError for what is no objective."""
    return DIRECTIONS["latency_ms" if device_of(name) else name]


def is_objective(name: str) -> bool:
    """Whether a run can have it."""
    return name in DIRECTIONS or bool(device_of(name))


def words(name: str) -> tuple[str, str]:
    """What people call an objective, and its unit."""
    device = device_of(name)
    return (f"latency on {device}", "ms") if device else TITLES[name]


def title(name: str) -> str:
    """An objective with its unit, for the head of a column: "latency, ms"."""
    word, unit = words(name)
    return f"{word}, {unit}" if unit else word


def check_objectives(names: Sequence[str]) -> tuple[str, ...]:
    """The names as a tuple. Raises ObjectiveError for none, a repeated one or an unknown one."""
    for name in names:
        if not is_objective(name):
            raise ObjectiveError(f"objectives must be among {', '.join(DIRECTIONS)}, but got {name!r}")
    if not names or len(set(names)) != len(names):
        raise ObjectiveError(f"objectives must be one or more different names, but got {list(names)}")
    return tuple(names)


def metrics_to_losses(metrics: Mapping[str, Any], names: Sequence[str]) -> Losses:
    """One mapping of metrics -> (m,) losses, lower is better. Raises ObjectiveError for a missing or NaN metric."""
    losses = np.empty(len(names))
    for column, name in enumerate(check_objectives(names)):
        value = metrics.get(name)
        if not isinstance(value, (int, float)) or not np.isfinite(value):
            raise ObjectiveError(f"every compared trial must have the metric {name}, but got {value!r}")
        losses[column] = -value if direction(name) == "max" else value
    return losses


def to_losses(records: Sequence[TrialRecord], names: Sequence[str] = DEFAULT_OBJECTIVES) -> Losses:
    """n records -> (n, m) losses in the order of `names`, lower is better; never NaN (ObjectiveError instead)."""
    check_objectives(names)
    if not records:
        return np.empty((0, len(names)))
    return np.stack([metrics_to_losses(record.metrics, names) for record in records])
