"""Which channels went where: a network's widths before and after, by layer and by block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any


@dataclass(frozen=True)
class LayerWidth:
    """One layer's output channels; reason says why a layer cannot be pruned ("" where it can)."""

    layer: str
    block: int
    before: int
    after: int
    reason: str


@dataclass(frozen=True)
class BlockWidth:
    """The mean width (output channels) of a block's layers. prunable: at least one of its layers is."""

    block: int
    before: float
    after: float
    prunable: bool

    @property
    def kept(self) -> float:
        """Share of the channels that stayed, 0 to 1."""
        return self.after / self.before if self.before else 1.0


@dataclass(frozen=True)
class WidthsFigure:
    """The widths of one pick."""

    trial_id: str
    chosen_as: str
    blocks: tuple[BlockWidth, ...]
    layers: tuple[LayerWidth, ...]

    @property
    def kept(self) -> float:
        """Share of all listed channels that stayed, 0 to 1."""
        before = sum(layer.before for layer in self.layers)
        return sum(layer.after for layer in self.layers) / before if before else 1.0


def widths_figure(
    trial_id: str, chosen_as: str, ratios: Mapping[str, float], layers: Iterable[Mapping[str, Any]]
) -> WidthsFigure:
    """From a record's ratios and baseline.json's layers (layer, block, group, out_channels, prunable, reason).

    Layers of one group share their cut, so a ratio given for any of them holds for all.
    """
    rows = list(layers)
    by_group = {row["group"]: ratios[row["layer"]] for row in rows if row["layer"] in ratios and row["prunable"]}
    widths = []
    for row in rows:
        ratio = ratios.get(row["layer"], by_group.get(row["group"], 0.0) if row["prunable"] else 0.0)
        after = round(row["out_channels"] * (1 - ratio))
        reason = "" if row["prunable"] else str(row.get("reason") or "not prunable")
        widths.append(LayerWidth(str(row["layer"]), int(row["block"]), int(row["out_channels"]), after, reason))
    return WidthsFigure(trial_id, chosen_as, _by_block(widths), tuple(widths))


def _by_block(widths: Iterable[LayerWidth]) -> tuple[BlockWidth, ...]:
    blocks: dict[int, list[LayerWidth]] = {}
    for width in widths:
        blocks.setdefault(width.block, []).append(width)
    return tuple(
        BlockWidth(
            number,
            mean(item.before for item in items),
            mean(item.after for item in items),
            any(not item.reason for item in items),
        )
        for number, items in sorted(blocks.items())
    )
