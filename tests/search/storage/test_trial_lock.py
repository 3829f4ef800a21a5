"""One worker per trial folder, whatever an earlier driver left behind."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from paretoprune.search.storage import trial_lock
from paretoprune.search.storage.trial_lock import claimed

ROOT = Path(__file__).resolve().parents[3]
HOLDER = """
import sys, time
from pathlib import Path
from paretoprune.search.storage.trial_lock import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
    (Path(sys.argv[1]) / "record.json").write_text("{}")
"""


@contextmanager
def holder(folder: Path, seconds: float) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), str(seconds)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def test_the_second_waits_until_the_first_is_done(tmp_path: Path) -> None:
    heard: list[str] = []
    with holder(tmp_path, 1.0) as first, claimed(tmp_path, heard.append):
        assert (tmp_path / "record.json").is_file()
    assert heard == [f"host {platform.node()}, pid {first.pid}"]


def test_the_second_goes_on_where_the_first_was_killed(tmp_path: Path) -> None:
    with holder(tmp_path, 600):
        pass
    with claimed(tmp_path, lambda holder: pytest.fail("waited")):
        assert not (tmp_path / "record.json").exists()


def test_a_holder_that_gives_no_sign_for_long_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial_lock, "GIVE_UP_SECONDS", 1.0)
    monkeypatch.setattr(trial_lock, "POLL_SECONDS", 0.1)
    with holder(tmp_path, 600) as first, claimed(tmp_path):
        assert first.poll() is None


def test_storage_without_locks_keeps_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(handle: int, mode: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    with claimed(tmp_path, lambda holder: pytest.fail("waited")):
        pass


def test_what_a_killed_writer_left_goes_with_the_next_one_to_work_there(tmp_path: Path) -> None:
    (tmp_path / ".pruned.pt.ab12.tmp").write_bytes(b"half")
    (tmp_path / "pruned.pt").write_bytes(b"whole")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / ".pruned.pt.cd34.tmp").write_bytes(b"another's")
    with claimed(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["pruned.pt", "sub", trial_lock.CLAIM_NAME]
    assert (tmp_path / "sub" / ".pruned.pt.cd34.tmp").exists()
