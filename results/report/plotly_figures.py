"""The interactive figures as Plotly specifications (plain mappings); no logic beyond placing what was computed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from paretoprune.base import formatting
from paretoprune.results.analysis.figures import FrontFigure, HypervolumeCurve, PickMove, Point
from paretoprune.results.analysis.sensitivity import SensitivityFigure
from paretoprune.results.analysis.trial_outcomes import Course
from paretoprune.results.report import palette
from paretoprune.results.report.axes import PlaneAxes, label_levels, plane_axes
from paretoprune.results.store.objectives import title
from paretoprune.results.store.records import BEYOND_BOUNDS

Spec = dict[str, Any]
FONT = {"family": "Inter, 'Segoe UI', system-ui, -apple-system, 'Helvetica Neue', Arial, sans-serif"}


def script_json(content: Any) -> str:
    """JSON that may stand inside a <script> element: no text of the user can close it or open another one."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def hover(item: Point, heading: str, figure: FrontFigure, note: str = "") -> str:
    """The hover label of a point in ``figure``. Plotly reads a little HTML in it, so names are escaped."""
    baseline, change = figure.baseline, item.accuracy - figure.baseline_of(item).accuracy
    lines = [
        f"<b>{escape(item.name)}</b>  {escape(heading)}",
        f"{item.accuracy_label}  <b>{item.accuracy:.3f}</b>  ({formatting.signed(change)})",
        f"latency  <b>{formatting.milliseconds(item.latency_ms)}</b>" + ("  (predicted)" if item.foretold else ""),
    ]
    if item is not baseline:
        interval = formatting.interval(item.speedup_ci95 or item.speedup_pi95)
        which = "predicted, 95 %" if item.foretold else "95 %"
        around = f"  ({which} {interval})" if interval else ""
        lines.append(f"speed-up  <b>{formatting.factor(item.speedup)}</b>{around}")
    if item.params_m is not None:
        lines.append(f"{item.params_m:.2f} M parameters  ({formatting.change(item.params_m, baseline.params_m)})")
    if item.gflops is not None:
        lines.append(f"{item.gflops:.2f} GFLOPs  ({formatting.change(item.gflops, baseline.gflops)})")
    measured = ((title(name), item.others.get(name)) for name in figure.others)
    lines += [f"{escape(label)}  {formatting.plain(value)}" for label, value in measured if value is not None]
    if item.name in figure.beaten and not note:
        lines.append(f"beaten by {figure.beaten[item.name]}, a free move")
    lines.append(f"<i>{escape(note or item.fidelity)}</i>")
    return "<br>".join(lines)


def _points(name: str, items: Sequence[Point], texts: Sequence[str], marker: Spec, **more: Any) -> Spec:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [round(item.latency_ms, 5) for item in items],
        "y": [round(item.accuracy, 5) for item in items],
        "hovertext": list(texts),
        "hoverinfo": "text",
        "marker": marker,
        **more,
    }


def front_spec(figure: FrontFigure, subtitle: str) -> Spec:
    """The accuracy/latency plane: everything of `figure`, the x axis also marked in speed-ups."""
    axes = plane_axes(figure)
    traces = [*_cloud(figure), *_free_moves(figure), *_front(figure), *_marks(figure)]
    arrows = [_arrow(move) for move in figure.picks if move.after]
    y_title = f"{figure.baseline.accuracy_label} on the validation split"
    labels = [_label(move, level) for move, level in zip(figure.picks, label_levels(figure, axes), strict=True)]
    return {"data": [_scale_holder(axes), *traces], "layout": _layout(axes, subtitle, y_title, arrows + labels)}


def _scale_holder(axes: PlaneAxes) -> Spec:
    """Plotly draws a second x axis only where a trace uses it; this one shows nothing."""
    latency = axes.latency_ms[0]
    accuracy = axes.accuracy[0]
    return {
        "type": "scatter", "x": [latency], "y": [accuracy], "xaxis": "x2", "opacity": 0, "showlegend": False,
        "hoverinfo": "skip", "mode": "markers",
    }  # fmt: skip


def _cloud(figure: FrontFigure) -> list[Spec]:
    """The trials that are not on the front, hidden behind the rest."""
    traces = []
    if figure.dominated:
        texts = [hover(item, "dominated", figure) for item in figure.dominated]
        size = 7 if len(figure.dominated) < 500 else 5
        marker = {"size": size, "color": palette.DOMINATED, "opacity": 0.6 if size == 7 else 0.4}
        traces.append(_points(f"Trial ({figure.fidelity})", figure.dominated, texts, marker))
    if figure.apart:
        texts = [
            hover(item, item.why_not_comparable, figure, f"{item.fidelity}, not compared") for item in figure.apart
        ]
        marker = {"size": 8, "symbol": "x-thin", "line": {"width": 1.4, "color": palette.APART}}
        traces.append(_points(figure.apart_label, figure.apart, texts, marker))
    return traces


def _free_moves(figure: FrontFigure) -> list[Spec]:
    """The unpruned model at smaller inputs, a line for each precision, the run's own joined to the baseline."""
    marker = {
        "size": 9,
        "symbol": "triangle-down",
        "color": palette.FREE_MOVE,
        "line": {"width": 1, "color": "#FFFFFF"},
    }
    line = {"color": palette.FREE_MOVE, "width": 1.6, "dash": "dot"}
    traces = []
    for name, items in figure.free_lines.items():
        texts = [hover(item, item.fidelity, figure, "free move: no pruning, no training") for item in items]
        look = {"mode": "lines+markers", "line": line, "error_x": _error_x(items)}
        traces.append(_points(name, items, texts, marker, **look))
    return traces


def _front(figure: FrontFigure) -> list[Spec]:
    """The attained staircase and the front's trials with the speed-up's interval."""
    if not figure.front:
        return []
    line = {
        "type": "scatter",
        "mode": "lines",
        "name": "front line",
        "x": [latency for latency, _ in figure.line],
        "y": [accuracy for _, accuracy in figure.line],
        "line": {"color": palette.FRONT, "width": 1.6, "shape": "hv"},
        "opacity": 0.55,
        "hoverinfo": "skip",
        "showlegend": False,
        "legendgroup": "front",
    }
    texts = [hover(item, "on the front", figure) for item in figure.front]
    marker = {"size": 10, "color": palette.FRONT, "line": {"width": 1.2, "color": "#FFFFFF"}}
    members = _points(
        f"Front ({figure.fidelity})", figure.front, texts, marker, legendgroup="front", error_x=_error_x(figure.front)
    )
    return [line, members]


def _error_x(items: Sequence[Point]) -> Spec:
    intervals = [item.latency_interval_ms or (item.latency_ms, item.latency_ms) for item in items]
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(high - item.latency_ms, 0.0) for item, (_, high) in zip(items, intervals, strict=True)],
        "arrayminus": [max(item.latency_ms - low, 0.0) for item, (low, _) in zip(items, intervals, strict=True)],
        "thickness": 1,
        "width": 0,
    }


def _marks(figure: FrontFigure) -> list[Spec]:
    """Knee, picks and baseline, in front of the rest."""
    traces = []
    if figure.knee:
        marker = {"size": 19, "symbol": "circle-open", "color": palette.KNEE, "line": {"width": 2.6}}
        text = hover(figure.knee, "knee of the front", figure)
        traces.append(_points("Knee", [figure.knee], [text], marker))
    waiting = [move for move in figure.picks if not move.after]
    if waiting:
        texts = [hover(move.before, "suggested pick", figure, _why(move, figure)) for move in waiting]
        marker = {"size": 14, "symbol": "star-open", "color": palette.PICK, "line": {"width": 1.8}}
        traces.append(_points("Suggested pick", [move.before for move in waiting], texts, marker))
    pairs = [(move, move.after) for move in figure.picks if move.after]
    if pairs:
        texts = [hover(after, "after full fine-tuning", figure, _why(move, figure)) for move, after in pairs]
        marker = {"size": 16, "symbol": "star", "color": palette.PICK, "line": {"width": 1, "color": "#FFFFFF"}}
        finished = [after for _, after in pairs]
        traces.append(_points("Pick after full fine-tuning", finished, texts, marker, error_x=_error_x(finished)))
    if figure.natives:
        texts = [hover(item, "native model", figure) for item in figure.natives]
        marker = {"size": 13, "symbol": "square", "color": palette.NATIVE, "line": {"width": 1, "color": "#FFFFFF"}}
        traces.append(_points("Native model", figure.natives, texts, marker, error_x=_error_x(figure.natives)))
    if figure.tuned_moves:
        texts = [hover(item, item.fidelity, figure) for item in figure.tuned_moves]
        edge = {"width": 1, "color": "#FFFFFF"}
        marker = {"size": 15, "symbol": "triangle-down", "color": palette.FREE_MOVE, "line": edge}
        name, error = "Free move after fine-tuning", _error_x(figure.tuned_moves)
        traces.append(_points(name, figure.tuned_moves, texts, marker, error_x=error))
    marker = {"size": 13, "symbol": "diamond", "color": palette.BASELINE, "line": {"width": 1, "color": "#FFFFFF"}}
    text = hover(figure.baseline, "unpruned", figure)
    return [*traces, _points("Baseline (unpruned)", [figure.baseline], [text], marker)]


def _why(move: PickMove, figure: FrontFigure) -> str:
    """Why the network was picked, which free move beats it, and how far its figures go."""
    better = figure.beaten_by(move.trial_id, after=move.after is not None)
    beaten = f", beaten by {better.name}" if better else ""
    reach = "" if move.after else f", {move.before.fidelity}"
    return f"{move.chosen_as or 'picked'}{beaten}{reach}"


def _arrow(move: PickMove) -> Spec:
    """From where the trial left a pick to where the full fine-tuning brought it."""
    assert move.after is not None
    return {
        "x": move.after.latency_ms, "y": move.after.accuracy, "xref": "x", "yref": "y",
        "ax": move.before.latency_ms, "ay": move.before.accuracy, "axref": "x", "ayref": "y",
        "text": "", "showarrow": True, "arrowhead": 2, "arrowsize": 1, "arrowwidth": 1.5, "arrowcolor": palette.PICK,
        "standoff": 9, "startstandoff": 7, "opacity": 0.85,
    }  # fmt: skip


def _label(move: PickMove, level: int) -> Spec:
    where = move.after or move.before
    return {
        "x": where.latency_ms, "y": where.accuracy, "yshift": 18 + 15 * level, "showarrow": False,
        "text": f"<b>{escape(move.trial_id[:24])}</b>", "font": {"size": 12, "color": palette.PICK},
        "bgcolor": "rgba(255,255,255,0.75)", "borderpad": 1,
    }  # fmt: skip


def axis(title: str, **more: Any) -> Spec:
    """An axis in the report's style; `more` overrides."""
    return {
        "title": {"text": title, "font": {"size": 13, "color": palette.TEXT}, "standoff": 12},
        "gridcolor": palette.GRID, "zeroline": False, "linecolor": palette.AXIS, "ticks": "outside", "ticklen": 4,
        "tickcolor": palette.AXIS, "tickfont": {"size": 12, "color": palette.MUTED}, **more,
    }  # fmt: skip


def _layout(axes: PlaneAxes, x_title: str, y_title: str, annotations: list[Spec]) -> Spec:
    speedups = axis(
        "Speed-up over the baseline",
        overlaying="x",
        side="top",
        matches="x",
        tickvals=[position for position, _ in axes.speedups],
        ticktext=[label for _, label in axes.speedups],
        showgrid=False,
        range=list(axes.latency_ms),
    )
    return {
        "xaxis": axis(x_title, range=list(axes.latency_ms)),
        "xaxis2": speedups,
        "yaxis": axis(y_title, range=list(axes.accuracy), tickformat=".3~f"),
        "annotations": annotations,
        "hovermode": "closest",
        "hoverlabel": {
            "bgcolor": "#FFFFFF",
            "bordercolor": palette.AXIS,
            "font": {"size": 13, "color": palette.TEXT, **FONT},
            "align": "left",
        },
        "legend": {
            "orientation": "h",
            "x": 0,
            "y": -0.17,
            "yanchor": "top",
            "font": {"size": 12, "color": palette.TEXT},
        },
        "margin": {"l": 64, "r": 18, "t": 58, "b": 60},
        "font": FONT,
        "paper_bgcolor": "#FFFFFF",
        "plot_bgcolor": "#FFFFFF",
        "dragmode": "zoom",
    }


def sensitivity_spec(figure: SensitivityFigure) -> Spec:
    """Blocks across, less and less work down, the share of channels that stays as colour (dark: little)."""
    percent = [[round(100 * share, 1) for share in row] for row in figure.channels_kept]
    heat = {
        "type": "heatmap", "x": [str(block) for block in figure.blocks], "z": percent, "zmin": 0, "zmax": 100,
        "y": [f"{100 * keep:.0f} %" for keep in figure.work_kept], "colorscale": "Cividis", "xgap": 1, "ygap": 1,
        "hovertemplate": "block %{x}: %{z:.0f} % of the channels stay<br>at %{y} of the work<extra></extra>",
        "colorbar": {"title": {"text": "channels kept, %", "side": "right"}, "thickness": 12, "outlinewidth": 0},
    }  # fmt: skip
    return {
        "data": [heat],
        "layout": {
            "xaxis": axis("Block of the network", type="category"),
            "yaxis": axis("Multiply-adds kept", type="category", autorange="reversed"),
            "margin": {"l": 70, "r": 12, "t": 12, "b": 52},
            "font": FONT,
            "paper_bgcolor": "#FFFFFF",
            "plot_bgcolor": "#FFFFFF",
        },
    }


def hypervolume_spec(curve: HypervolumeCurve) -> Spec:
    """Hypervolume over trials, with a button for over hours; a line says where the sampler took over."""
    percent = [round(100 * share, 3) for share in curve.shares]
    line = {
        "type": "scatter", "mode": "lines", "x": list(curve.trials), "y": percent, "fill": "tozeroy",
        "fillcolor": "rgba(0,114,178,0.08)", "line": {"color": palette.FRONT, "width": 2, "shape": "hv"},
        "customdata": list(zip(curve.trials, curve.hours, strict=True)),
        "hovertemplate": "after %{customdata[0]} trials, %{customdata[1]:.2f} h: %{y:.1f} %<extra></extra>",
    }  # fmt: skip
    shapes, annotations = [], []
    if 0 < curve.ladder_trials < len(curve.trials):
        x = curve.ladder_trials + 0.5
        dash = {"color": palette.AXIS, "width": 1, "dash": "dot"}
        shapes = [{"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper", "line": dash}]
        text = {"text": "sampler starts", "showarrow": False, "font": {"size": 11, "color": palette.MUTED}}
        annotations = [{"x": x, "y": 0.05, "yref": "paper", "xanchor": "left", "xshift": 4, **text}]
    layout = {**hypervolume_layout(), "shapes": shapes, "annotations": annotations}
    over_trials = {"xaxis.title.text": layout["xaxis"]["title"]["text"], "xaxis.tickformat": ",d", "shapes": shapes}
    over_hours = {"xaxis.title.text": "Hours since the first trial began", "xaxis.tickformat": "", "shapes": []}
    ways = (
        ("over trials", curve.trials, {**over_trials, "annotations": annotations}),
        ("over hours", [round(value, 4) for value in curve.hours], {**over_hours, "annotations": []}),
    )
    buttons = [
        {"label": label, "method": "update", "args": [{"x": [list(x)]}, {**change, "xaxis.autorange": True}]}
        for label, x, change in ways
    ]
    place = {"x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "direction": "right", "type": "buttons"}
    look = {"bgcolor": "#FFFFFF", "bordercolor": palette.AXIS, "font": {"size": 12, "color": palette.TEXT}}
    layout |= {"margin": {**layout["margin"], "t": 44}, "updatemenus": [{"buttons": buttons, **place, **look}]}
    return {"data": [line], "layout": layout}


def hypervolume_layout() -> Spec:
    """Axes of hypervolume over trials."""
    return {
        "xaxis": axis("Completed trials", rangemode="tozero", tickformat=",d"),
        "yaxis": axis("Hypervolume (% of the baseline's box)", rangemode="tozero"),
        "margin": {"l": 60, "r": 12, "t": 12, "b": 52},
        "font": FONT,
        "paper_bgcolor": "#FFFFFF",
        "plot_bgcolor": "#FFFFFF",
        "showlegend": False,
    }


_ENDS = {
    "completed": (palette.FRONT, "solid"),
    "stopped": (palette.KNEE, "dash"),
    BEYOND_BOUNDS: (palette.APART, "dashdot"),
    "failed": (palette.PICK, "dot"),
}


def course_spec(course: Course) -> Spec:
    """How many trials had ended in each way, over the hours; every line has its own dash, too."""
    hours = [round(value, 4) for value in course.hours]
    traces = [
        {
            "type": "scatter", "mode": "lines", "name": ending, "x": hours, "y": list(counts),
            "line": {"color": _ENDS[ending][0], "dash": _ENDS[ending][1], "width": 2, "shape": "hv"},
            "hovertemplate": f"%{{y:,d}} {ending} after %{{x:.2f}} h<extra></extra>",
        }
        for ending, counts in course.counts
    ]  # fmt: skip
    return {
        "data": traces,
        "layout": {
            "xaxis": axis("Hours since the first trial began", rangemode="tozero"),
            "yaxis": axis("Trials that have ended", rangemode="tozero", tickformat=",d"),
            "legend": {"x": 0.02, "y": 0.98, "bgcolor": "rgba(255,255,255,0.7)", "font": {"size": 12}},
            "margin": {"l": 60, "r": 12, "t": 12, "b": 52},
            "font": FONT,
            "paper_bgcolor": "#FFFFFF",
            "plot_bgcolor": "#FFFFFF",
            "showlegend": True,
        },
    }
