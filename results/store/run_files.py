"""The contents of a run folder's JSON files beside the trials' records, as types that check them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from paretoprune.base.image_size import ImageSize, size_text
from paretoprune.base.stored_size import StoredSize
from paretoprune.results.errors import RecordError, RunFolderError, SchemaVersionError
from paretoprune.results.store.accuracy import accuracy_name, missing_metric
from paretoprune.results.store.persisted import Count, Metrics, Number, Persisted, Ratio, parse_json
from paretoprune.results.store.records import SCHEMA_VERSION, present_metrics

UNPRUNED_AT = "unpruned@"


class _Row(BaseModel):
    """A part of a file; what is not listed is passed on as it is."""

    model_config = ConfigDict(extra="allow")


class LayerRow(_Row):
    """One layer of the unpruned network; see `layers --format json`."""

    layer: str
    block: int | None = None
    out_channels: Count = 0
    prunable: bool = False
    reason: str = ""


class GroupRow(_Row):
    """Layers whose channels go together. losses: estimated, nats per image, by width."""

    layers: list[str]
    losses: dict[int, Number] | None = None


class PlanRow(_Row):
    """A plan by sensitivity. keep: share of the multiply-adds that stays, in (0, 1]."""

    keep: Annotated[Number, Field(gt=0, le=1)]
    ratios: dict[str, Ratio]


class Noise(_Row):
    """How much accuracy changes with the choice of images: standard deviations, or the number of images alone."""

    model_config = ConfigDict(extra="allow")

    source: str = ""
    images: Count | None = None
    map50_95_std: Number | None = None
    map50_std: Number | None = None
    top1_std: Number | None = None


def free_move_name(imgsz: ImageSize | None, precision: str | None = None) -> str:
    """What the unpruned model at an input size, or in a precision, is called: unpruned@256, unpruned@224,384,
    unpruned@int8, unpruned@256-int8."""
    return UNPRUNED_AT + "-".join([*([size_text(imgsz)] if imgsz else []), *([precision] if precision else [])])


def unpruned_words(name: str) -> str:
    """What such a name says: at 256 px, in int8, at 256 px in int8."""
    parts = name.removeprefix(UNPRUNED_AT).split("-")
    return " ".join(f"at {part} px" if part[:1].isdigit() else f"in {part}" for part in parts)


def precision_named(name: str) -> str:
    """The precision in such a name; "" where it is the run's own."""
    last = name.removeprefix(UNPRUNED_AT).split("-")[-1]
    return "" if last[:1].isdigit() else last


class FreeMove(_Row):
    """The unpruned model at a smaller input or in another precision. imgsz: its size, precision: that of its file;
    None: the run's. metrics: as a trial's, latency against that of the unpruned model at the run's own."""

    imgsz: StoredSize | None = None
    precision: str | None = None
    metrics: Metrics

    @model_validator(mode="after")
    def _check_metrics(self) -> FreeMove:
        if missing := missing_metric(self.metrics):
            where = unpruned_words(free_move_name(self.imgsz, self.precision))
            raise RecordError("metrics", f"the metrics {where} must hold {missing}")
        return self


class FreeMoves(Persisted):
    """free_moves.json: what is to be had without pruning, as far as it is measured."""

    moves: list[FreeMove] = Field(default_factory=list)


class Baseline(Persisted):
    """baseline.json. metrics: of the unpruned network, an accuracy and `latency_ms` among them."""

    model_config = ConfigDict(frozen=True, extra="allow")

    metrics: Metrics
    imgsz: StoredSize | None = None
    model: str | None = None
    data: str | None = None
    device: str | None = None
    environment: dict[str, Any] | None = None
    layers: list[LayerRow] | None = None
    groups: list[GroupRow] | None = None
    sensitivity: list[PlanRow] | None = None
    noise: Noise | None = None

    @model_validator(mode="after")
    def _check_metrics(self) -> Baseline:
        if missing_metric(self.metrics):
            raise RecordError("metrics", "it must hold the metrics map50_95 (or top1) and latency_ms")
        if not self.metrics["latency_ms"] > 0:
            raise RecordError("metrics", f"metrics[latency_ms] must be above 0, but got {self.metrics['latency_ms']}")
        return self


def _total(seconds: object) -> object:
    """The sum of the phases' seconds; the file holds them by name."""
    if not isinstance(seconds, Mapping):
        return 0.0 if seconds is None else seconds
    if not all(isinstance(value, (int, float)) for value in seconds.values()):
        raise ValueError(f"seconds must be numbers by phase, but got {dict(seconds)!r:.60}")
    return float(sum(seconds.values()))


def _present(metrics: object) -> object:
    """A trial's metrics under today's names; anything else is left to the type's own check."""
    return present_metrics(metrics) if isinstance(metrics, Mapping) else metrics


class _Finished(Persisted):
    """What the files of picks and native rivals have in common."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    after: Metrics
    baseline: Metrics = Field(default_factory=dict)
    epochs: Count = 0
    best_epoch: Count | None = None
    directory: Path
    seconds: Annotated[Number, BeforeValidator(_total)] = 0.0


class Selected(_Finished):
    """A pick after its full fine-tuning: `selected/<trial_id>/metrics.json` and where it lies.

    seconds: of the fine-tuning, on its share of the machine; 0 where it was not noted.
    before: the trial's metrics. after: measured after the full fine-tuning. baseline: measured in the same session.
    settings: of the fine-tuning, as the run's config names them.
    """

    trial_id: str
    chosen_as: str = ""
    before: Annotated[Metrics, BeforeValidator(_present)] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_after(self) -> Selected:
        if accuracy_name(self.after) not in self.after:
            raise RecordError("after", "it must hold `after` with the metric map50_95 (or top1)")
        return self


class Native(_Finished):
    """A rival that was given a pick's budget and measured beside the picks: a smaller stock model, in
    native/<name>/metrics.json, or the unpruned model at a smaller input or in another precision, in
    free_moves/unpruned@<imgsz>-<precision>/metrics.json.

    model: the checkpoint it began as. recipe: how it was trained, in words.
    """

    name: str
    model: str = ""
    recipe: str = ""

    @model_validator(mode="after")
    def _check_after(self) -> Native:
        if "latency_ms" not in self.after:
            raise RecordError("after", "it must hold `after` with the metric latency_ms")
        return self


Differences = dict[str, dict[str, tuple[Number, Number, Number]]]


class FinalSession(Persisted):
    """session.json: the last evaluation of all finished networks together.

    map50_95_over, speedup_over: network -> other network -> (difference or ratio, low, high) with its 95 % interval.
    tuned_at: network -> unix seconds of its fine-tuning's end.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    networks: list[str] = Field(default_factory=list)
    map50_95_over: Differences = Field(default_factory=dict)
    speedup_over: Differences = Field(default_factory=dict)
    tuned_at: dict[str, Number | None] = Field(default_factory=dict)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object. Raises RunFolderError where the file cannot be read as one."""
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        raise RunFolderError(f"{path} must be JSON, but it is not ({error}): restore it or delete it") from error
    if not isinstance(content, dict):
        raise RunFolderError(f"{path} must hold a JSON object, but got {type(content).__name__}")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of the current schema version. Raises RunFolderError or SchemaVersionError."""
    content = read_object(path)
    if content.get("schema_version") != SCHEMA_VERSION:
        raise SchemaVersionError(str(path), content.get("schema_version"), SCHEMA_VERSION)
    return content


def checked(path: Path, kind: type[Persisted], **more: Any) -> tuple[dict[str, Any], Any]:
    """The content of a file of the current schema, and what ``kind`` makes of it and of ``more``.

    Raises RunFolderError, SchemaVersionError, or RecordError that names the file and the field.
    """
    content = read_json(path)
    try:
        values = {name: value for name, value in content.items() if name != "schema_version"}
        return content, kind(**{**values, **more})
    except RecordError as error:
        raise RecordError(error.field, f"{path}: {error}; restore it or delete it") from error
