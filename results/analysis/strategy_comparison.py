"""A comparison of pruning strategies: where its files lie in a run folder, its rows, its table.

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
from pathlib import Path
from typing import Any

from paretoprune.base.atomic import write_json, write_text
from paretoprune.base.file_names import BEST, PLAN
from paretoprune.results.errors import RecordError
from paretoprune.results.store.accuracy import accuracy_name
from paretoprune.results.store.records import SCHEMA_VERSION
from paretoprune.results.store.run_files import read_json

_COSTS = ("params_m", "gflops", "speedup", "speedup_ci95", "latency_ms")
UNPRUNED = "(unpruned)"


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
        return self.strategy_dir(name) / BEST

    def plan(self, name: str) -> Path:
        """The ratios a strategy realised, and which channels it kept."""
        return self.strategy_dir(name) / PLAN

    def write_result(self, name: str, content: Mapping[str, Any]) -> Path:
        """Write a strategy's result.json atomically; the schema version is added."""
        return write_json(self.result(name), {"schema_version": SCHEMA_VERSION, "strategy": name, **content})

    def read_result(self, name: str) -> dict[str, Any] | None:
        """A strategy's result.json, None where it is not finished."""
        if not (self.result(name).is_file() and self.checkpoint(name).is_file()):
            return None
        return read_json(self.result(name))


def compared(metrics: Mapping[str, Any]) -> tuple[str, ...]:
    """The metrics that a comparison holds: costs, and the task's accuracy (`map50_95`, `top1`) after and before epochs.

    metrics: of a network or of a row, for the accuracy's name.
    """
    accuracy = accuracy_name(metrics)
    return (*_COSTS, accuracy, f"{accuracy}_refit")


@dataclass(frozen=True)
class ComparisonRow:
    """One strategy. Raises RecordError where a metric is missing, no number, NaN or infinite.

    metrics: params_m (millions), gflops, speedup over the unpruned network, speedup_ci95 (low, high), latency_ms,
    map50_95 and, before any epoch, map50_95_refit (a classifier's: top1, top1_refit). epochs: really spent. skipped:
    (layer, reason).
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
        for name in compared(self.metrics):
            value = self.metrics.get(name)
            numbers = value if isinstance(value, (list, tuple)) else [value]
            if not all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers):
                raise RecordError(name, f"{name} of strategy {self.strategy} must be finite, but got {value!r}")

    def to_row(self) -> dict[str, Any]:
        """As printed and written: plain JSON types."""
        return {
            "strategy": self.strategy,
            "layers_pruned": len(self.layers),
            **{name: _plain(self.metrics[name]) for name in compared(self.metrics)},
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
        cells: dict[str, Any] = {name: _plain(self.baseline.get(name)) for name in compared(self.baseline)}
        before_epochs = f"{accuracy_name(self.baseline)}_refit"
        return {**cells, "strategy": UNPRUNED, "layers_pruned": 0, "speedup_ci95": None, before_epochs: None}


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
    """Write comparison.csv and, last, comparison.json; returns the latter's path. `report.write_report` shows them."""
    rows = comparison.to_rows()
    write_text(folder.csv, as_csv(rows))
    content = {
        "schema_version": SCHEMA_VERSION,
        "settings": dict(comparison.settings),
        "baseline": dict(comparison.baseline),
        "device": comparison.device,
        "environment": dict(comparison.environment),
        "failed": dict(comparison.failed),
        "strategies": rows,
    }
    return write_json(folder.json, content)


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
    except KeyError as error:
        raise RecordError(str(error), f"{folder.json} lacks {error}: delete it to have it written again") from error
    except (TypeError, ValueError, AttributeError) as error:  # RecordError among them
        raise RecordError("strategies", f"{folder.json}: {error}; delete it to have it written again") from error


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Comma-separated text with a header; lists and mappings as JSON in one cell."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]) if rows else ["strategy"], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: json.dumps(v) if isinstance(v, (list, dict)) else v for name, v in row.items()})
    return stream.getvalue()


def _row(folder: ComparisonFolder, entry: Mapping[str, Any]) -> ComparisonRow:
    name = str(entry["strategy"])
    return ComparisonRow(
        strategy=name,
        layers=tuple(entry["layers"]),
        skipped=tuple((item["layer"], item["reason"]) for item in entry["skipped"]),
        epochs=int(entry["epochs"]),
        metrics={key: entry[key] for key in compared(entry)},
        checkpoint=str(folder.checkpoint(name)),
        plan=str(folder.plan(name)),
        sessions=tuple(str(folder.strategy_dir(name) / Path(path).name) for path in entry["sessions"]),
        notes=entry["notes"],
    )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
