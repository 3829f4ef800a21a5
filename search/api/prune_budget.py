"""Pruning to a budget: what is asked for, and how it is reached."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from paretoprune.base.messages import Listener, note
from paretoprune.search.api.prune_estimate import Measured, by_measuring, from_run, latency_row
from paretoprune.search.errors import ArgumentError

if TYPE_CHECKING:
    from paretoprune.pruning.budget.budget import Budget, Cut

PLANS = 12  # timed for --speedup where nobody says how many: about a minute
_LATENCY_FALLS = 2.0  # a network S times as fast has hardly ever less than S^-2 of the multiply-adds, see _timed


@dataclass(frozen=True)
class Goal:
    """The target of a cut: a share in (0, 1] of the multiply-adds or parameters; or how many times as fast, above 1."""

    of: Literal["macs", "params", "speedup"]
    value: float

    def __str__(self) -> str:
        if self.of == "speedup":
            return f"at least {self.value:g} times as fast, predicted"
        return f"at most {self.value:g} of the {'multiply-adds' if self.of == 'macs' else 'parameters'}"


def goal_of(keep_macs: float | None, keep_params: float | None, speedup: float | None) -> Goal | None:
    """The one that was given; :class:`ArgumentError` where it is out of range."""
    for name, of, value in (("keep_macs", "macs", keep_macs), ("keep_params", "params", keep_params)):
        if value is not None:
            if not 0 < value <= 1:
                raise ArgumentError(f"`{name}` is the share that stays, in (0, 1], got {value:g}")
            return Goal(of, value)  # type: ignore[arg-type]
    if speedup is None:
        return None
    if not (math.isfinite(speedup) and speedup > 1):
        raise ArgumentError(f"`speedup` says how many times as fast, above 1, got {speedup:g}")
    return Goal("speedup", speedup)


def cut_to_goal(
    bench: Any, goal: Goal, recover: str, measure: int | None, run: Path | None, device: str, say: Listener
) -> tuple[Cut, Measured | None]:
    """The network of ``goal`` from a :class:`pruning.workbench.Workbench`, and the timed plans that predict its speed.

    ``say`` is told what is done.
    """
    from paretoprune.pruning.budget.budget import Budget, cut_to

    say(f"reading {bench.calibration_images} calibration images of {bench.data}")
    for remark in bench.shortcomings():
        note(remark)
    measured, budget = None, None
    if goal.of == "speedup":
        say("scoring channels")
        measured = from_run(run, bench.geometry) if run is not None else _timed(bench, goal, measure, device, say)
        budget = _predicted(bench, goal, measured)
    return cut_to(bench, budget or Budget(goal.value, goal.of), recover, say), measured  # type: ignore[arg-type]


def _timed(bench: Any, goal: Goal, measure: int | None, device: str, say: Listener) -> Measured:
    """Plans timed now: from hardly cut to somewhat beyond what the goal may take.

    Latency falls more slowly than multiply-adds do, so their share at the goal is not known before; the heaviest of the
    plans has to be beyond it, or the model would be asked outside of what was measured.
    """
    from paretoprune.pruning.budget.budget import Budget, ratios_within
    from paretoprune.pruning.importance.allocation import narrowest, share_left

    least = share_left(bench.table, bench.conv_costs, narrowest(bench.table, bench.round_to)) * (1 + 1e-9)
    heavy = ratios_within(bench, Budget(min(1.0, max(least, goal.value**-_LATENCY_FALLS))))
    return by_measuring(bench, heavy, measure or PLANS, device, say)


def _predicted(bench: Any, goal: Goal, measured: Measured) -> Budget:
    from paretoprune.pruning.budget.budget import budget_for_speedup
    from paretoprune.pruning.latency.model import fit_latency_model

    model = fit_latency_model(bench.geometry, measured.plans)
    budget = budget_for_speedup(bench, model, goal.value)
    note(f"{budget.share:.1%} of the multiply-adds are predicted to run {goal.value:g} times as fast ({model.error})")
    return budget


def prediction_row(bench: Any, cut: Cut, measured: Measured | None) -> dict[str, Any]:
    """The speed of the cut network, as the latency model of the timed plans predicts it; nothing without them."""
    if measured is None:
        return {}
    row = latency_row(bench.geometry, cut.plan, measured)
    low, high = row["latency_ratio_ci95"]
    return {
        "predicted_speedup": row["speedup"],
        "predicted_speedup_pi95": [1 / high, 1 / low],
        "prediction_source": row["latency_source"],
    }
