"""Settings that older versions called otherwise: their files, commands and scripts are read under today's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RENAMED = {
    "data.batch": "data.val_batch",
    "recover.how": "recover.method",
    "resources.parallel": "resources.max_concurrent_trials",
    "resources.shared_run": "resources.shared_storage",
    "search.from_run": "search.warm_start_run",
    "search.gpu_hours": "search.max_gpu_hours",
    "search.hours": "search.max_hours",
    "search.plans": "search.initial_plans",
    "search.reduction": "search.reduction_factor",
    "search.stopping": "search.early_stopping",
    "space.bounds": "space.layer_bounds",
}


def with_present_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings (section -> name -> value) under today's names.

    A name of both kinds is left as it is, so that whoever validates the settings refuses the old one.
    """
    found = {section: dict(part) if isinstance(part, Mapping) else part for section, part in settings.items()}
    for old, new in RENAMED.items():
        section, name = old.split(".")
        part, present = found.get(section), new.split(".")[1]
        if isinstance(part, dict) and name in part and present not in part:
            found[section] = {present if key == name else key: value for key, value in part.items()}
    return found
