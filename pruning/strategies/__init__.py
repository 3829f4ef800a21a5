"""The ways out of the channel-mismatch problem, behind one contract (see `base.Strategy`)."""

from __future__ import annotations

from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.strategies.adapter import Adapter
from paretoprune.pruning.strategies.base import Outcome, Strategy, Tune
from paretoprune.pruning.strategies.mask import Mask
from paretoprune.pruning.strategies.sequential import Sequential
from paretoprune.pruning.strategies.skip import Skip
from paretoprune.pruning.strategies.structural import Structural

STRATEGIES: dict[str, Strategy] = {s.name: s for s in (Structural(), Sequential(), Adapter(), Skip(), Mask())}

__all__ = ["STRATEGIES", "Outcome", "Strategy", "Tune", "get_strategy"]


def get_strategy(name: str) -> Strategy:
    """The strategy of this name. Raises PruningError with the known names."""
    if name not in STRATEGIES:
        raise PruningError(f"a strategy must be one of {', '.join(STRATEGIES)}, but got '{name}'.")
    return STRATEGIES[name]
