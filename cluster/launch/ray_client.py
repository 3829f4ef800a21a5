"""A command driven inside a cluster that only its client port (``ray://HEAD:10001``) is reached of.

A sweep driven over such a connection would end with it. So what goes through it is the command: a detached actor on the
head node runs it in a process of its own there, and this side shows what it says. The connection may break; the same
command then finds the actor again and shows on.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paretoprune.base.errors import first_line
from paretoprune.cluster.errors import RayUnreachableError
from paretoprune.cluster.packages import package_directories
from paretoprune.cluster.ray_connection import TOKEN_REMEDY, WORKER_ENVIRONMENT, check_answers, muted

NAMESPACE = "paretoprune"
POLL_SECONDS = 0.5
LEFT_ALONE_SECONDS = 3600.0
"""So long after its command's end an actor that nobody asks waits for somebody who wants to read what it said."""
_AT_ONCE = 1 << 20  # bytes of output in one answer
_ATTEMPTS = 4
# The entry starts a process for each client. Now and then that dies in its fork (gRPC's threads, Ray 2.60), which is
# said after 30 s; the next one lives.
_STILLBORN = "Initialization failure from server"
_HEAD = {"node:__internal_head__": 0.001}  # Ray's own name of the head node as a resource

Write = Callable[[str], None]


@dataclass(frozen=True)
class Said:
    """What the command wrote since it was asked last, and its exit code; None while it runs."""

    out: bytes
    err: bytes
    code: int | None


class Driver:
    """On the head node: the command's process and what it writes. An actor; ``command`` are Python's arguments."""

    def __init__(self, command: tuple[str, ...], address: str) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="paretoprune-driver-"))
        self._paths = (self._folder / "out", self._folder / "err")
        own = {"RAY_ADDRESS": address, "PYTHONUNBUFFERED": "1"}
        # Ray blocks it in its workers so that a Ctrl-C at a driver's terminal spares them; a child would inherit that.
        blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        with self._paths[0].open("wb") as out, self._paths[1].open("wb") as err:
            self._process = subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**os.environ, **own},
                start_new_session=True,
            )
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        self._asked = time.monotonic()
        threading.Thread(target=self._leave, daemon=True).start()

    def said(self, out: int, err: int) -> Said:
        """What came after these numbers of bytes; the exit code only once all of it was handed over."""
        self._asked = time.monotonic()
        code = self._process.poll()  # first: what it wrote before its end is there to be read then
        found = [_read(path, start) for path, start in zip(self._paths, (out, err), strict=True)]
        return Said(found[0], found[1], None if any(len(part) == _AT_ONCE for part in found) else code)

    def interrupt(self) -> None:
        """As Ctrl-C does."""
        if self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGINT)

    def forget(self) -> None:
        """Remove what it wrote from the head node's disk."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _leave(self) -> None:
        self._process.wait()
        while time.monotonic() - self._asked < LEFT_ALONE_SECONDS:
            time.sleep(1)
        self.forget()
        os._exit(0)


def _read(path: Path, start: int) -> bytes:
    with path.open("rb") as stream:
        stream.seek(start)
        return stream.read(_AT_ONCE)


def drive(address: str, command: tuple[str, ...], files: Path, out: Write, err: Write) -> int:
    """Run ``python COMMAND`` on the head node of the cluster at ``address`` in a copy of ``files``; its exit code.

    What it writes goes to ``out`` and ``err`` as it comes. The first Ctrl-C is handed on to it, a second one only ends
    the showing. Raises RayUnreachableError where nobody answers, or where the connection breaks.
    """
    check_answers(address)
    import ray

    with _connected(ray, address, files):
        driver = _found_or_started(ray, command, err)
        interrupted = False
        seen = [0, 0]
        texts = [codecs.getincrementaldecoder("utf-8")("replace") for _ in seen]  # an answer may end within a character
        while True:
            try:
                said = ray.get(driver.said.remote(*seen))
                out(texts[0].decode(said.out))
                err(texts[1].decode(said.err))
                seen = [seen[0] + len(said.out), seen[1] + len(said.err)]
                if said.code is not None:
                    ray.get(driver.forget.remote())
                    ray.kill(driver)
                    return int(said.code)
                time.sleep(POLL_SECONDS)
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                ray.get(driver.interrupt.remote())
            except (ray.exceptions.RayError, ConnectionError) as error:
                reason = f"the connection broke ({first_line(error)})"
                raise RayUnreachableError(address, reason, "the work goes on there; repeat this command") from error


def _found_or_started(ray: Any, command: tuple[str, ...], err: Write) -> Any:
    """The actor that the same command made before, or a new one."""
    name = hashlib.sha256("\0".join(command).encode()).hexdigest()[:16]
    try:
        driver = ray.get_actor(name)
    except ValueError:
        inside = ray.get(ray.remote(num_cpus=0)(_inner_address).remote())
        options = {"name": name, "lifetime": "detached", "num_cpus": 0, "resources": _HEAD, "get_if_exists": True}
        return ray.remote(Driver).options(**options).remote(command, inside)
    err("this command is under way on the cluster; what it said so far:\n")
    return driver


def _inner_address() -> str:
    """The cluster's address as its own machines join it."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


@contextmanager
def _connected(ray: Any, address: str, files: Path) -> Iterator[None]:
    # A worker without GPUs would otherwise hide the head's from what it starts
    variables = {**WORKER_ENVIRONMENT, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    environment = {"working_dir": str(files), "py_modules": package_directories(), "env_vars": variables}
    for attempt in range(_ATTEMPTS):
        try:
            with muted():
                ray.init(
                    address, namespace=NAMESPACE, runtime_env=environment, logging_level="ERROR", log_to_driver=False
                )
            break
        except Exception as error:  # Ray raises bare ones here, too
            with muted(), suppress(Exception):
                ray.shutdown()
            if _STILLBORN in str(error) and attempt + 1 < _ATTEMPTS:
                continue
            raise RayUnreachableError(address, first_line(error), TOKEN_REMEDY) from error  # a wrong one times out
    try:
        yield
    finally:
        with muted():
            ray.shutdown()
