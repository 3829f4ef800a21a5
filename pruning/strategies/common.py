"""What several strategies do alike: which layers the ratios touch, what was left whole and why, one tuning."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import nn

from pruning.errors import PruningError
from pruning.layers import LayerTable
from pruning.strategies.base import Tune
from pruning.workbench import RECOVERIES


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


def check_recovery(recover: str) -> None:
    """Raise `PruningError` unless `recover` is one of `RECOVERIES`."""
    if recover not in RECOVERIES:
        raise PruningError(f"`recover` must be one of {', '.join(RECOVERIES)}, but got '{recover}'.")


def tuned(tune: Tune, model: nn.Module, epochs: int, folder: Path) -> nn.Module:
    """The network after so many epochs; without epochs it is handed back as it is."""
    return tune(model, epochs, folder) if epochs > 0 else model
