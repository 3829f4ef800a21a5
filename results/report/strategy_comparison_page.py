"""How a comparison of strategies is shown: its figure, and its part of the report."""

from __future__ import annotations

from html import escape
from typing import Any

from paretoprune.base import formatting
from paretoprune.results.analysis.strategy_comparison import Comparison, ComparisonRow, SkippedGroup, skipped_groups
from paretoprune.results.report import palette
from paretoprune.results.store.accuracy import accuracy_label, accuracy_of

# One marker and one colour a strategy, in the order of the rows, so that nothing depends on colour alone.
_MARKERS = ("circle", "square", "triangle-up", "pentagon", "x", "star", "hexagon")
_COLOURS = (palette.FRONT, palette.PICK, "#009E73", "#CC79A7", palette.MUTED, palette.KNEE, palette.APART)


def groups_by_strategy(comparison: Comparison) -> dict[str, list[SkippedGroup]]:
    """Strategy -> what it skipped, by reason."""
    return {row.strategy: skipped_groups(row.skipped) for row in comparison.rows}


def figure_spec(comparison: Comparison) -> dict[str, Any]:
    """Accuracy against speed-up as a Plotly specification: a dot a strategy with its interval, the unpruned network."""
    base, label = accuracy_of(comparison.baseline) or 0.0, accuracy_label(comparison.baseline)
    traces = [_dot(row, index, base) for index, row in enumerate(comparison.rows)]
    unpruned = {
        "type": "scatter", "mode": "markers", "name": "unpruned", "x": [1.0], "y": [base],
        "marker": {"size": 13, "symbol": "diamond", "color": palette.BASELINE},
        "hovertext": [f"<b>unpruned</b><br>{label} <b>{base:.3f}</b>"], "hoverinfo": "text",
    }  # fmt: skip
    line = {"color": palette.AXIS, "width": 1, "dash": "dot"}
    shapes = [
        {"type": "line", "x0": 1, "x1": 1, "y0": 0, "y1": 1, "yref": "paper", "line": line, "layer": "below"},
        {"type": "line", "x0": 0, "x1": 1, "xref": "paper", "y0": base, "y1": base, "line": line, "layer": "below"},
    ]
    layout = {
        "xaxis": _axis("Speed-up over the unpruned network", tickformat=".2~f", ticksuffix="×"),
        "yaxis": _axis(f"{label} on the validation split", tickformat=".3~f"),
        "shapes": shapes,
        "hovermode": "closest",
        "hoverlabel": {"bgcolor": "#FFFFFF", "bordercolor": palette.AXIS, "font": {"size": 13, "color": palette.TEXT}},
        "legend": {"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top", "font": {"size": 13}},
        "margin": {"l": 64, "r": 18, "t": 18, "b": 60},
        "font": {"family": "Inter, 'Segoe UI', system-ui, -apple-system, 'Helvetica Neue', Arial, sans-serif"},
        "paper_bgcolor": "#FFFFFF",
        "plot_bgcolor": "#FFFFFF",
    }
    return {"data": [*traces, unpruned], "layout": layout}


def _dot(row: ComparisonRow, index: int, base: float) -> dict[str, Any]:
    speedup, accuracy = row.metrics["speedup"], accuracy_of(row.metrics) or 0.0
    low, high = row.metrics["speedup_ci95"]
    text = (
        f"<b>{escape(row.strategy)}</b>"
        f"<br>{accuracy_label(row.metrics)} <b>{accuracy:.3f}</b> ({formatting.signed(accuracy - base)})"
        f"<br>speed-up <b>{formatting.factor(speedup)}</b> ({formatting.interval((low, high))})"
        f"<br>{row.metrics['params_m']:.2f} M parameters<br>{row.metrics['gflops']:.2f} GFLOPs"
    )
    colour = _COLOURS[index % len(_COLOURS)]
    return {
        "type": "scatter", "mode": "markers", "name": escape(row.strategy), "x": [speedup], "y": [accuracy],
        "marker": {"size": 13, "symbol": _MARKERS[index % len(_MARKERS)], "color": colour},
        "error_x": {
            "type": "data", "symmetric": False, "array": [max(0.0, high - speedup)],
            "arrayminus": [max(0.0, speedup - low)], "thickness": 1, "width": 4, "color": colour,
        },
        "hovertext": [text], "hoverinfo": "text",
    }  # fmt: skip


def _axis(title: str, **more: Any) -> dict[str, Any]:
    return {
        "title": {"text": title, "font": {"size": 13, "color": palette.TEXT}, "standoff": 12},
        "gridcolor": palette.GRID, "zeroline": False, "linecolor": palette.AXIS, "ticks": "outside", "ticklen": 4,
        "tickcolor": palette.AXIS, "tickfont": {"size": 12, "color": palette.MUTED}, **more,
    }  # fmt: skip
