"""Where the network is sensitive: what the least harmful plan leaves of each block, for less and less work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paretoprune.results.analysis.widths import widths_figure


@dataclass(frozen=True)
class SensitivityFigure:
    """Of each block (columns) the share of channels that stays, 0 to 1, at each share of multiply-adds kept (rows)."""

    blocks: tuple[int, ...]
    work_kept: tuple[float, ...]
    channels_kept: tuple[tuple[float, ...], ...]


def sensitivity_figure(baseline: Mapping[str, Any]) -> SensitivityFigure | None:
    """From the plans that baseline.json's `sensitivity` proposes; None where it has none, or no layers."""
    layers, plans = baseline.get("layers") or [], baseline.get("sensitivity") or []
    if not layers or not plans:
        return None
    rows = sorted(plans, key=lambda row: -row["keep"])
    figures = [widths_figure("", "", row["ratios"], layers) for row in rows]
    prunable = [index for index, block in enumerate(figures[0].blocks) if block.prunable]
    return SensitivityFigure(
        blocks=tuple(figures[0].blocks[index].block for index in prunable),
        work_kept=tuple(float(row["keep"]) for row in rows),
        channels_kept=tuple(tuple(figure.blocks[index].kept for index in prunable) for figure in figures),
    )
