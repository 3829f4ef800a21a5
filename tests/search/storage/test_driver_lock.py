"""Two drivers on one run folder: the second is refused, by the kernel here, by the heartbeat from another host."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from paretoprune.search.errors import RunFolderError
from paretoprune.search.storage import driver_lock
from paretoprune.search.storage.driver_lock import LOCK_NAME, DriverLock, alive_driver

ROOT = Path(__file__).resolve().parents[3]

# Holds the lock until it is killed; with "elsewhere" it does so as another host whose kernel's locks do not reach us.
HOLDER = """
import fcntl, platform, sys, time
from pathlib import Path
from paretoprune.search.storage import driver_lock
if "elsewhere" in sys.argv:
    platform.node = lambda: "other-host"
    fcntl.flock = lambda handle, mode: None
driver_lock.BEAT_SECONDS = 0.1
with driver_lock.DriverLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_lock, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(driver_lock, "LOOK_SECONDS", 3.0)


@pytest.fixture
def holder(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path), request.param], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    ("holder", "host"), [("here", platform.node()), ("elsewhere", "other-host")], indirect=["holder"]
)
def test_refused_while_the_first_lives_and_let_in_after_it_was_killed(
    holder: subprocess.Popen[str], host: str, tmp_path: Path
) -> None:
    """Elsewhere: storage whose locks do not reach from host to host, so that only the heartbeat tells."""
    with (
        pytest.raises(RunFolderError, match=rf"host {host}, pid {holder.pid}\); wait for it") as caught,
        DriverLock(tmp_path),
    ):
        pass
    assert (caught.value.host, caught.value.pid) == (host, holder.pid)
    driver = alive_driver(tmp_path)
    assert driver is not None
    assert (driver.host, driver.pid) == (host, holder.pid)

    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert alive_driver(tmp_path) is None
    with DriverLock(tmp_path):
        assert alive_driver(tmp_path) == driver_lock.Driver(platform.node(), os.getpid(), *_since_and_more(tmp_path))


def test_a_driver_that_left_in_order_is_not_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(platform, "node", lambda: "other-host")
        with DriverLock(tmp_path):
            pass
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("looked"))
    with DriverLock(tmp_path):
        pass


def test_a_status_that_looks_at_the_moment_of_a_start_does_not_refuse_it(tmp_path: Path) -> None:
    import fcntl
    import threading

    (tmp_path / LOCK_NAME).touch()
    with (tmp_path / LOCK_NAME).open("rb") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(0.15, lambda: fcntl.flock(looking, fcntl.LOCK_UN)).start()
        with DriverLock(tmp_path):
            assert alive_driver(tmp_path) is not None


@pytest.mark.parametrize("content", ["", "{", '{"host": 1}', "[]", '{"pid": 3, "unknown": true}'])
def test_a_damaged_or_older_lock_file_locks_nobody_out(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK_NAME).write_text(content)
    assert alive_driver(tmp_path) is None
    with DriverLock(tmp_path) as lock:
        lock.describe(slots=3)
        driver = alive_driver(tmp_path)
        assert driver is not None
        assert (driver.pid, driver.slots) == (os.getpid(), 3)


def _since_and_more(run: Path) -> tuple[float, int, int]:
    driver = alive_driver(run)
    assert driver is not None
    return driver.since, driver.slots, driver.beat
