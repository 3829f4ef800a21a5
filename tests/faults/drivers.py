"""Drivers to be killed: real processes, real Ray, started in a second each.

Importing Ray, Optuna and torch takes a process five seconds and more. So one process imports them and then forks a
driver for every line on its stdin; Ray itself is a cluster that runs all the time, as on a server.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_WATCHED = {"open", "os.rename", "os.mkdir", "os.remove", "os.truncate"}


class Nursery:
    """Starts drivers (``with Nursery() as nursery: nursery.start(...)``)."""

    def __enter__(self) -> Nursery:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.drivers"], cwd=ROOT, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()

    def start(self, run: Path, **job: Any) -> Driver:
        """A driver of ``run``; ``job``: address, trials, tools (their factory's name), die_at_write."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        log = run.parent / f"{run.name}.log"
        self._process.stdin.write(json.dumps({"run": str(run), "log": str(log), **job}) + "\n")
        return Driver(int(self._process.stdout.readline()), log)


class Driver:
    """One of them. It is gone once its process is; what it said is in ``log``."""

    def __init__(self, pid: int, log: Path) -> None:
        self.pid = pid
        self._log = log
        try:
            self._exit = os.pidfd_open(pid)  # a number may be another process's by and by, this is this one's
        except ProcessLookupError:
            self._exit = -1

    def wait(self, timeout_s: float) -> bool:
        """Whether it ended within the time."""
        return self._exit < 0 or bool(select.select([self._exit], [], [], timeout_s)[0])

    def kill(self) -> None:
        """SIGKILL, to it alone."""
        if self._exit >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._exit, signal.SIGKILL)
        assert self.wait(30)

    @property
    def said(self) -> str:
        return self._log.read_text()


def _serve() -> None:
    """Fork a driver for each line, and print its pid."""
    import optuna  # noqa: F401
    import ray.tune  # noqa: F401
    import torch  # noqa: F401

    import paretoprune.search.sweep.tune_searcher
    import paretoprune.search.sweep.tune_trainable  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks for their exit codes
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _drive(json.loads(line))
        print(pid, flush=True)


def _drive(job: dict[str, Any]) -> None:
    """In the fork: a sweep from its beginning to its end, or to the write at which it dies."""
    os.setsid()
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        from paretoprune.search.sweep.sweep import run_sweep
        from tests.faults import tools
        from tests.search.fakes import make_prepared

        if job.get("die_at_write"):
            _die_at_write(Path(job["run"]), job["die_at_write"])
        settings = {"search.trials": job["trials"], "resources.address": job["address"], "resources.cpus_per_trial": 1}
        run_sweep(make_prepared(Path(job["run"]), **settings), getattr(tools, job["tools"]))
        print("finished", flush=True)
    except BaseException as error:  # noqa: BLE001  the parent's code must not go on in here
        print(f"ended with {type(error).__name__}: {error}", flush=True)
    finally:
        sys.stdout.flush()
        os._exit(0)


def _die_at_write(run: Path, count: int) -> None:
    """SIGKILL this process in front of its ``count``-th change of a file in the run folder.

    Python reports every one before it happens, so this reaches the moments that a clock hits once in a thousand kills:
    between a record's file and its line in the store, between a line's ``open`` and its rename, and so on.
    """
    left = [count]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _WATCHED and arguments and str(arguments[0]).startswith(str(run)):
            changes = event != "open" or arguments[1] is None or any(letter in str(arguments[1]) for letter in "wax+")
            left[0] -= changes
            if left[0] <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)

    sys.addaudithook(hook)


if __name__ == "__main__":
    _serve()
