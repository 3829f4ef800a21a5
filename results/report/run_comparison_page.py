"""The page of several runs laid over each other."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from paretoprune.base.atomic import write_text
from paretoprune.results.analysis.figures import Point
from paretoprune.results.analysis.run_comparison import Overlay, RunLine, overlay
from paretoprune.results.report import palette
from paretoprune.results.report.plotly_figures import FONT, Spec, axis, hover, hypervolume_layout
from paretoprune.results.report.report import render_page

NAME = "runs.html"
_MARKERS = ("circle", "square", "triangle-up", "pentagon", "cross", "triangle-down", "hexagon")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "solid")


def write_overlay(paths: Sequence[str | Path], target: Path | None = None) -> Path:
    """Write the page to `target` (`runs.html` in the first run's folder) and return its path; see `overlay`."""
    found = overlay(paths)
    specs = {"runs": runs_spec(found), "hypervolume": curves_spec(found)}
    page = render_page("runs.html.j2", specs, overlay=found)
    return write_text(target or Path(paths[0]) / NAME, page)


def runs_spec(found: Overlay) -> Spec:
    """Every run's front as a staircase with its markers, its finished picks as stars, its baseline as a diamond with
    its free moves as a thin line from it."""
    traces = [trace for index, run in enumerate(found.runs) for trace in _traces(run, index)]
    label = found.runs[0].figure.baseline.accuracy_label
    return {
        "data": traces,
        "layout": {
            "xaxis": axis("Latency (ms per inference)"),
            "yaxis": axis(f"{label} on the validation split", tickformat=".3~f"),
            "hovermode": "closest",
            "hoverlabel": {"bgcolor": "#FFFFFF", "bordercolor": palette.AXIS, "font": {"size": 13}, "align": "left"},
            "legend": {"orientation": "h", "x": 0, "y": -0.14, "yanchor": "top", "font": {"size": 12}},
            "margin": {"l": 64, "r": 18, "t": 18, "b": 60},
            "font": FONT,
            "paper_bgcolor": "#FFFFFF",
            "plot_bgcolor": "#FFFFFF",
        },
    }


def _traces(run: RunLine, index: int) -> list[Spec]:
    colour, name = palette.OTHER_RUNS[index], escape(run.name)
    figure, shared = run.figure, {"legendgroup": str(index), "type": "scatter"}
    line = {
        **shared, "mode": "lines", "name": name, "showlegend": False, "hoverinfo": "skip", "opacity": 0.55,
        "x": [latency for latency, _ in figure.line], "y": [accuracy for _, accuracy in figure.line],
        "line": {"color": colour, "width": 1.6, "shape": "hv", "dash": _DASHES[index]},
    }  # fmt: skip
    edge = {"width": 1, "color": "#FFFFFF"}
    front = {"size": 10, "symbol": _MARKERS[index], "color": colour, "line": edge}
    stars = {"size": 16, "symbol": "star", "color": colour, "line": edge}
    base = {"size": 13, "symbol": "diamond", "color": colour, "line": edge}
    free = {"size": 7, "symbol": "triangle-down", "color": colour, "line": edge}
    dotted = {"mode": "lines+markers", "line": {"color": colour, "width": 1, "dash": "dot"}, "opacity": 0.7}
    moves = [
        {**shared, "name": f"{name}: {title.lower()}", **_points(run, items, "free move"), **dotted}
        for title, items in figure.free_lines.items()
    ]
    return [
        line,
        *({**trace, "marker": free} for trace in moves),
        {**shared, "name": f"{name}: front", **_points(run, figure.front, "on the front"), "marker": front},
        {**shared, "name": f"{name}: fully fine-tuned", **_points(run, run.finished, "pick"), "marker": stars},
        {**shared, "name": f"{name}: unpruned", **_points(run, [figure.baseline], "unpruned"), "marker": base},
    ]


def _points(run: RunLine, items: Sequence[Point], heading: str) -> dict[str, Any]:
    return {
        "mode": "markers",
        "showlegend": bool(items),
        "x": [round(item.latency_ms, 5) for item in items],
        "y": [round(item.accuracy, 5) for item in items],
        "hovertext": [hover(item, f"{heading} of {run.name}", run.figure) for item in items],
        "hoverinfo": "text",
    }


def curves_spec(found: Overlay) -> Spec:
    """Hypervolume over trials, a line a run, each against its own baseline's box."""
    data = [
        {
            "type": "scatter", "mode": "lines", "name": escape(run.name), "x": list(run.curve.trials),
            "y": [round(100 * share, 3) for share in run.curve.shares],
            "line": {"color": palette.OTHER_RUNS[index], "width": 2, "shape": "hv", "dash": _DASHES[index]},
            "hovertemplate": "after %{x} trials: %{y:.1f} %",
        }
        for index, run in enumerate(found.runs)
    ]  # fmt: skip
    return {"data": data, "layout": {**hypervolume_layout(), "showlegend": True}}
