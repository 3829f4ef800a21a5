"""One place for all users, jobs and TMPDIRs of a host; nothing that somebody planted there is followed."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from paretoprune.cluster import lock_directory
from paretoprune.cluster.device_lock import DeviceLock
from paretoprune.cluster.errors import LockDirectoryError
from paretoprune.cluster.lock_directory import DIRECTORY_VARIABLE, key_directory, lock_place

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534

# Stands where it is told to stand, and says whether the device can be had at once.
SOMEBODY = """
import fcntl, os, sys
uid = int(sys.argv[3])
sys.path.insert(0, sys.argv[2])
from paretoprune.cluster.device_lock import DeviceLock
if uid: os.setgid(uid); os.setuid(uid)
os.umask(0o077)
lock = DeviceLock(sys.argv[1])
with lock.measuring(), lock.using(): print("in", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A device that nobody else has, in the real place."""
    monkeypatch.delenv(DIRECTORY_VARIABLE, raising=False)
    name = f"test-{os.getpid()}-{os.urandom(4).hex()}"
    yield name
    shutil.rmtree(lock_place().base / name, ignore_errors=True)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def somebody(key: str, temporary: Path, uid: int = 0) -> subprocess.Popen[str]:
    temporary.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != DIRECTORY_VARIABLE}
    return subprocess.Popen(
        [sys.executable, "-c", SOMEBODY, key, str(ROOT), str(uid)], env={**environment, "TMPDIR": str(temporary)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.skipif(not lock_directory._is_for_all(Path("/dev/shm")), reason="this system has no /dev/shm for all")
def test_processes_with_a_tmpdir_each_and_other_users_exclude_each_other(tmp_path: Path, key: str) -> None:
    lock = DeviceLock(key)
    others = {"a": 0, "b": 0} if os.geteuid() else {"a": 0, "b": NOBODY}
    with lock.measuring():
        waiting = [somebody(key, tmp_path / name, uid) for name, uid in others.items()]
        for process in waiting:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)
    for process in waiting:
        out, _ = process.communicate("\n", timeout=30)
        assert out == "in\n"
    assert mode(lock.directory) == 0o1777
    assert [path.name for path in lock.directory.iterdir()] == ["room"]


@pytest.mark.skipif(os.geteuid() != 0, reason="makes files of another user")
def test_a_dead_ticket_of_another_user_holds_nobody_up(tmp_path: Path, key: str) -> None:
    lock = DeviceLock(key)
    dead = lock.directory / "1-1-00000000.ticket"
    dead.touch(0o644)
    out, _ = somebody(key, tmp_path / "a", NOBODY).communicate("\n", timeout=30)
    assert out == "in\n"
    assert dead.exists(), "only its owner may remove it"
    with lock.using():
        assert not dead.exists()


def test_what_a_killed_measurer_left_before_its_ticket_was_up_goes(tmp_path: Path) -> None:
    lock = DeviceLock("cpu", tmp_path)
    left, other = lock.directory / "77-88-0123abcd.new", lock.directory / "mine.new"
    left.touch()
    other.touch()
    with lock.measuring():
        assert not left.exists()
    assert other.exists(), "nothing but what has the form of a ticket"


def test_the_place_comes_back_where_it_was_cleaned_away(tmp_path: Path) -> None:
    lock = DeviceLock("cpu", tmp_path / "locks")
    for enter in (lock.using, lock.measuring):
        shutil.rmtree(tmp_path / "locks")
        with enter():
            assert (lock.directory / "room").exists()


def place_with(mounts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> lock_directory.LockPlace:
    monkeypatch.delenv(DIRECTORY_VARIABLE, raising=False)
    monkeypatch.setattr(lock_directory, "_MOUNTS", tmp_path / "mountinfo")
    (tmp_path / "mountinfo").write_text(mounts)
    return lock_place()


def test_memory_file_systems_first_and_a_job_s_own_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for_all = tmp_path / "place"
    for_all.mkdir()
    for_all.chmod(0o1777)
    monkeypatch.setattr(lock_directory, "_MEMORY_PLACES", ("/nowhere", str(for_all)))
    line = f"30 25 0:27 / {for_all} rw,relatime shared:3 - tmpfs tmpfs rw,size=1k\n"
    hosts = place_with(line, tmp_path, monkeypatch)
    assert (hosts.base.parent, hosts.caveat) == (for_all, "")
    jobs = place_with(2 * line, tmp_path, monkeypatch)
    assert jobs.base == hosts.base
    assert "own: what runs outside of it is not kept off while latency is measured" in jobs.caveat
    # On a container's own disk nobody else finds it; nor does anybody where not everybody may write.
    assert place_with(line.replace("tmpfs", "overlay"), tmp_path, monkeypatch).base.parent != for_all
    for_all.chmod(0o755)
    assert place_with(line, tmp_path, monkeypatch).base.parent != for_all


def test_where_nothing_is_for_all_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(lock_directory, "_is_for_all", lambda path: False)
    place = place_with("", tmp_path, monkeypatch)
    assert place.base.parent == tmp_path
    assert "follows TMPDIR" in place.caveat


def test_the_variable_names_another_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = tmp_path / "mine"
    chosen.mkdir(mode=0o755)
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(chosen))
    assert key_directory("cpu") == chosen / "cpu"
    assert mode(chosen) == 0o755, "a directory the user named may serve other ends: its mode is the user's"
    assert lock_place() == lock_directory.LockPlace(chosen)


def test_planted_links_and_pipes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "cpu").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LockDirectoryError, match=rf"everybody can write, but .* is l.*set {DIRECTORY_VARIABLE}"):
        key_directory("cpu", tmp_path)
    lock = DeviceLock("gpu", tmp_path)
    room = lock.directory / "room"
    room.symlink_to(tmp_path / "elsewhere" / "file")
    for _ in range(2):
        with pytest.raises(LockDirectoryError, match="must be a file that everybody can read"), lock.using():
            pass
        room.unlink()
        os.mkfifo(room)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_file_in_the_way_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LockDirectoryError) as caught:
        key_directory("cpu", tmp_path / "file")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "file") in str(caught.value)


@pytest.mark.parametrize("key", ["../../up", "a/b", "..", "", "x" * 500, "GPU-0f\n"])
def test_no_key_climbs_out(tmp_path: Path, key: str) -> None:
    assert key_directory(key, tmp_path).parent == tmp_path
