"""A comparison of pruning strategies: where its files lie in a run folder, its rows, its table and its page.

Every strategy got the same ratios, calibration images and fine-tuning epochs, and was measured in one session beside
the unpruned network.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from results import palette, wording
from results.atomic import write_json, write_text
from results.errors import RecordError
from results.interactive import script_json
from results.records import SCHEMA_VERSION
from results.run_folder import read_json

METRICS = ("params_m", "gflops", "speedup", "speedup_ci95", "latency_ms", "map50_95", "map50_95_refit")
UNPRUNED = "(unpruned)"
_TEMPLATES = Path(__file__).parent / "templates"

# One marker and one colour a strategy, in the order of the rows, so that nothing depends on colour alone.
_MARKERS = ("circle", "square", "triangle-up", "pentagon", "x", "star", "hexagon")
_COLOURS = (palette.FRONT, palette.PICK, "#009E73", "#CC79A7", palette.MUTED, palette.KNEE, palette.APART)


@dataclass(frozen=True)
class ComparisonFolder:
    """The files of a comparison below the run folder `path`. Making one touches nothing on disk."""

    path: Path

    @property
    def json(self) -> Path:
        """The whole comparison."""
        return self.path / "comparison.json"

    @property
    def csv(self) -> Path:
        """Its rows as a table."""
        return self.path / "comparison.csv"

    @property
    def html(self) -> Path:
        """Its page; opens offline."""
        return self.path / "comparison.html"

    @property
    def strategies(self) -> Path:
        """One folder a strategy."""
        return self.path / "strategies"

    def strategy_dir(self, name: str) -> Path:
        """Everything of one strategy, its intermediate checkpoints and logs included."""
        return self.strategies / name

    def result(self, name: str) -> Path:
        """What a strategy did; written last, so it says that the strategy is finished."""
        return self.strategy_dir(name) / "result.json"

    def checkpoint(self, name: str) -> Path:
        """A strategy's final network."""
        return self.strategy_dir(name) / "best.pt"

    def plan(self, name: str) -> Path:
        """The ratios a strategy realised, and which channels it kept."""
        return self.strategy_dir(name) / "plan.json"

    def write_result(self, name: str, content: Mapping[str, Any]) -> Path:
        """Write a strategy's result.json atomically; the schema version is added."""
        return write_json(self.result(name), {"schema_version": SCHEMA_VERSION, "strategy": name, **content})

    def read_result(self, name: str) -> dict[str, Any] | None:
        """A strategy's result.json, None where it is not finished."""
        if not (self.result(name).is_file() and self.checkpoint(name).is_file()):
            return None
        return read_json(self.result(name))


@dataclass(frozen=True)
class ComparisonRow:
    """One strategy. Raises RecordError where a metric is missing, no number, NaN or infinite.

    metrics: params_m (millions), gflops, speedup over the unpruned network, speedup_ci95 (low, high), latency_ms,
    map50_95 and, before any epoch, map50_95_refit. epochs: really spent. skipped: (layer, reason).
    """

    strategy: str
    layers: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    epochs: int
    metrics: Mapping[str, Any]
    checkpoint: str
    plan: str
    sessions: tuple[str, ...] = ()
    notes: Mapping[str, float | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in METRICS:
            value = self.metrics.get(name)
            numbers = value if isinstance(value, (list, tuple)) else [value]
            if not all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers):
                raise RecordError(name, f"{name} of strategy {self.strategy} must be finite, but got {value!r}")

    def to_row(self) -> dict[str, Any]:
        """As printed and written: plain JSON types."""
        return {
            "strategy": self.strategy,
            "layers_pruned": len(self.layers),
            **{name: _plain(self.metrics[name]) for name in METRICS},
            "epochs": self.epochs,
            "skipped": [{"layer": layer, "reason": reason} for layer, reason in self.skipped],
            "checkpoint": self.checkpoint,
            "plan": self.plan,
            "layers": list(self.layers),
            "sessions": list(self.sessions),
            "notes": dict(self.notes),
        }


@dataclass(frozen=True)
class Comparison:
    """All strategies beside the unpruned network.

    settings: what makes two comparisons the same (model, data, imgsz, ratios, epochs, seed ...). baseline: the unpruned
    network's metrics of the same session. failed: strategy -> one line.
    """

    settings: Mapping[str, Any]
    baseline: Mapping[str, Any]
    rows: tuple[ComparisonRow, ...]
    device: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)

    def to_rows(self) -> list[dict[str, Any]]:
        """One mapping a strategy."""
        return [row.to_row() for row in self.rows]

    def baseline_row(self) -> dict[str, Any]:
        """The unpruned network in the rows' words, for tables."""
        cells: dict[str, Any] = {name: _plain(self.baseline.get(name)) for name in METRICS}
        return {**cells, "strategy": UNPRUNED, "layers_pruned": 0, "speedup_ci95": None, "map50_95_refit": None}


@dataclass(frozen=True)
class SkippedGroup:
    """Layers that one strategy left alone for the same reason."""

    reason: str
    layers: tuple[str, ...]


def skipped_groups(skipped: Iterable[tuple[str, str]]) -> list[SkippedGroup]:
    """`(layer, reason)` by reason, in the order in which the reasons first appear."""
    by_reason: dict[str, list[str]] = {}
    for layer, reason in skipped:
        by_reason.setdefault(reason, []).append(layer)
    return [SkippedGroup(reason, tuple(layers)) for reason, layers in by_reason.items()]


def write_comparison(folder: ComparisonFolder, comparison: Comparison) -> Path:
    """Write comparison.csv, comparison.html and, last, comparison.json; returns the page's path."""
    rows = comparison.to_rows()
    write_text(folder.csv, as_csv(rows))
    write_text(folder.html, render(comparison))
    content = {
        "schema_version": SCHEMA_VERSION,
        "settings": dict(comparison.settings),
        "baseline": dict(comparison.baseline),
        "device": comparison.device,
        "environment": dict(comparison.environment),
        "failed": dict(comparison.failed),
        "strategies": rows,
    }
    write_json(folder.json, content)
    return folder.html


def read_comparison(folder: ComparisonFolder) -> Comparison | None:
    """The comparison of a run folder, None where there is none; the paths are those of `folder`, wherever it lies now.

    Raises RunFolderError or SchemaVersionError for a file that is no JSON or of another version, RecordError for one
    that lacks a part.
    """
    if not folder.json.is_file():
        return None
    content = read_json(folder.json)
    try:
        return Comparison(
            settings=content["settings"],
            baseline=content["baseline"],
            rows=tuple(_row(folder, entry) for entry in content["strategies"]),
            device=content["device"],
            environment=content["environment"],
            failed=content["failed"],
        )
    except (KeyError, TypeError) as error:
        raise RecordError(str(error), f"{folder.json} lacks {error}: delete it to have it written again") from error


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Comma-separated text with a header; lists and mappings as JSON in one cell."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]) if rows else ["strategy"], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: json.dumps(v) if isinstance(v, (list, dict)) else v for name, v in row.items()})
    return stream.getvalue()


def figure_spec(comparison: Comparison) -> dict[str, Any]:
    """mAP50-95 against speed-up as a Plotly specification: a dot a strategy with its interval, the unpruned network."""
    base = float(comparison.baseline["map50_95"])
    traces = [_dot(row, index, base) for index, row in enumerate(comparison.rows)]
    unpruned = {
        "type": "scatter", "mode": "markers", "name": "unpruned", "x": [1.0], "y": [base],
        "marker": {"size": 13, "symbol": "diamond", "color": palette.BASELINE},
        "hovertext": [f"<b>unpruned</b><br>mAP50-95 <b>{base:.3f}</b>"], "hoverinfo": "text",
    }  # fmt: skip
    line = {"color": palette.AXIS, "width": 1, "dash": "dot"}
    shapes = [
        {"type": "line", "x0": 1, "x1": 1, "y0": 0, "y1": 1, "yref": "paper", "line": line, "layer": "below"},
        {"type": "line", "x0": 0, "x1": 1, "xref": "paper", "y0": base, "y1": base, "line": line, "layer": "below"},
    ]
    layout = {
        "xaxis": _axis("Speed-up over the unpruned network", tickformat=".2~f", ticksuffix="×"),
        "yaxis": _axis("mAP50-95 on the validation split", tickformat=".3~f"),
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


def render(comparison: Comparison) -> str:
    """The page's HTML; every value is escaped, nothing is loaded from anywhere."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("comparison.html.j2").render(
        wording=wording,
        run=comparison,
        groups={row.strategy: skipped_groups(row.skipped) for row in comparison.rows},
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        plotly=Markup(get_plotlyjs()),  # Plotly's own bundle; it holds no closing script tag
        spec=Markup(script_json(figure_spec(comparison))),
    )


def _row(folder: ComparisonFolder, entry: Mapping[str, Any]) -> ComparisonRow:
    name = str(entry["strategy"])
    return ComparisonRow(
        strategy=name,
        layers=tuple(entry["layers"]),
        skipped=tuple((item["layer"], item["reason"]) for item in entry["skipped"]),
        epochs=int(entry["epochs"]),
        metrics={key: entry[key] for key in METRICS},
        checkpoint=str(folder.checkpoint(name)),
        plan=str(folder.plan(name)),
        sessions=tuple(str(folder.strategy_dir(name) / Path(path).name) for path in entry["sessions"]),
        notes=entry["notes"],
    )


def _dot(row: ComparisonRow, index: int, base: float) -> dict[str, Any]:
    speedup, accuracy = row.metrics["speedup"], row.metrics["map50_95"]
    low, high = row.metrics["speedup_ci95"]
    text = (
        f"<b>{escape(row.strategy)}</b><br>mAP50-95 <b>{accuracy:.3f}</b> ({wording.signed(accuracy - base)})"
        f"<br>speed-up <b>{wording.factor(speedup)}</b> ({wording.interval((low, high))})"
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


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
