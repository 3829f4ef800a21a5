"""Paths in the settings, made such that a run can be resumed from any working directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def resolve_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings with the paths of the model, the dataset and the teacher made absolute where they exist.

    A run must be resumable from any working directory.
    """
    resolved = dict(values)
    search = resolved.get("search")
    if isinstance(search, Mapping):
        plans = [absolute_path(plan) for plan in search.get("initial_plans") or []]
        other = {"warm_start_run": absolute_path(search["warm_start_run"])} if search.get("warm_start_run") else {}
        resolved["search"] = {**search, **({"initial_plans": plans} if plans else {}), **other}
    for section, name in (("model", "path"), ("data", "path"), ("finetune", "teacher")):
        content = resolved.get(section)
        if isinstance(content, Mapping) and isinstance(content.get(name), (str, Path)):
            resolved[section] = {**content, name: absolute_path(content[name])}
    return resolved


def absolute_path(given: object) -> str:
    """A path that exists made absolute; anything else as it is. A link stays one: a dataset may lie around it."""
    path = Path(str(given)).expanduser()
    return str(path.parent.resolve() / path.name if path.name else path.resolve()) if path.exists() else str(given)
