"""The run folder: where everything lies, and how its JSON files are read and written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from paretoprune.base.atomic import write_json
from paretoprune.base.errors import one_line
from paretoprune.base.file_names import (
    BASELINE_RECORD,
    BEST,
    CONFIG,
    FREE_MOVES,
    METRICS,
    PLAN,
    PRUNED,
    SESSION,
    STUDY,
    TRIALS,
)
from paretoprune.base.image_size import ImageSize, area_of
from paretoprune.base.setting_names import with_present_names
from paretoprune.results.errors import RunFolderError
from paretoprune.results.store.objectives import DEFAULT_OBJECTIVES, check_objectives
from paretoprune.results.store.records import SCHEMA_VERSION, RecordStore, TrialRecord, as_record
from paretoprune.results.store.run_files import (
    Baseline,
    FinalSession,
    FreeMoves,
    Native,
    Selected,
    checked,
    free_move_name,
)


@dataclass(frozen=True)
class RunFolder:
    """The files of one run below `path`. Making one touches nothing on disk."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))

    @property
    def config(self) -> Path:
        """The resolved configuration (YAML)."""
        return self.path / CONFIG

    @property
    def baseline(self) -> Path:
        """The unpruned model's metrics, layers and environment."""
        return self.path / BASELINE_RECORD

    @property
    def free_moves(self) -> Path:
        """The unpruned model at smaller inputs and in other precisions."""
        return self.path / FREE_MOVES

    @property
    def trials_file(self) -> Path:
        """The records of all finished trials."""
        return self.path / TRIALS

    @property
    def study(self) -> Path:
        """Optuna's journal storage."""
        return self.path / STUDY

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

    @property
    def tuned_moves_root(self) -> Path:
        """One folder a free move that was fine-tuned."""
        return self.path / "free_moves"

    def native_dir(self, name: str) -> Path:
        """best.pt and metrics.json of one native rival."""
        return self.native_root / name

    @property
    def session(self) -> Path:
        """The last comparison of all finished networks with each other."""
        return self.path / SESSION

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
        return self.trial_dir(trial_id) / PLAN

    def trial_checkpoint(self, trial_id: str) -> Path:
        """A trial's network."""
        return self.trial_dir(trial_id) / PRUNED

    def selected_dir(self, trial_id: str) -> Path:
        """best.pt, plan.json and metrics.json of one pick."""
        return self.selected_root / trial_id

    def selected_checkpoint(self, trial_id: str) -> Path:
        """The fully fine-tuned network of a pick."""
        return self.selected_dir(trial_id) / BEST

    @cached_property
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
        content, known = checked(self.baseline, Baseline)
        return {**content, "metrics": known.metrics} | ({"imgsz": known.imgsz} if "imgsz" in content else {})

    def write_free_move(
        self, imgsz: ImageSize | None, metrics: Mapping[str, Any], precision: str | None = None
    ) -> Path:
        """Add the unpruned model at an input of `imgsz`, in `precision`, to free_moves.json, atomically."""
        known = {(move.imgsz, move.precision): move.metrics for move in self.read_free_moves()}
        known[imgsz, precision] = dict(metrics)
        rows = [
            {**({"imgsz": size} if size else {}), **({"precision": its} if its else {}), "metrics": found}
            for (size, its), found in known.items()
        ]
        return write_json(self.free_moves, {"schema_version": SCHEMA_VERSION, "moves": rows})

    def read_free_moves(self) -> list[TrialRecord]:
        """The free moves in the form of trials, largest input first, those in the run's precision before others; []
        where none was measured."""
        if not self.free_moves.is_file():
            return []
        moves = checked(self.free_moves, FreeMoves)[1].moves
        moves.sort(key=lambda move: (move.precision or "", -area_of(move.imgsz) if move.imgsz else -math.inf))
        return [
            as_record(free_move_name(move.imgsz, move.precision), move.metrics, move.imgsz, move.precision)
            for move in moves
        ]

    def inside(self, path: str) -> str:
        """`path` as config.yaml names it: relative to the run folder where it lies in it, so that this may be moved."""
        return str(Path(path).relative_to(self.path)) if Path(path).is_relative_to(self.path) else path

    def with_places(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The content of config.yaml with the model's and the dataset's paths as they are here: see `inside`."""
        placed = dict(config)
        for name in ("model", "data"):
            section = placed.get(name)
            if isinstance(section, dict) and isinstance(section.get("path"), str):
                placed[name] = {**section, "path": self._placed(section["path"])}
        return placed

    def _placed(self, path: str) -> str:
        given, here = Path(path), self.path / path
        if given.is_absolute():  # an older run names its copy of the model where it was begun
            here = self.path / "model" / given.name if given.parent.name == "model" else given
        return str(here) if here.exists() else path

    def read_config(self) -> dict[str, Any]:
        """config.yaml as plain data, with paths as they are here; {} where there is none."""
        if not self.config.is_file():
            return {}
        try:
            content = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            detail = one_line(error)
            raise RunFolderError(f"{self.config} must be YAML, but it is not ({detail}): correct it") from error
        return self.with_places(with_present_names(content)) if isinstance(content, dict) else {}

    def objectives(self) -> tuple[str, ...]:
        """The run's objectives: `search.objectives` of its config, or accuracy and latency."""
        section = self.read_config().get("search")
        names = section.get("objectives") if isinstance(section, dict) else None
        return check_objectives(names) if names else DEFAULT_OBJECTIVES

    def write_selected(self, trial_id: str, content: Mapping[str, Any]) -> Path:
        """Write selected/<trial_id>/metrics.json atomically; written last, it says that the pick is ready."""
        return write_json(
            self.selected_dir(trial_id) / METRICS,
            {"schema_version": SCHEMA_VERSION, "trial_id": trial_id, "fidelity": "full", **content},
        )

    def read_selected(self) -> list[Selected]:
        """The picks whose full fine-tuning is finished, by trial id; those without metrics.json are still in work."""
        paths = sorted(self.selected_root.glob("*/metrics.json"))
        return [checked(path, Selected, trial_id=path.parent.name, directory=path.parent)[1] for path in paths]

    def read_session(self) -> dict[str, Any]:
        """session.json, the last comparison of all finished networks; {} where there was none."""
        return checked(self.session, FinalSession)[0] if self.session.is_file() else {}

    def read_natives(self) -> list[Native]:
        """The native rivals that are trained and measured, by name."""
        return _read_rivals(self.native_root)

    def read_tuned_moves(self) -> list[Native]:
        """The free moves that were fine-tuned and measured, by name (unpruned@256)."""
        return _read_rivals(self.tuned_moves_root)

    def model_path(self) -> Path:
        """The unpruned model's checkpoint."""
        return Path(str((self.read_config().get("model") or {}).get("path") or self.read_baseline().get("model") or ""))


def _read_rivals(root: Path) -> list[Native]:
    paths = sorted(root.glob("*/metrics.json"))
    return [checked(path, Native, name=path.parent.name, directory=path.parent)[1] for path in paths]
