"""Nothing is lost: what dies, and what must hold afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.faults.scenarios import (
    KILLS,
    Row,
    disk_full,
    drivers_killed,
    node_killed,
    was_repeated,
    workers_killed,
)
from tests.faults.tools import AGAIN, BEGIN, END

pytestmark = pytest.mark.slow


@pytest.fixture
def check(record_property: Callable[[str, object], None]) -> Callable[[Row], None]:
    """What holds for every scenario; the row is kept for the table that `benchmarks.faults` writes."""

    def checked(row: Row) -> None:
        record_property("row", json.dumps(asdict(row)))
        _check(row)

    return checked


def _check(row: Row) -> None:
    assert (row.lost, row.repeated, row.zombies) == (0, 0, 0), row
    assert row.finished == row.asked, row


@pytest.mark.parametrize(
    ("steps", "repeated"),
    [
        ([(BEGIN, 1), (END, 1)], False),
        ([(BEGIN, 1), (BEGIN, 2), (END, 2)], False),  # the first was killed in its work,
        ([(BEGIN, 1), (END, 1), (BEGIN, 2), (END, 2)], False),  # or in front of its record
        ([(BEGIN, 1), (END, 1), (AGAIN, 2)], True),
        ([(BEGIN, 1), (BEGIN, 2), (END, 1), (END, 2)], True),
    ],
)
def test_what_counts_as_repeated(steps: list[tuple[str, int]], repeated: bool) -> None:
    assert was_repeated([{"what": what, "pid": pid} for what, pid in steps]) == repeated


@pytest.mark.usefixtures("ray_session")
def test_driver_killed_at_seeded_moments(tmp_path: Path, check: Callable[[Row], None]) -> None:
    import ray

    row = drivers_killed(tmp_path, ray.get_runtime_context().gcs_address)
    check(row)
    assert row.faults == KILLS
    assert row.failed == 0


@pytest.mark.usefixtures("ray_session")
def test_workers_killed(tmp_path: Path, check: Callable[[Row], None]) -> None:
    row = workers_killed(tmp_path)
    check(row)
    assert row.faults == 3
    assert row.failed == 1  # the plan that kills everybody who works on it
    assert "given up: worker: its process died" in row.note


def test_a_node_killed(tmp_path: Path, check: Callable[[Row], None]) -> None:
    row = node_killed(tmp_path)
    check(row)
    assert (row.faults, row.failed) == (1, 0)
    assert "1 trials were begun again" in row.note or "2 trials were begun again" in row.note
    assert "its node" in row.note


def test_disk_full(tmp_path: Path, check: Callable[[Row], None]) -> None:
    row = disk_full(tmp_path)
    if row is None:
        pytest.skip("a disk that is full needs a mount, and this user may not (neither root nor user namespaces)")
    check(row)
    assert "No space left on device" in row.note
