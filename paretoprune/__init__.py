"""Structural channel pruning of YOLO models: search, pruning, measurement and report. See docs/python.md.

What is listed here is for use from other programs; it is imported when it is first asked for, so that
`import paretoprune` loads none of the heavy libraries behind it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paretoprune.base.errors import UserError
    from paretoprune.pruning.budget.budget import Budget, Cut, cut_to
    from paretoprune.pruning.evaluation.evaluator import evaluate
    from paretoprune.pruning.latency.group import measure_group
    from paretoprune.pruning.latency.pair import measure_pair
    from paretoprune.pruning.plan import Plan
    from paretoprune.pruning.surgery.layer_table import build_layer_table
    from paretoprune.pruning.workbench import Workbench
    from paretoprune.pruning.yolo.saving import save_checkpoint
    from paretoprune.results.analysis.frames import front_rows
    from paretoprune.results.analysis.layer_effect_frames import hypervolume_frame, layers_frame
    from paretoprune.results.selection.picks import pick_trials
    from paretoprune.results.selection.selection import best_under, front, knee, spread
    from paretoprune.results.selection.uncertainty import standings
    from paretoprune.results.store.bounds import Bounds
    from paretoprune.results.store.run_folder import RunFolder
    from paretoprune.search.api.measuring import Exported, export, latency
    from paretoprune.search.api.models import Pruned, estimate, layers, prune
    from paretoprune.search.api.runs import Run, report, search

__all__ = [
    "Bounds",
    "Budget",
    "Cut",
    "Exported",
    "Plan",
    "Pruned",
    "Run",
    "RunFolder",
    "UserError",
    "Workbench",
    "best_under",
    "build_layer_table",
    "cut_to",
    "estimate",
    "evaluate",
    "export",
    "front",
    "front_rows",
    "hypervolume_frame",
    "knee",
    "latency",
    "layers",
    "layers_frame",
    "measure_group",
    "measure_pair",
    "pick_trials",
    "prune",
    "report",
    "save_checkpoint",
    "search",
    "spread",
    "standings",
]

_HOMES = {
    "base.errors": ("UserError",),
    "pruning.budget.budget": ("Budget", "Cut", "cut_to"),
    "pruning.evaluation.evaluator": ("evaluate",),
    "pruning.latency.group": ("measure_group",),
    "pruning.latency.pair": ("measure_pair",),
    "pruning.plan": ("Plan",),
    "pruning.surgery.layer_table": ("build_layer_table",),
    "pruning.workbench": ("Workbench",),
    "pruning.yolo.saving": ("save_checkpoint",),
    "results.analysis.frames": ("front_rows",),
    "results.analysis.layer_effect_frames": ("hypervolume_frame", "layers_frame"),
    "results.selection.picks": ("pick_trials",),
    "results.selection.selection": ("best_under", "front", "knee", "spread"),
    "results.selection.uncertainty": ("standings",),
    "results.store.bounds": ("Bounds",),
    "results.store.run_folder": ("RunFolder",),
    "search.api.measuring": ("Exported", "export", "latency"),
    "search.api.models": ("Pruned", "estimate", "layers", "prune"),
    "search.api.runs": ("Run", "report", "search"),
}


class _Search(ModuleType):
    """The package `paretoprune.search`, which is also the function of that name."""

    def __call__(
        self,
        model: str | Path,
        data: str | Path,
        *,
        run: str | Path | None = None,
        config: str | Path | None = None,
        settings: Mapping[str, Any] | None = None,
        on_progress: Callable[[str], None] | None = None,
        **options: Any,
    ) -> Any:
        """Search a checkpoint's pruning trade-offs on a dataset; options as the command's, see docs/python.md."""
        function = importlib.import_module("paretoprune.search.api.runs").search
        return function(model, data, run=run, config=config, settings=settings, on_progress=on_progress, **options)

    def __reduce__(self) -> tuple[Any, ...]:
        """By its name, as any module crosses processes with Ray."""
        return importlib.import_module, (self.__name__,)


if not TYPE_CHECKING:  # a type checker shall see the imports above, and complain of other names
    # Python binds a package's name once it is imported, so whatever a function of that name was bound to is lost.
    importlib.import_module("paretoprune.search").__class__ = _Search

    def __getattr__(name: str) -> Any:
        for home, names in _HOMES.items():
            if name in names:
                return getattr(importlib.import_module(f"paretoprune.{home}"), name)
        raise AttributeError(f"module 'paretoprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
