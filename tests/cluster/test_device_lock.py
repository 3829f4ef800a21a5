"""Real processes on real locks. Nothing waits for a time to pass: a broken lock hangs (the timeout) or overlaps."""

from __future__ import annotations

import fcntl
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from paretoprune.cluster import device_lock
from paretoprune.cluster.device_lock import DeviceLock
from paretoprune.cluster.errors import LockOrderError

ACTOR = Path(__file__).with_name("lock_actor.py")

pytestmark = pytest.mark.timeout(120)


class Actor:
    """A lock_actor.py process and its pipes."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, str(ACTOR), *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def leave(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


Start = Callable[..., Actor]


@pytest.fixture
def start() -> Iterator[Start]:
    actors: list[Actor] = []

    def start_one(*arguments: object) -> Actor:
        actors.append(Actor(*arguments))
        return actors[-1]

    yield start_one
    for actor in actors:
        actor.kill()
        for pipe in (actor.process.stdin, actor.process.stdout):
            if pipe is not None:
                pipe.close()


def is_free(lock: DeviceLock, mode: int) -> bool:
    """Ask the kernel, past our own code, whether the room could be entered in `mode` right now."""
    fd = os.open(lock.directory / "room", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        return True
    finally:
        os.close(fd)


def tickets(lock: DeviceLock) -> list[str]:
    return sorted(path.name for path in lock.directory.glob("*.ticket"))


def test_users_are_in_together(start: Start, tmp_path: Path) -> None:
    first, second = (start("hold-using", "cpu", tmp_path) for _ in range(2))
    assert [first.hear(), first.hear(), second.hear(), second.hear()] == ["asking", "in", "asking", "in"]
    lock = DeviceLock("cpu", tmp_path)
    assert is_free(lock, fcntl.LOCK_SH)
    assert not is_free(lock, fcntl.LOCK_EX)


def test_a_measurer_is_alone(start: Start, tmp_path: Path) -> None:
    measurer = start("hold-measuring", "cpu", tmp_path)
    assert [measurer.hear(), measurer.hear()] == ["asking", "in"]
    lock = DeviceLock("cpu", tmp_path)
    assert not is_free(lock, fcntl.LOCK_SH)
    user = start("hold-using", "cpu", tmp_path)
    assert user.hear() == "asking"
    measurer.leave()
    assert measurer.hear() == "out"
    assert user.hear() == "in"
    assert tickets(lock) == []


def test_another_device_is_not_touched(start: Start, tmp_path: Path) -> None:
    measurer = start("hold-measuring", "GPU-0", tmp_path)
    assert [measurer.hear(), measurer.hear()] == ["asking", "in"]
    with DeviceLock("GPU-1", tmp_path).measuring(), DeviceLock("cpu", tmp_path).using():
        assert measurer.process.poll() is None


def test_no_interval_of_a_measurer_overlaps_any_other(start: Start, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    roles = {"u1": "using", "u2": "using", "u3": "using", "m1": "measuring", "m2": "measuring"}
    actors = [start("journal", "cpu", tmp_path, name, mode, 150, log) for name, mode in roles.items()]
    assert [actor.process.wait() for actor in actors] == [0] * 5
    present: set[str] = set()
    shared = 0
    for line in log.read_text().splitlines():
        sign, name = line[0], line[1:]
        if sign == "-":
            present.remove(name)
            continue
        assert not any(other.startswith("m") for other in present), (name, present)
        assert not (name.startswith("m") and present), (name, present)
        present.add(name)
        shared += len(present) > 1
    assert len(log.read_text().splitlines()) == 5 * 150 * 2
    assert shared, "users were never in together, so the run shows nothing"


class Watched(DeviceLock):
    """Notes the users' counts at the moment the ticket is up."""

    counts_file: Path
    at_ticket: tuple[int, ...] = ()

    def counts(self) -> tuple[int, ...]:
        return struct.unpack("<3q", self.counts_file.read_bytes())

    @contextmanager
    def _ticket(self) -> Iterator[None]:
        with super()._ticket():
            self.at_ticket = self.counts()
            yield


def test_a_measurer_goes_before_hammering_users(start: Start, tmp_path: Path) -> None:
    lock = Watched("cpu", tmp_path)
    lock.counts_file = tmp_path / "counts"
    lock.counts_file.write_bytes(bytes(24))
    for slot in range(3):
        start("hammer", "cpu", tmp_path, lock.counts_file, slot)
    for _ in range(25):
        before = lock.counts()
        while any(now <= then for now, then in zip(lock.counts(), before, strict=True)):
            os.sched_yield()  # until each of the three is at it again
        with lock.measuring():
            inside = lock.counts()
            late = [now - then for now, then in zip(inside, lock.at_ticket, strict=True)]
            # The batch a user had passed the tickets for, and no other: a bound by construction, not by luck.
            assert max(late) <= 1, late
            assert lock.counts() == inside


@pytest.mark.parametrize("role", ["hold-using", "hold-measuring", "fork-using", "fork-measuring"])
def test_a_killed_holder_leaves_nothing_locked(start: Start, tmp_path: Path, role: str) -> None:
    holder = start(role, "cpu", tmp_path)
    assert holder.hear() == "asking"
    # A forked child (a data-loading worker) outlives its parent for a while and shares its open files.
    child = int(holder.hear()) if role.startswith("fork") else None
    assert holder.hear() == "in"
    lock = DeviceLock("cpu", tmp_path)
    assert not is_free(lock, fcntl.LOCK_EX)
    holder.kill()
    try:
        assert is_free(lock, fcntl.LOCK_EX)
        with lock.using():
            assert tickets(lock) == [], "a dead measurer's ticket is cleared away by the first user"
        with lock.measuring():
            pass
        if child:
            os.kill(child, 0)  # it did live all the while
    finally:
        if child:
            os.kill(child, signal.SIGKILL)


def test_a_measurer_killed_while_waiting_lets_users_go_on(start: Start, tmp_path: Path) -> None:
    lock = DeviceLock("cpu", tmp_path)
    with lock.using():
        measurer = start("hold-measuring", "cpu", tmp_path)
        assert measurer.hear() == "asking"
        while not tickets(lock):
            os.sched_yield()
        user = start("hold-using", "cpu", tmp_path)
        assert user.hear() == "asking"
        measurer.kill()
        assert user.hear() == "in"
    assert tickets(lock) == []


def test_two_objects_in_two_threads_exclude_each_other(tmp_path: Path) -> None:
    entered, leave, done = threading.Event(), threading.Event(), threading.Event()

    def measure() -> None:
        with DeviceLock("cpu", tmp_path).measuring():
            entered.set()
            leave.wait()
        done.set()

    thread = threading.Thread(target=measure)
    thread.start()
    entered.wait()
    other = DeviceLock("cpu", tmp_path)
    assert not is_free(other, fcntl.LOCK_SH)
    leave.set()
    with other.measuring():
        thread.join()
    assert done.is_set()


def test_two_objects_in_one_thread_are_one_holder(tmp_path: Path) -> None:
    outer, inner = DeviceLock("cpu", tmp_path), DeviceLock("cpu", tmp_path)
    with outer.measuring():
        with inner.using(), inner.measuring(), outer.using():
            pass
        assert not is_free(outer, fcntl.LOCK_SH), "the inner ones must not unlock the outer one"
    with outer.using():
        with inner.using():
            pass
        assert not is_free(outer, fcntl.LOCK_EX)
        with pytest.raises(LockOrderError, match=r"this thread is using cpu; leave using\(\) first"), inner.measuring():
            pass
        assert not is_free(outer, fcntl.LOCK_EX)
    assert is_free(outer, fcntl.LOCK_EX)


def test_the_last_one_out_unlocks_in_whatever_order(tmp_path: Path) -> None:
    """A generator that holds the lock may be closed after what was entered later: that must not lose count."""
    lock = DeviceLock("cpu", tmp_path)
    first, second = lock.using(), lock.using()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not is_free(lock, fcntl.LOCK_EX)
    second.__exit__(None, None, None)
    assert is_free(lock, fcntl.LOCK_EX)
    with lock.using():
        assert not is_free(lock, fcntl.LOCK_EX)


def test_an_exception_inside_unlocks(tmp_path: Path) -> None:
    lock = DeviceLock("cpu", tmp_path)
    for context in (lock.using, lock.measuring):
        with pytest.raises(ZeroDivisionError), context():
            raise ZeroDivisionError
        assert is_free(lock, fcntl.LOCK_EX)
    assert tickets(lock) == []


def test_leaving_unlocks_even_where_a_copy_of_the_descriptor_lives_on(tmp_path: Path) -> None:
    """As in a process that was forked behind Python's back and has not come to its exec yet."""
    lock = DeviceLock("cpu", tmp_path)
    with lock.using():
        copies = [os.dup(fd) for fd in device_lock._open_fds]
    try:
        assert copies
        assert is_free(lock, fcntl.LOCK_EX)
    finally:
        for fd in copies:
            os.close(fd)


def test_a_removed_file_does_not_split_the_lock(tmp_path: Path) -> None:
    """A cleaner of temporary files takes the room away; one who waited for the old file locks the new one."""
    lock = DeviceLock("cpu", tmp_path)
    room = lock.directory / "room"
    entered, leave = threading.Event(), threading.Event()

    def measure() -> None:
        with lock.measuring():
            entered.set()
            leave.wait()

    with lock.using():
        thread = threading.Thread(target=measure)
        thread.start()
        while not tickets(lock):
            os.sched_yield()
        room.unlink()
    entered.wait()
    try:
        assert room.exists()
        assert not is_free(lock, fcntl.LOCK_SH)
    finally:
        leave.set()
        thread.join()


def test_a_lock_travels(tmp_path: Path) -> None:
    lock = DeviceLock("GPU-ab/../cd", tmp_path / "locks")
    copy = pickle.loads(pickle.dumps(lock))
    assert copy.device_key == lock.device_key
    assert copy.directory == lock.directory
    assert lock.directory.parent == tmp_path / "locks"
