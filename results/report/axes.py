"""Ranges and tick marks shared by the interactive figure and the PNG of the front."""

from __future__ import annotations

from dataclasses import dataclass

from paretoprune.results.analysis.figures import FrontFigure

_SPEEDUPS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 15.0, 20.0)
_MIN_GAP = 0.055  # of the axis' length: closer labels would touch


@dataclass(frozen=True)
class PlaneAxes:
    """Latency range (ms) and accuracy range of the plane, with speed-up marks as (latency_ms, label)."""

    latency_ms: tuple[float, float]
    accuracy: tuple[float, float]
    speedups: tuple[tuple[float, str], ...]


def plane_axes(figure: FrontFigure) -> PlaneAxes:
    """Ranges that hold every point with a margin; accuracy never below 0 by more than the margin."""
    points = [figure.baseline, *figure.front, *figure.dominated, *figure.apart, *figure.natives]
    points += [*figure.free_moves, *figure.tuned_moves]
    points += [move.after for move in figure.picks if move.after]
    latencies = [item.latency_ms for item in points]
    accuracies = [item.accuracy for item in points]
    latency = _padded(min(latencies), max(latencies), 0.06, figure.baseline.latency_ms * 0.1)
    low, high = _padded(min(accuracies), max(accuracies), 0.07, 0.03)
    accuracy = (low, high + (high - low) * 0.05 * bool(figure.picks))  # room for the labels above the picks
    return PlaneAxes(latency, accuracy, _speedup_marks(latency, figure.baseline.latency_ms))


def label_levels(figure: FrontFigure, axes: PlaneAxes) -> tuple[int, ...]:
    """For each pick, how many lines its label is lifted so that it does not cover its neighbours' labels."""
    width, height = axes.latency_ms[1] - axes.latency_ms[0], axes.accuracy[1] - axes.accuracy[0]
    placed: list[tuple[float, float, int]] = []
    for move in figure.picks:
        where = move.after or move.before
        x, y = where.latency_ms / width, where.accuracy / height
        taken = {level for other_x, other_y, level in placed if abs(x - other_x) < 0.09 and abs(y - other_y) < 0.1}
        placed.append((x, y, min(set(range(len(placed) + 1)) - taken)))
    return tuple(level for _, _, level in placed)


def _padded(low: float, high: float, share: float, least: float) -> tuple[float, float]:
    margin = max((high - low) * share, least)
    return low - margin, high + margin


def _speedup_marks(latency_ms: tuple[float, float], base_ms: float) -> tuple[tuple[float, str], ...]:
    """Round speed-ups that fall on the axis; 1× first, then those that keep their distance from the ones taken."""
    low, high = latency_ms
    marks: list[tuple[float, str]] = []
    by_roundness = sorted(_SPEEDUPS, key=lambda speedup: (speedup != 1, speedup % 1 != 0, speedup % 0.5 != 0, speedup))
    for speedup in by_roundness:
        position = base_ms / speedup
        apart = all(abs(position - other) >= _MIN_GAP * (high - low) for other, _ in marks)
        if low <= position <= high and apart:
            marks.append((position, f"{speedup:g}×"))
    return tuple(sorted(marks))
