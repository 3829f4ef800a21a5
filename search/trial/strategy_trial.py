"""What a trial does when its run has another strategy than the structural one (``trial.strategy``).

The strategy is run twice: without epochs, for the network that is measured and evaluated before any training, and with
the trial's epochs, where that network would have been fine-tuned. Between the sessions of a sequence there is no
network with all its channels gone, so a sequence cannot simply continue from the first one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretoprune.base.device_gate import DeviceGate
from paretoprune.pruning.names import SEQUENTIAL
from paretoprune.results.store.accuracy import accuracy_of
from paretoprune.search.trial.context import OnEpoch, PlanLike, Tuned
from paretoprune.search.trial.operations import PruningOperations, Say

if TYPE_CHECKING:
    from paretoprune.pruning.plan import Plan
    from paretoprune.search.config.run_config import RunConfig

STRATEGY_FOLDER = "strategy"
"""In a trial's folder: the sessions of a sequence, with which an interrupted trial goes on, and training logs."""


class StrategyTrialOperations(PruningOperations):
    """A trial's tools around one of ``pruning.strategies``."""

    def __init__(self, config: RunConfig, device: str, gate: DeviceGate) -> None:
        from paretoprune.pruning.strategies import get_strategy

        super().__init__(config, device, gate)
        self._strategy = get_strategy(config.trial.strategy)
        self._asked: dict[str, float] = {}

    def prune(self, plan: Plan) -> tuple[Any, PlanLike]:
        """The strategy's network without an epoch, recovered already, and the plan that it realised."""
        self._asked = dict(plan.ratios)
        self._score()
        with tempfile.TemporaryDirectory(prefix="paretoprune-untuned-") as scratch:
            outcome = self._run(0, Path(scratch), lambda network, epochs, place: network)
        return outcome.model, replace(outcome.plan, imgsz=plan.imgsz, precision=plan.precision)

    def recover(self, model: Any, plan: Any) -> None:
        """Nothing: strategies recover by themselves, a sequence after each of its cuts."""

    def stats(self, model: Any) -> dict[str, Any]:
        """Size and cost, and which strategy the network is of."""
        return {**super().stats(model), "strategy": self._strategy.name}

    def describe(self, say: Say) -> dict[str, Any]:
        """What holds for the whole run; without the geometry where widths do not follow from ratios.

        Latency is predicted from it, and an adapter's mappings or layers that were skipped are not in it.
        """
        content = super().describe(say)
        return content if self._strategy.name == SEQUENTIAL else {k: v for k, v in content.items() if k != "geometry"}

    def finetune(self, model: Any, folder: Path, on_epoch: OnEpoch | None, start: Mapping[str, float]) -> Tuned:
        """The strategy from the baseline on, with the trial's epochs; never worse than ``model``, its start.

        ``on_epoch`` hears of the last session only: before it the network has more channels than the plan leaves, and
        must not be compared with others. Sessions that an earlier attempt finished are not done again.
        """
        from paretoprune.pruning.strategies.session_file import finished_epochs

        total, place = self._config.trial.epochs, folder / STRATEGY_FOLDER
        place.mkdir(parents=True, exist_ok=True)
        spent, best_epoch, precision = finished_epochs(place), 0, ""

        def tune(network: Any, epochs: int, where: Path) -> Any:
            nonlocal spent, best_epoch, precision
            before, last = spent, spent + epochs >= total

            def heard(epoch: int, metrics: Mapping[str, float]) -> bool:
                return last and on_epoch is not None and on_epoch(before + epoch, metrics)

            where.mkdir(parents=True, exist_ok=True)
            section = self._config.trial.model_copy(update={"epochs": epochs})
            tuned = self._tune(network, where, heard, section, patience=0)
            spent, best_epoch, precision = before + tuned.epochs, before + tuned.best_epoch, tuned.precision
            return tuned.model

        outcome = self._run(total, place, tune)
        metrics = self.evaluate(outcome.model)
        if (accuracy_of(metrics) or 0.0) < (accuracy_of(start) or 0.0):
            return Tuned(model, spent, 0, start, start, precision=precision)
        return Tuned(outcome.model, spent, best_epoch, start, metrics, precision=precision)

    def _run(self, epochs: int, folder: Path, tune: Any) -> Any:
        return self._strategy.run(self._bench, self._asked, epochs, folder, tune, self._config.recover.method)
