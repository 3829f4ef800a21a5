"""Output for other trackers: TensorBoard's event files always, MLflow and Weights & Biases where asked for.

The latter two are Ray's own integrations (``ray.air.integrations``); they are given a trial's figures and, in place of
Tune's parameters, who the trial is.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from paretoprune.base.errors import one_line
from paretoprune.base.messages import note
from paretoprune.results.store.accuracy import accuracies
from paretoprune.results.store.records import TrialRecord
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.errors import ConfigError
from paretoprune.search.storage.event_log import events_of
from paretoprune.search.storage.request import TrialRequest

TENSORBOARD = "tensorboard"
INTEGRATIONS = {
    "mlflow": ("ray.air.integrations.mlflow", "MLflowLoggerCallback"),
    "wandb": ("ray.air.integrations.wandb", "WandbLoggerCallback"),
}

SECONDS_TO_ANSWER = 10
OFFLINE = ("offline", "disabled")
_REMEDIES = {
    "mlflow": "start the server that MLFLOW_TRACKING_URI names, or unset it to write into the run folder",
    "wandb": "call `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline",
}


def write_trial(folder: RunFolder, record: TrialRecord) -> None:
    """Write ``tensorboard/<trial_id>``: accuracy by epoch, the final figures, the seconds of each phase. Once each."""
    target = folder.path / TENSORBOARD / record.trial_id
    if target.exists():
        return
    rows: list[tuple[int, Mapping[str, Any]]] = [
        (int(row["epochs"]), {f"course/{key}": row[key] for key in row if key != "epochs"}) for row in record.history
    ]
    rows.append((record.epochs, {f"trial/{name}": value for name, value in numbers(record.metrics).items()}))
    rows.append((record.epochs, {f"seconds/{name}": value for name, value in record.seconds.items()}))
    _write(target, rows, record.finished_at)


def write_finetuning(folder: RunFolder, name: str, events: Path) -> None:
    """Write ``tensorboard/full-<name>``: accuracy by epoch of a full fine-tuning, from its ``events.jsonl``."""
    rows = [
        (int(event["epoch"]), {f"full_finetuning/{key}": event[key] for key in accuracies(event)})
        for event in events_of(events, "epoch")
    ]
    _write(folder.path / TENSORBOARD / f"full-{name.replace(':', '-')}", rows, None)


def write_missing(folder: RunFolder, records: Iterable[TrialRecord]) -> None:
    """``write_trial`` for every record that has none yet: of a driver that died, or of an older run."""
    for record in records:
        write_trial(folder, record)


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The plain numbers among some metrics."""
    return {name: value for name, value in metrics.items() if isinstance(value, (int, float)) and value == value}


def _write(target: Path, rows: Sequence[tuple[int, Mapping[str, Any]]], walltime: float | None) -> None:
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(target), write_to_disk=True) as writer:
        for step, values in rows:
            for name, value in numbers(values).items():
                writer.add_scalar(name, value, step, walltime=walltime)


def check_loggers(names: Sequence[str], title: str = "paretoprune") -> None:
    """Raise ConfigError where a tool that was asked for is not installed, nobody is logged in, or nobody answers.

    What a run named ``title`` would do after its unpruned model was measured is done now: the callbacks are made and
    set up, which also makes its experiment on an MLflow server; W&B is asked who we are.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"search.loggers names {name}, which is not installed; pip install {name}, or leave it out"
            )
    for name in names:
        note(f"asking {name} whether it can be used")
        with tempfile.TemporaryDirectory(prefix="paretoprune-tracker-") as scratch, _short_answers():
            try:
                (callback,) = integrations([name], RunFolder(Path(scratch) / title))
                (Path(scratch) / title).mkdir()
                callback.setup()
                if name == "wandb" and os.environ.get("WANDB_MODE") not in OFFLINE:
                    importlib.import_module(name).Api(timeout=SECONDS_TO_ANSWER).viewer  # noqa: B018 - asks the server
            except Exception as error:  # whatever a tracker and its libraries raise; all mean that it cannot be used
                line = one_line(error, 200)
                raise ConfigError(
                    f"search.loggers names {name}, which cannot be used ({type(error).__name__}: {line}); "
                    f"{_REMEDIES[name]}, or leave it out"
                ) from error


@contextmanager
def _short_answers() -> Iterator[None]:
    """MLflow asks a server that is not there seven times, for minutes: once is enough for a check."""
    short = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": str(SECONDS_TO_ANSWER)}
    before = {name: os.environ.get(name) for name in short}
    os.environ.update({name: value for name, value in short.items() if before[name] is None})
    try:
        yield
    finally:
        for name in (name for name in short if before[name] is None):
            os.environ.pop(name, None)


def integrations(names: Sequence[str], folder: RunFolder) -> list[Any]:
    """Tune's callbacks for the tools that were asked for; each run is one experiment (project) of its folder's name.

    Where they send it, their own environment says (``MLFLOW_TRACKING_URI``, ``WANDB_MODE`` ...); without one MLflow
    writes ``mlflow.db`` into the run folder.
    """
    found = []
    for name in names:
        module, callback = INTEGRATIONS[name]
        base = getattr(importlib.import_module(module), callback)
        shown = type(f"Named{callback}", (base,), {"log_trial_start": _named(base)})
        found.append(shown(**_options(name, folder)))
    return found


def _options(name: str, folder: RunFolder) -> dict[str, Any]:
    title = folder.path.resolve().name
    if name == "wandb":
        return {"project": title}
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.path.resolve() / 'mlflow.db'}"
    return {"experiment_name": title, "tracking_uri": uri}


def _named(base: type[Any]) -> Any:
    """``log_trial_start`` that shows the trial's id, origin and mean ratio for the request that Tune knows it by."""

    def log_trial_start(self: Any, trial: Any) -> None:
        known = trial.config
        request = TrialRequest.from_text(known["request"])
        ratios = list(request.ratios.values())
        mean = sum(ratios) / len(ratios) if ratios else 0.0
        trial.config = {"trial_id": request.trial_id, "provenance": request.provenance, "layers": len(ratios)}
        trial.config["mean_ratio"] = round(mean, 4)
        try:
            base.log_trial_start(self, trial)
        finally:
            trial.config = known

    return log_trial_start
