"""A person who measures is told where others keep the device."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from cluster.device_lock import DeviceLock
from search import measuring
from search.measuring import alone_on


def test_waiting_for_the_device_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARETOPRUNE_LOCK_DIR", str(tmp_path))
    monkeypatch.setattr(measuring, "SAID_AFTER_S", 0.01)
    entered, leave, said = threading.Event(), threading.Event(), []

    def train() -> None:
        with DeviceLock("cpu").using():
            entered.set()
            leave.wait(60)

    def heard(line: str) -> None:
        said.append(line)
        leave.set()  # only now does the other one go

    monkeypatch.setattr(measuring, "note", heard)
    other = threading.Thread(target=train)
    other.start()
    entered.wait()
    with alone_on("cpu"):
        other.join()
    assert said == ["waiting until what else uses cpu on this host has ended its batch or measurement"]
    with monkeypatch.context() as patient:
        patient.setattr(measuring, "SAID_AFTER_S", 60.0)
        with alone_on("cpu"):
            pass
    assert len(said) == 1
