"""What several strategies do alike: which layers the ratios touch, what was left whole and why, one tuning."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import nn

from pruning.layers import LayerTable
from pruning.strategies.base import Outcome, Tune
from pruning.workbench import Workbench

_Run = TypeVar("_Run", bound=Callable[..., Outcome])


def touched(table: LayerTable, ratios: Mapping[str, float]) -> tuple[str, ...]:
    """Every layer, prunable or not, for which the ratios ask a cut, in the table's order.

    As in `pruning.surgery.resolve` a name wins over a pattern and a later pattern over an earlier one; a layer that
    only shares its group with a named one is not touched.
    """
    asked: dict[str, float] = {}
    for key, ratio in ratios.items():
        if key not in table.by_name:
            asked.update(dict.fromkeys((n for n in table.by_name if fnmatch.fnmatchcase(n, key)), ratio))
    asked.update({key: ratio for key, ratio in ratios.items() if key in table.by_name})
    return tuple(layer.name for layer in table.layers if asked.get(layer.name, 0) > 0)


def left_whole(
    table: LayerTable, ratios: Mapping[str, float], cut: Collection[str], why: Mapping[str, str] | None = None
) -> tuple[tuple[str, str], ...]:
    """(layer, reason) of every touched layer that was not cut; `why` names the strategy's own reasons."""
    whole = (table.by_name[name] for name in touched(table, ratios) if name not in cut)
    reasons = why or {}
    return tuple((x.name, x.reason or reasons.get(x.name) or _no_nearer_width(x.out_channels)) for x in whole)


def _no_nearer_width(channels: int) -> str:
    return f"of its allowed widths the whole one ({channels}) is nearest to what the ratio asks"


def conv_of(table: LayerTable) -> dict[str, str]:
    """Layer name -> the name of its convolution in the model, for the layers a forward pass reaches."""
    return {table.layer_of[conv]: conv for conv in table.convs}


def in_turn(run: _Run) -> _Run:
    """A strategy's `run` whose own computing shares the device's gate (see `Turn`); `tuned` steps out of it."""

    @wraps(run)
    def held(self: object, bench: Workbench, *given: Any, **named: Any) -> Outcome:
        with bench.turn:
            return run(self, bench, *given, **named)

    return cast(_Run, held)


def tuned(bench: Workbench, tune: Tune, model: nn.Module, epochs: int, folder: Path) -> nn.Module:
    """The network after so many epochs; without epochs it is handed back as it is."""
    if epochs <= 0:
        return model
    with bench.turn.left():
        return tune(model, epochs, folder)
