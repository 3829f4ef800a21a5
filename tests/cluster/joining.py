"""For tests that join a cluster: the cluster in one process, the driver in another."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from paretoprune.cluster.ray_patience import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "5" * 32


class Nodes:
    """A cluster of pretended nodes; `address` is what drivers join, `entry` is the job server, where it
    was asked for."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin
        assert process.stdout
        self._in, self._out = process.stdin, process.stdout
        self.address, _, self.entry = self._out.readline().strip().partition(" ")
        assert self.address, "the cluster did not start"

    def add(self, cpus: int, gpus: int = 0, *variables: str) -> None:
        self._tell(" ".join(["add", str(cpus), str(gpus), *variables]))

    def remove(self, index: int) -> None:
        self._tell(f"remove {index}")

    def _tell(self, line: str) -> None:
        self._in.write(line + "\n")
        self._in.flush()
        assert self._out.readline().startswith("done")


def environment(**variables: str) -> dict[str, str]:
    """This process's own; where it has started a Ray, what keeps that on the loopback would forbid `ray start`."""
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"}
    return inherited | PATIENCE | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN} | variables


@contextmanager
def nodes(cpus: int, gpus: int = 0, *extra: str, **variables: str) -> Iterator[Nodes]:
    """A head node, on an environment that cannot see this checkout; ends with everything on it."""
    command = [sys.executable, str(ROOT / "tests/cluster/nodes_process.py"), str(cpus), str(gpus), *extra]
    hidden = environment(**{"PYTHONPATH": "", **variables})
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=hidden
    ) as process:
        try:
            yield Nodes(process)
        finally:
            process.stdin.close()  # type: ignore[union-attr]
            try:
                process.wait(120)
            except subprocess.TimeoutExpired:
                process.kill()


def start_driver(code: str, *arguments: object, **variables: str) -> subprocess.Popen[str]:
    given = environment(PYTHONPATH=str(ROOT), **variables)
    for name in PATIENCE:  # for those who start a node: a driver whose token is wrong would try for five minutes
        del given[name]
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=given)


def drive(code: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a driver to its end."""
    process = start_driver(code, *arguments, **variables)
    out, err = process.communicate(timeout=1500)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
