"""Structural: several layers per block lose their channels, their consumers with them; recovered, then tuned once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from paretoprune.pruning.strategies.base import Outcome, Tune
from paretoprune.pruning.strategies.common import in_turn, left_whole, tuned
from paretoprune.pruning.workbench import Workbench
from paretoprune.pruning.yolo.saving import plain_copy


class Structural:
    """What `Workbench.prune` gives, recovered and tuned in one session."""

    name = "structural"
    exact = True

    @in_turn
    def run(
        self,
        bench: Workbench,
        ratios: Mapping[str, float],
        epochs: int,
        folder: Path,
        tune: Tune,
        recover: str = "refit",
    ) -> Outcome:
        """See `Strategy.run`."""
        model, plan = bench.prune(ratios)
        bench.recover(model, plan, recover)
        model = tuned(bench, tune, model, epochs, folder / "tune")
        skipped = left_whole(bench.table, ratios, plan.ratios)
        return Outcome(self.name, plain_copy(model), plan, tuple(plan.ratios), skipped, epochs)
