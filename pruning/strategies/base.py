"""The contract of the strategies: one baseline, one set of ratios and one epoch budget in, one stock network out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import nn

from paretoprune.pruning.plan import Plan
from paretoprune.pruning.workbench import Workbench

Tune = Callable[[nn.Module, int, Path], nn.Module]
"""(network, epochs, folder) -> the best fine-tuned network, stock classes, same widths; 0 epochs: the network as it is.

The folder is the tuning's own: it makes it and may write its log there.
"""


@dataclass(frozen=True)
class Outcome:
    """What a strategy made of the baseline.

    Attributes:
        strategy: its name.
        model: stock classes only, float32, on the CPU, eval mode; `save_checkpoint` takes it as it is.
        plan: realised ratios and kept indices. `mask`: the ratios that were zeroed, kept are the channels that were
            not. `adapter`: the channels that were removed behind its mappings.
        layers: the layers that lost (or masked) channels.
        skipped: (layer, reason) of every layer that the ratios touch and that was left whole.
        epochs: fine-tuning epochs that this result took, those of sessions before an interruption included.
        sessions: intermediate checkpoints, in order (`sequential`).
        notes: what else there is to say: a number with its unit in the name, or a line for people.
    """

    strategy: str
    model: nn.Module
    plan: Plan
    layers: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    epochs: int
    sessions: tuple[Path, ...] = ()
    notes: Mapping[str, float | str] = field(default_factory=dict)


class Strategy(Protocol):
    """One way to a narrower (or supposedly narrower) network.

    A strategy never changes `bench.model`. It spends `epochs` in total and no more, all through `tune`, which it calls
    with folders below `folder`; 0 epochs are allowed and mean no call. It recovers by `bench.recover` before it tunes.
    What it computes itself it computes within `bench.turn`, and tunes outside it.

    `folder` also holds what a strategy needs to go on after an interruption: an exception raised by `tune`, or the
    end of the process, costs at most the session under way. The same call again goes on there. Strategies of one
    session start anew.

    Raises (all strategies): PlanError for ratios that do not fit the model, PruningError for an unknown recovery.
    """

    name: str
    exact: bool
    """Whether its network, before recovery, computes what the baseline computes with the removed channels masked."""

    def run(
        self,
        bench: Workbench,
        ratios: Mapping[str, float],
        epochs: int,
        folder: Path,
        tune: Tune,
        recover: str = "refit",
    ) -> Outcome:
        """Apply `ratios` (by layer name or pattern, as `Workbench.prune` takes them) to the bench's baseline."""
        ...
