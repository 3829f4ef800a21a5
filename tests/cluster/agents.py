"""Agents for tests: the real file as a process, and tiny networks as ONNX."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

AGENT = Path(__file__).resolve().parents[2] / "cluster" / "agent" / "agent.py"
TOKEN = "0123456789abcdef0123456789abcdef"


@dataclass(frozen=True)
class RunningAgent:
    address: str
    process: subprocess.Popen[str]
    store: Path
    log: Path


@contextmanager
def agent_process(folder: Path, *options: str, port: int = 0) -> Iterator[RunningAgent]:
    """An agent on a free port of this machine, with a lock of its own."""
    token, log = folder / "token", folder / "agent.log"
    token.write_text(TOKEN + "\n")
    token.chmod(0o600)
    command = [sys.executable, str(AGENT), "--token-file", str(token), "--port", str(port)]
    command += ["--store", str(folder / "store"), "--lock-file", str(folder / "lock"), *options]
    with log.open("a") as said, subprocess.Popen(command, stderr=said, stdout=said, text=True) as process:
        try:
            yield RunningAgent(_address(process, log), process, folder / "store", log)
        finally:
            process.terminate()
            process.wait(10)


def _address(process: subprocess.Popen[str], log: Path) -> str:
    while process.poll() is None:
        found = re.findall(r"listening at (http://127\.0\.0\.1:\d+)", log.read_text())
        if found:
            return str(found[-1])
        os.sched_yield()
    raise AssertionError(log.read_text())


def tiny_onnx(channels: int, side: int = 32) -> bytes:
    """Two convolutions: 3 to `channels`, and `channels` to as many."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.standard_normal((channels, width, 3, 3)).astype(np.float32), name)
        for name, width in (("first", 3), ("second", channels))
    ]
    layers = [
        helper.make_node("Conv", ["images", "first"], ["middle"], pads=[1] * 4),
        helper.make_node("Conv", ["middle", "second"], ["out"], pads=[1] * 4),
    ]
    taken, given = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, width, side, side])
        for name, width in (("images", 3), ("out", channels))
    )
    model = helper.make_model(
        helper.make_graph(layers, "tiny", [taken], [given], weights), opset_imports=[helper.make_opsetid("", 13)]
    )
    model.ir_version = 8
    return bytes(model.SerializeToString())
