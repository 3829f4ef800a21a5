"""What several strategies do alike: which layers the ratios touch, what was left whole and why, one tuning."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import nn

from paretoprune.pruning.graph.layers import LayerTable
from paretoprune.pruning.graph.patterns import governing, means
from paretoprune.pruning.strategies.base import Outcome, Tune
from paretoprune.pruning.workbench import Workbench

_Run = TypeVar("_Run", bound=Callable[..., Outcome])


def touched(table: LayerTable, ratios: Mapping[str, float]) -> tuple[str, ...]:
    """Every layer, prunable or not, for which the ratios ask a cut, in the table's order.

    The ratio of a layer's group is that of the key it goes by, as in `pruning.surgery.surgery.resolve`; a layer that
    only shares its group with one that a key means is not touched.
    """
    meant = [layer.name for layer in table.layers if any(means(key, layer.name, table.by_name) for key in ratios)]
    together = {name: table.group_of[name].layers if name in table.group_of else (name,) for name in meant}
    keys = {name: governing(ratios, layers, table.by_name) for name, layers in together.items()}
    return tuple(name for name, key in keys.items() if key is not None and ratios[key] > 0)


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
    """A strategy's `run` whose own computing shares the device's gate (see `DeviceSlot`); `tuned` steps out of it."""

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
