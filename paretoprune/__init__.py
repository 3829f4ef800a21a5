"""Structural channel pruning of YOLO models: search, pruning, measurement and report. See docs/python.md.

What is listed here is for use from other programs; it is imported when it is first asked for, so that
`import paretoprune` loads none of the heavy libraries behind it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paretoprune.base.errors import UserError
    from paretoprune.pruning.budget.budget import Budget, Cut, cut_to
    from paretoprune.pruning.evaluation.evaluator import evaluate
    from paretoprune.pruning.export.check import check_export, measure_export
    from paretoprune.pruning.export.exporter import export_model
    from paretoprune.pruning.latency.group import measure_group
    from paretoprune.pruning.latency.pair import measure_pair
    from paretoprune.pruning.plan import Plan
    from paretoprune.pruning.surgery.layer_table import build_layer_table
    from paretoprune.pruning.workbench import Workbench
    from paretoprune.pruning.yolo.saving import save_checkpoint
    from paretoprune.results.analysis.frames import front_frame, front_rows, trials_frame
    from paretoprune.results.analysis.layer_effect_frames import hypervolume_frame, layers_frame
    from paretoprune.results.report.report import write_report
    from paretoprune.results.report.run_comparison_page import write_overlay
    from paretoprune.results.selection.picks import pick_trials
    from paretoprune.results.selection.selection import best_under, front, knee, spread
    from paretoprune.results.selection.uncertainty import standings
    from paretoprune.results.store.bounds import Bounds
    from paretoprune.results.store.run_folder import RunFolder
    from paretoprune.search.config.run_config import RunConfig, build_config, load_config, nest
    from paretoprune.search.finalists.finetune_picks import choose_picks, promote
    from paretoprune.search.sweep.preflight import prepare
    from paretoprune.search.sweep.sweep import run_sweep

__all__ = [
    "Bounds",
    "Budget",
    "Cut",
    "Plan",
    "RunConfig",
    "RunFolder",
    "UserError",
    "Workbench",
    "best_under",
    "build_config",
    "build_layer_table",
    "check_export",
    "choose_picks",
    "cut_to",
    "evaluate",
    "export_model",
    "front",
    "front_frame",
    "front_rows",
    "hypervolume_frame",
    "knee",
    "layers_frame",
    "load_config",
    "measure_export",
    "measure_group",
    "measure_pair",
    "nest",
    "pick_trials",
    "prepare",
    "promote",
    "run_sweep",
    "save_checkpoint",
    "spread",
    "standings",
    "trials_frame",
    "write_overlay",
    "write_report",
]

_HOMES = {
    "base.errors": ("UserError",),
    "pruning.budget.budget": ("Budget", "Cut", "cut_to"),
    "pruning.evaluation.evaluator": ("evaluate",),
    "pruning.export.check": ("check_export", "measure_export"),
    "pruning.export.exporter": ("export_model",),
    "pruning.latency.group": ("measure_group",),
    "pruning.latency.pair": ("measure_pair",),
    "pruning.plan": ("Plan",),
    "pruning.surgery.layer_table": ("build_layer_table",),
    "pruning.workbench": ("Workbench",),
    "pruning.yolo.saving": ("save_checkpoint",),
    "results.analysis.frames": ("front_frame", "front_rows", "trials_frame"),
    "results.analysis.layer_effect_frames": ("hypervolume_frame", "layers_frame"),
    "results.report.report": ("write_report",),
    "results.report.run_comparison_page": ("write_overlay",),
    "results.selection.picks": ("pick_trials",),
    "results.selection.selection": ("best_under", "front", "knee", "spread"),
    "results.selection.uncertainty": ("standings",),
    "results.store.bounds": ("Bounds",),
    "results.store.run_folder": ("RunFolder",),
    "search.config.run_config": ("RunConfig", "build_config", "load_config", "nest"),
    "search.finalists.finetune_picks": ("choose_picks", "promote"),
    "search.sweep.preflight": ("prepare",),
    "search.sweep.sweep": ("run_sweep",),
}


if not TYPE_CHECKING:  # a type checker shall see the imports above, and complain of other names

    def __getattr__(name: str) -> Any:
        for home, names in _HOMES.items():
            if name in names:
                return getattr(importlib.import_module(f"paretoprune.{home}"), name)
        raise AttributeError(f"module 'paretoprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
