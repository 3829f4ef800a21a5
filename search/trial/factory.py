"""The operations of a trial, by the run's strategy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paretoprune.base.device_gate import DeviceGate
from paretoprune.pruning.names import STRUCTURAL
from paretoprune.search.trial.operations import PruningOperations
from paretoprune.search.trial.strategy_trial import StrategyTrialOperations

if TYPE_CHECKING:
    from paretoprune.search.config.run_config import RunConfig


def make_tools(config: RunConfig, device: str, gate: DeviceGate) -> PruningOperations:
    """The tools of one worker; loads the baseline."""
    if config.trial.strategy != STRUCTURAL:
        return StrategyTrialOperations(config, device, gate)
    return PruningOperations(config, device, gate)
