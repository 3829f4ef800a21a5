"""What other tools see: TensorBoard's files read back, and the callbacks for MLflow and W&B over pretended packages."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from paretoprune.results.store.records import TrialRecord
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.errors import ConfigError
from paretoprune.search.monitoring.trackers import (
    INTEGRATIONS,
    check_loggers,
    integrations,
    write_finetuning,
    write_missing,
    write_trial,
)
from paretoprune.search.storage.request import TrialRequest


def make_record(name: str) -> TrialRecord:
    return TrialRecord(
        trial_id=name, state="completed", plan_hash="0" * 16, ratios={}, epochs=2, fidelity="epochs", finished_at=1.8e9,
        metrics={"map50_95": 0.5, "latency_ms": 8.0, "speedup_ci95": [1.0, 1.2]}, seconds={"prune": 1.5},
        history=[{"epochs": 0, "map50_95": 0.3}, {"epochs": 2, "map50_95": 0.5}],
    )  # fmt: skip


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) of the event files in a folder, read record by record."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list[tuple[int, float]]] = {}
    for path in folder.glob("events.out.tfevents.*"):
        content = path.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")  # 8 bytes of length, 4 of checksum, the event, 4 of checksum
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, round(value.simple_value, 4)))
    return found


def test_a_trial_is_written_once_with_its_course(tmp_path: Path) -> None:
    folder, record = RunFolder(tmp_path), make_record("t0001")
    write_trial(folder, record)
    seen = scalars(tmp_path / "tensorboard" / "t0001")
    assert seen["course/map50_95"] == [(0, 0.3), (2, 0.5)]
    assert seen["trial/latency_ms"] == [(2, 8.0)]
    assert seen["seconds/prune"] == [(2, 1.5)]
    assert "trial/speedup_ci95" not in seen
    write_missing(folder, [record, make_record("t0002")])
    assert len(list((tmp_path / "tensorboard" / "t0001").iterdir())) == 1
    assert scalars(tmp_path / "tensorboard" / "t0002")


def test_a_full_fine_tuning_is_written_by_epoch(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    rows = [{"time": 1.0, "event": "phase_started"}, {"time": 2.0, "event": "epoch", "epoch": 1, "map50_95": 0.4}]
    events.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_finetuning(RunFolder(tmp_path), "native:n", events)
    seen = scalars(tmp_path / "tensorboard" / "full-native-n")
    assert seen == {"full_finetuning/map50_95": [(1, 0.4)]}


class Pretended:
    """In place of Ray's callback: notes what it was made with and the parameters it was shown."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.shown: list[dict[str, Any]] = []

    def log_trial_start(self, trial: Any) -> None:
        self.shown.append(dict(trial.config))


@pytest.mark.parametrize("name", sorted(INTEGRATIONS))
def test_trackers_are_shown_who_a_trial_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, callback = INTEGRATIONS[name]
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**{callback: Pretended}))
    (logger,) = integrations([name], RunFolder(tmp_path / "my run"))
    assert "my run" in logger.options.values()
    request = TrialRequest(trial_id="t0003", ratios={"a": 0.2, "b": 0.4}, provenance="gp")
    trial = types.SimpleNamespace(config={"request": request.to_text()})
    logger.log_trial_start(trial)
    assert logger.shown == [{"trial_id": "t0003", "provenance": "gp", "layers": 2, "mean_ratio": 0.3}]
    assert trial.config == {"request": request.to_text()}


def test_rays_integrations_are_where_they_are_looked_for() -> None:
    for module, callback in INTEGRATIONS.values():
        assert hasattr(__import__(module, fromlist=[callback]), callback)


def test_a_tracker_that_is_missing_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    check_loggers([])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"search.loggers names wandb, which is not installed; pip install wandb"):
        check_loggers(["wandb"])


class Tracker:
    """In place of a tracker and of Ray's callback for it: fails at set-up, or when it is asked who we are."""

    setup_fails = False
    server_fails = False

    def __init__(self, **options: Any) -> None:
        self.options = options

    def setup(self) -> None:
        if self.setup_fails:
            raise ValueError("No WandB API key found.\n  Either set it, or ...")

    @property
    def viewer(self) -> str:
        if self.server_fails:
            raise ConnectionError("no route to host")
        return "us"

    def log_trial_start(self, trial: Any) -> None: ...


@pytest.mark.parametrize("name", sorted(INTEGRATIONS))
def test_a_tracker_that_cannot_work_is_said_before_any_work(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, callback = INTEGRATIONS[name]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**{callback: Tracker}))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(Api=Tracker))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    check_loggers([name], "a run")
    monkeypatch.setattr(Tracker, "setup_fails", True)
    with pytest.raises(ConfigError, match=rf"search.loggers names {name}, which cannot .*API key found. Either set it"):
        check_loggers([name])


def test_a_server_that_does_not_answer_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    module, callback = INTEGRATIONS["wandb"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**{callback: Tracker}))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(Api=Tracker))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(Tracker, "server_fails", True)
    with pytest.raises(ConfigError, match=r"no route to host\); call `wandb login`, .* or WANDB_MODE=offline"):
        check_loggers(["wandb"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_loggers(["wandb"])
