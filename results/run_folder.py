"""The run folder: where everything lies, and how its JSON files are read and written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from results.accuracy import accuracy_of, missing_metric
from results.atomic import write_json
from results.errors import RecordError, RunFolderError, SchemaVersionError
from results.objectives import DEFAULT_OBJECTIVES, check_objectives
from results.records import SCHEMA_VERSION, RecordStore, TrialRecord, present_metrics


@dataclass(frozen=True)
class Selected:
    """A pick after its full fine-tuning: `selected/<trial_id>/metrics.json` and where it lies.

    seconds: of the fine-tuning, on its share of the machine; 0 where it was not noted.
    before: the trial's metrics. after: measured after the full fine-tuning. baseline: measured in the same session.
    settings: of the fine-tuning, as the run's config names them.
    """

    trial_id: str
    chosen_as: str
    before: dict[str, Any]
    after: dict[str, Any]
    baseline: dict[str, Any]
    epochs: int
    best_epoch: int | None
    directory: Path
    seconds: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Native:
    """A smaller stock model that was given a pick's budget and measured beside the picks: native/<name>/metrics.json.

    model: the checkpoint it began as. recipe: how it was trained, in words.
    """

    name: str
    model: str
    after: dict[str, Any]
    baseline: dict[str, Any]
    epochs: int
    best_epoch: int | None
    recipe: str
    directory: Path
    seconds: float = 0.0


@dataclass(frozen=True)
class RunFolder:
    """The files of one run below `path`. Making one touches nothing on disk."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))

    @property
    def config(self) -> Path:
        """The resolved configuration (YAML)."""
        return self.path / "config.yaml"

    @property
    def baseline(self) -> Path:
        """The unpruned model's metrics, layers and environment."""
        return self.path / "baseline.json"

    @property
    def trials_file(self) -> Path:
        """The records of all finished trials."""
        return self.path / "trials.jsonl"

    @property
    def study(self) -> Path:
        """Optuna's journal storage."""
        return self.path / "study.journal"

    @property
    def trials_dir(self) -> Path:
        """One folder a trial."""
        return self.path / "trials"

    @property
    def selected_root(self) -> Path:
        """One folder a pick."""
        return self.path / "selected"

    @property
    def native_root(self) -> Path:
        """One folder a native rival."""
        return self.path / "native"

    def native_dir(self, name: str) -> Path:
        """best.pt and metrics.json of one native rival."""
        return self.native_root / name

    @property
    def session(self) -> Path:
        """The last comparison of all finished networks with each other."""
        return self.path / "session.json"

    @property
    def report_dir(self) -> Path:
        """The PNG figures."""
        return self.path / "report"

    @property
    def report_html(self) -> Path:
        """The report."""
        return self.path / "report.html"

    @property
    def report_markdown(self) -> Path:
        """The report as Markdown, with the figures of `report_dir`."""
        return self.path / "report.md"

    @property
    def trials_csv(self) -> Path:
        """All trials as a table."""
        return self.path / "trials.csv"

    @property
    def trials_parquet(self) -> Path:
        """All trials as a table with types."""
        return self.path / "trials.parquet"

    @property
    def front_csv(self) -> Path:
        """The front as a table."""
        return self.path / "front.csv"

    def trial_dir(self, trial_id: str) -> Path:
        """plan.json, pruned.pt and the logs of one trial."""
        return self.trials_dir / trial_id

    def trial_plan(self, trial_id: str) -> Path:
        """The plan a trial applied."""
        return self.trial_dir(trial_id) / "plan.json"

    def trial_checkpoint(self, trial_id: str) -> Path:
        """A trial's network."""
        return self.trial_dir(trial_id) / "pruned.pt"

    def selected_dir(self, trial_id: str) -> Path:
        """best.pt, plan.json and metrics.json of one pick."""
        return self.selected_root / trial_id

    def selected_checkpoint(self, trial_id: str) -> Path:
        """The fully fine-tuned network of a pick."""
        return self.selected_dir(trial_id) / "best.pt"

    @property
    def store(self) -> RecordStore:
        """The store over `trials_file`."""
        return RecordStore(self.trials_file)

    def read_records(self) -> list[TrialRecord]:
        """All finished trials; [] before the first one."""
        return self.store.read()

    def write_baseline(self, content: Mapping[str, Any]) -> Path:
        """Write baseline.json atomically; the schema version is added."""
        return write_json(self.baseline, {"schema_version": SCHEMA_VERSION, **content})

    def read_baseline(self) -> dict[str, Any]:
        """baseline.json. Raises RunFolderError where it is missing or no JSON, SchemaVersionError, RecordError."""
        if not self.baseline.is_file():
            raise RunFolderError(
                f"a run folder holds baseline.json, but {self.path} does not: "
                "give the folder that was named in `paretoprune search --run`"
            )
        content = read_json(self.baseline)
        metrics = content.get("metrics")
        if not isinstance(metrics, dict) or missing_metric(metrics):
            raise RecordError("metrics", f"{self.baseline} must hold the metrics map50_95 (or top1) and latency_ms")
        return content

    def read_config(self) -> dict[str, Any]:
        """config.yaml as plain data; {} where there is none."""
        if not self.config.is_file():
            return {}
        try:
            content = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            detail = " ".join(str(error).split())
            raise RunFolderError(f"{self.config} must be YAML, but it is not ({detail}): correct it") from error
        return content if isinstance(content, dict) else {}

    def objectives(self) -> tuple[str, ...]:
        """The run's objectives: `search.objectives` of its config, or accuracy and latency."""
        section = self.read_config().get("search")
        names = section.get("objectives") if isinstance(section, dict) else None
        return check_objectives(names) if names else DEFAULT_OBJECTIVES

    def write_selected(self, trial_id: str, content: Mapping[str, Any]) -> Path:
        """Write selected/<trial_id>/metrics.json atomically; written last, it says that the pick is ready."""
        return write_json(
            self.selected_dir(trial_id) / "metrics.json",
            {"schema_version": SCHEMA_VERSION, "trial_id": trial_id, "fidelity": "full", **content},
        )

    def read_selected(self) -> list[Selected]:
        """The picks whose full fine-tuning is finished, by trial id; those without metrics.json are still in work."""
        return [_selected(path) for path in sorted(self.selected_root.glob("*/metrics.json"))]

    def read_session(self) -> dict[str, Any]:
        """session.json, the last comparison of all finished networks; {} where there was none."""
        return read_json(self.session) if self.session.is_file() else {}

    def read_natives(self) -> list[Native]:
        """The native rivals that are trained and measured, by name."""
        return [_native(path) for path in sorted(self.native_root.glob("*/metrics.json"))]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of the current schema version. Raises RunFolderError or SchemaVersionError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunFolderError(f"{path} must be JSON, but it is not ({error}): restore it or delete it") from error
    if not isinstance(content, dict):
        raise RunFolderError(f"{path} must hold a JSON object, but got {type(content).__name__}")
    if content.get("schema_version") != SCHEMA_VERSION:
        raise SchemaVersionError(str(path), content.get("schema_version"), SCHEMA_VERSION)
    return content


def _selected(path: Path) -> Selected:
    content = read_json(path)
    after = content.get("after")
    if not isinstance(after, dict) or accuracy_of(after) is None:
        raise RecordError("after", f"{path} must hold `after` with the metric map50_95 (or top1)")
    return Selected(
        trial_id=str(content.get("trial_id", path.parent.name)),
        chosen_as=str(content.get("chosen_as", "")),
        before=present_metrics(content.get("before") or {}),
        after=after,
        baseline=content.get("baseline") or {},
        epochs=int(content.get("epochs") or 0),
        best_epoch=content.get("best_epoch"),
        directory=path.parent,
        seconds=sum((content.get("seconds") or {}).values()),
        settings=content.get("settings") or {},
    )


def _native(path: Path) -> Native:
    content = read_json(path)
    after = content.get("after")
    if not isinstance(after, dict) or "latency_ms" not in after:
        raise RecordError("after", f"{path} must hold `after` with the metric latency_ms")
    return Native(
        name=str(content.get("name", path.parent.name)),
        model=str(content.get("model", "")),
        after=after,
        baseline=content.get("baseline") or {},
        epochs=int(content.get("epochs") or 0),
        best_epoch=content.get("best_epoch"),
        recipe=str(content.get("recipe", "")),
        directory=path.parent,
        seconds=sum((content.get("seconds") or {}).values()),
    )
