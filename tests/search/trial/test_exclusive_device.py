"""Latency is timed with the device alone, whoever asks; a person is told where others keep the device."""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paretoprune.cluster.device_lock import DeviceLock
from paretoprune.pruning.builtin import BASELINE, IMGSZ
from paretoprune.search.config.run_config import build_config, nest
from paretoprune.search.trial import exclusive_device
from paretoprune.search.trial.exclusive_device import alone_on
from paretoprune.search.trial.operations import PruningOperations
from paretoprune.search.trial.remote_latency import MeasuringJob, measure_there
from tests.pruning.recovery_material import shapes_dataset


@pytest.fixture
def states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What the kernel says of the CPU's room at each opening of a network and each timing: free, shared or alone."""
    monkeypatch.setenv("PARETOPRUNE_LOCK_DIR", str(tmp_path))
    room = DeviceLock("cpu").directory / "room"
    found: dict[str, list[str]] = {"open_session": [], "time_pair": [], "energy_per_inference": []}

    def state() -> str:
        with room.open("a") as file:
            for mode, name in ((fcntl.LOCK_EX, "free"), (fcntl.LOCK_SH, "shared")):
                try:
                    fcntl.flock(file, mode | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                return name
        return "alone"

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*given: Any, **named: Any) -> Any:
            found[name].append(state())
            return function(*given, **named)

        return noted

    from paretoprune.pruning.latency import pair

    for name in ("open_session", "time_pair"):
        monkeypatch.setattr(pair, name, noting(name, getattr(pair, name)))
    monkeypatch.setattr(
        "paretoprune.pruning.latency.energy.energy_per_inference", noting("energy_per_inference", lambda *given: 1.0)
    )
    return found


def test_a_trial_makes_networks_ready_beside_others_and_times_alone(
    states: dict[str, list[str]], tmp_path: Path
) -> None:
    settings = {
        "model.path": str(BASELINE), "model.imgsz": IMGSZ, "latency.max_seconds": 0.2, "latency.threads": 1,
        "data.path": str(shapes_dataset(tmp_path / "shapes")), "search.objectives": ["map50_95", "energy_j"],
    }  # fmt: skip
    tools = PruningOperations(build_config(nest(settings)), "cpu", DeviceLock("cpu"))
    tools.start_measure(tools.baseline)
    assert set(states["open_session"]) == {"shared"}
    assert set(states["time_pair"]) == set(states["energy_per_inference"]) == {"alone"}


def test_a_target_elsewhere_is_alone_while_it_times(states: dict[str, list[str]]) -> None:
    job = MeasuringJob(
        suffix=".pt", channels=3, baseline_key="its hash", imgsz=IMGSZ, baseline_imgsz=IMGSZ, batch=1, threads=1,
        max_seconds=0.2, target_halfwidth=0.01, runtime="torch", half=False, cpu=True,
    )  # fmt: skip
    measure_there(job, BASELINE.read_bytes(), BASELINE.read_bytes())
    assert set(states["open_session"]) == {"shared"}
    assert set(states["time_pair"]) == {"alone"}


def test_waiting_for_the_device_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARETOPRUNE_LOCK_DIR", str(tmp_path))
    monkeypatch.setattr(exclusive_device, "SAID_AFTER_S", 0.01)
    entered, leave, said = threading.Event(), threading.Event(), []

    def train() -> None:
        with DeviceLock("cpu").using():
            entered.set()
            leave.wait(60)

    def heard(line: str) -> None:
        said.append(line)
        leave.set()  # only now does the other one go

    monkeypatch.setattr(exclusive_device, "note", heard)
    other = threading.Thread(target=train)
    other.start()
    entered.wait()
    with alone_on("cpu"):
        other.join()
    assert said == ["waiting for other jobs on cpu to finish"]
    with monkeypatch.context() as patient:
        patient.setattr(exclusive_device, "SAID_AFTER_S", 60.0)
        with alone_on("cpu"):
            pass
    assert len(said) == 1
