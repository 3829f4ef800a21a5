"""One measurement at a time, and nothing else on the device while it runs.

Every batch of a training or validation holds the device's *room* in common with other batches (`using`). A latency
measurement holds the room alone (`measuring`). Both are `flock`s on a file, so the kernel lets go when a process dies,
however it dies, and every process on this host that names the same device takes part, of whatever run and user (see
`cluster.lock_directory` for where the files lie).

Precedence. A plain read-write lock starves the measurer: with several trainings there is always a batch in the room.
So a measurer first puts up a *ticket*, a locked file of its own beside the room, and whoever wants to use the device
waits until no ticket is left. After a ticket is up, each user finishes its batch and can begin at most one more (it may
have looked just before); then the room drains and the measurer enters. A ticket needs nobody's consent, so users cannot
delay it: a turnstile lock that users pass through can, because `flock` is not fair to the one who waits.

What a caller must see to:
- Work sent to a GPU is asynchronous: synchronise before leaving `using()`, or the batch still runs afterwards.
- Do not wait inside `using()` for another process that itself needs `using()` (data-loading workers): a measurer's
  ticket would keep that process out, and the room would never drain. Fetch the batch first, then enter.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from paretoprune.cluster.devices import device_key
from paretoprune.cluster.errors import LockDirectoryError, LockOrderError
from paretoprune.cluster.lock_directory import REMEDY, key_directory

__all__ = ["DeviceLock", "DevicesUsed", "device_key", "seconds_waited"]

# <pid>-<thread>-<random>, then one of the two. Nothing else is ever removed: who owns the directory could swap it.
_NEW_SUFFIX, _TICKET_SUFFIX = ".new", ".ticket"
_TICKET_NAME = re.compile(r"\d+-\d+-[0-9a-f]{8}\.(new|ticket)")
_MAKER_SECONDS = 2.0

# Descriptors that hold a lock in this process, and what the present thread holds, by room.
_open_fds: set[int] = set()
_held = threading.local()
_waited = threading.local()


def seconds_waited() -> float:
    """How long this thread has stood still for others at the doors of all devices, in seconds since it began."""
    return float(_waited.__dict__.get("seconds", 0.0))


@dataclass
class _Hold:
    """A thread's stay in a room: how it entered, what leaves it, and how often it has entered since."""

    mode: int
    stack: ExitStack
    count: int = 0


def _forget_in_child() -> None:
    """A forked child shares its parent's open files: left open, they would keep the locks of a parent that died."""
    global _held
    _held = threading.local()
    for fd in list(_open_fds):
        with suppress(OSError):
            os.close(fd)
    _open_fds.clear()


os.register_at_fork(after_in_child=_forget_in_child)


class DeviceLock:
    """The lock of one device of this host. Cheap to make, to pickle and to hand on; holds nothing by itself.

    Threads exclude each other like processes do. Within one thread, `using` may be nested in `using` or `measuring`,
    through any number of lock objects of the same device (the inner one does nothing); `measuring` inside `measuring`
    likewise; `measuring` inside `using` raises LockOrderError.
    """

    def __init__(self, device_key: str, directory: Path | None = None) -> None:
        self.device_key = device_key
        self._given_directory = directory
        self.directory = key_directory(device_key, directory)
        self._room = self.directory / "room"

    def __reduce__(self) -> tuple[type[DeviceLock], tuple[str, Path | None]]:
        # Made anew where it arrives: another host or user has its own directory.
        return DeviceLock, (self.device_key, self._given_directory)

    @contextmanager
    def using(self) -> Iterator[None]:
        """Hold the device together with other users, for one batch; waits while a measurer waits or measures."""
        with self._held_by_thread(fcntl.LOCK_SH, self._enter_shared):
            yield

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Hold the device alone; new users wait from the moment of the call, present ones finish their batch."""
        with self._held_by_thread(fcntl.LOCK_EX, self._enter_alone):
            yield

    def _enter_shared(self, stack: ExitStack) -> None:
        self._stand_back()
        stack.enter_context(_locked(self._room, fcntl.LOCK_SH))

    def _enter_alone(self, stack: ExitStack) -> None:
        stack.enter_context(self._ticket())
        stack.enter_context(_locked(self._room, fcntl.LOCK_EX))

    @contextmanager
    def _held_by_thread(self, mode: int, enter: Callable[[ExitStack], None]) -> Iterator[None]:
        """Enter unless this thread is in already. The last one out leaves, whatever the order: generators end late."""
        holds: dict[Path, _Hold] = _held.__dict__.setdefault("holds", {})
        hold = holds.get(self._room)
        if hold is None:
            with ExitStack() as stack:
                began = time.monotonic()
                try:
                    try:
                        enter(stack)
                    except FileNotFoundError:  # the directory was cleaned away, as at its owner's logout
                        key_directory(self.device_key, self._given_directory)
                        enter(stack)
                finally:
                    _waited.seconds = seconds_waited() + time.monotonic() - began
                hold = holds[self._room] = _Hold(mode, stack.pop_all())
        elif mode == fcntl.LOCK_EX and hold.mode == fcntl.LOCK_SH:
            raise LockOrderError(
                f"a device must be free of this thread's own work before it is measured, but this thread is using "
                f"{self.device_key}; leave using() first"
            )
        hold.count += 1
        try:
            yield
        finally:
            hold.count -= 1
            if not hold.count:
                del holds[self._room]
                hold.stack.close()

    @contextmanager
    def _ticket(self) -> Iterator[None]:
        """Put up a ticket that users stand back from until it comes down, or until this process dies."""
        self._clear_hidden()
        owner = os.getpid()
        name = f"{owner}-{threading.get_ident()}-{os.urandom(4).hex()}"
        hidden = self.directory / f"{name}{_NEW_SUFFIX}"
        # Locked first, shown after: a ticket that is seen without a lock is one whose measurer died.
        with _locked(hidden, fcntl.LOCK_EX):
            shown = hidden.rename(self.directory / f"{name}{_TICKET_SUFFIX}")
            try:
                yield
            finally:
                # Taken down while still locked, so that nobody takes it for a dead one; never by a forked child.
                if os.getpid() == owner:
                    shown.unlink(missing_ok=True)

    def _stand_back(self) -> None:
        """Return at a moment when no living measurer has a ticket up; sleeps in the kernel meanwhile."""
        dead: set[Path] = set()
        while tickets := [path for path in self._tickets(_TICKET_SUFFIX) if path not in dead]:
            for ticket in tickets:
                with suppress(FileNotFoundError), _locked(ticket, fcntl.LOCK_SH, create=False):
                    # Its lock is gone: the measurer is done (and took the file down itself) or dead (and could not).
                    dead.add(ticket)
                    with suppress(PermissionError):  # another user's
                        ticket.unlink(missing_ok=True)

    def _clear_hidden(self) -> None:
        """Remove what measurers left behind that were killed before they showed their ticket."""
        for hidden in self._tickets(_NEW_SUFFIX):
            with (
                suppress(FileNotFoundError, BlockingIOError, PermissionError),
                _locked(hidden, fcntl.LOCK_EX | fcntl.LOCK_NB, create=False),
            ):
                hidden.unlink()

    def _tickets(self, suffix: str) -> list[Path]:
        with os.scandir(self.directory) as entries:
            names = [entry.name for entry in entries if entry.name.endswith(suffix)]
        return [self.directory / name for name in names if _TICKET_NAME.fullmatch(name)]


class DevicesUsed:
    """The locks of several devices as one: a batch uses them all, what is measured is the first one alone."""

    def __init__(self, *locks: DeviceLock) -> None:
        self._locks = locks

    @contextmanager
    def using(self) -> Iterator[None]:
        """Hold all together with other users, for one batch."""
        with ExitStack() as stack:
            for lock in self._locks:
                stack.enter_context(lock.using())
            yield

    def measuring(self) -> AbstractContextManager[None]:
        """Hold the first alone."""
        return self._locks[0].measuring()


@contextmanager
def _locked(path: Path, mode: int, create: bool = True) -> Iterator[None]:
    """Hold a flock on the file at `path`; opened anew each time, so that two threads exclude each other too."""
    fd = _open_and_lock(path, mode, create)
    try:
        yield
    finally:
        # In a child forked meanwhile the descriptor is closed already, and its number may be another file's.
        if fd in _open_fds:
            _open_fds.discard(fd)
            # Closing alone does not unlock as long as a child forked a moment ago still has the file open.
            fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)


def _open_and_lock(path: Path, mode: int, create: bool) -> int:
    while True:
        fd = _open(path, create)
        _open_fds.add(fd)
        try:
            fcntl.flock(fd, mode)
            # A cleaner of temporary files may have removed it meanwhile: then others lock a new one, and so must we.
            if not create or _is_at(fd, path):
                return fd
        except BaseException:
            _open_fds.discard(fd)
            os.close(fd)
            raise
        _open_fds.discard(fd)
        os.close(fd)


def _open(path: Path, create: bool) -> int:
    """A descriptor of a regular file that everybody may read, which is all that `flock` asks for.

    Opened before made: kernels refuse O_CREAT on another user's file in a directory where everybody may write.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe planted here would hold us up
    end = time.monotonic() + _MAKER_SECONDS
    while True:
        try:
            fd = os.open(path, flags)
        except FileNotFoundError:
            if not create:
                raise
            with suppress(FileExistsError):
                fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644)
                os.fchmod(fd, 0o644)  # whatever the umask
                return fd
        except PermissionError:
            if time.monotonic() > end:  # its maker opens it to others in the next moment
                raise _unusable(path) from None
            time.sleep(0.01)
        except OSError as error:  # a link
            raise _unusable(path) from error
        else:
            if stat.S_ISREG(os.fstat(fd).st_mode):
                return fd
            os.close(fd)
            raise _unusable(path)


def _unusable(path: Path) -> LockDirectoryError:
    return LockDirectoryError(f"a device lock must be a file that everybody can read, but {path} is none; {REMEDY}")


def _is_at(fd: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(fd), there)
