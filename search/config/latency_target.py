"""Where latency is measured: the setting ``latency.target`` and what it means. Plain data; no Ray here."""

from __future__ import annotations

import re
from dataclasses import dataclass

COMMAND = "command:"  # and a name: a program of the device that prints milliseconds
AGENT_RUNTIMES = ("onnx", "openvino", "tensorrt", "ncnn")  # those that read what a network is exported to here
FILE_RUNTIMES = {".onnx": AGENT_RUNTIMES[:3], ".tflite": ("litert",), ".rknn": ("rknn",), ".hef": ("hailo",)}
"""End of a file that was made elsewhere -> what an agent's device runs it by, the first where nothing else is said."""
FORMAT_RUNTIMES = {"onnx": AGENT_RUNTIMES[:3], "openvino": ("openvino",), "ncnn": ("ncnn",)}
"""The same of the formats that ship."""
TOLD_TO_HALVE = ("openvino", "ncnn")
"""Agents' runtimes that are told to compute in 16 bits, a pair together; others compute in what their file holds."""

_CPU = re.compile(r"cpu:([1-9]\d*)")
_AGENT = re.compile(r"https?://(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9._-]+)(:\d{1,5})?/?")
_NODE = re.compile(r"node:([A-Za-z0-9][A-Za-z0-9_.-]*)")


@dataclass(frozen=True)
class LatencyTarget:
    """``threads`` are set for the CPU of the trial's host, ``resource`` for a node of the cluster, ``agents`` (their
    addresses) for like devices without Ray; none of them: own."""

    threads: int | None = None
    resource: str | None = None
    agents: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> LatencyTarget:
        """``own``, ``cpu:N``, ``node:RESOURCE`` or ``http://HOST:PORT[,...]``; ValueError for anything else."""
        if text == "own":
            return cls()
        if match := _CPU.fullmatch(text):
            return cls(threads=int(match.group(1)))
        if match := _NODE.fullmatch(text):
            return cls(resource=match.group(1))
        addresses = [each.strip() for each in text.split(",")]
        if all(map(_AGENT.fullmatch, addresses)):
            return cls(agents=tuple(dict.fromkeys(each.rstrip("/") for each in addresses)))
        raise ValueError(
            "a latency target must be own (the trial's device), cpu:N (the CPU with N threads), node:RESOURCE "
            "(a node of the cluster with that custom resource) or http://HOST:PORT (an agent on a device), "
            f"got {text!r}"
        )

    def is_device(self, device: str) -> bool:
        """Whether a trial that runs on ``device`` measures there, in its own process."""
        return self.resource is None and not self.agents and (self.threads is None or device == "cpu")

    def shares_cpu_with(self, device: str) -> bool:
        """Whether trials on ``device`` must pause for a measurement on their host's CPU too."""
        return self.threads is not None and device != "cpu"

    def check_runtime(self, runtime: str) -> None:
        """ValueError where the target cannot have the runtime: an agent needs one that reads a file, and only an agent
        has commands and ncnn."""
        if self.agents and runtime not in AGENT_RUNTIMES and not runtime.startswith(COMMAND):
            names = ", ".join(AGENT_RUNTIMES)
            raise ValueError(
                f"an agent's device runs exported files: the runtime must be {names} or command:NAME, got {runtime!r}"
            )
        if not self.agents and (runtime.startswith(COMMAND) or runtime == "ncnn"):
            raise ValueError(f"the runtime {runtime!r} is an agent's: give its address as the latency target")


def runtime_of_file(path: str, chosen: str | None = None) -> str:
    """What an agent's device runs a file by; ValueError where it is no file for one, or not for the ``chosen`` one."""
    name = path.rstrip("/")
    known = {f"_{form}_model": runtimes for form, runtimes in FORMAT_RUNTIMES.items() if form != "onnx"} | FILE_RUNTIMES
    runtimes = next((runtimes for end, runtimes in known.items() if name.endswith(end)), None)
    if runtimes is None:
        raise ValueError(
            f"an agent's device needs a checkpoint (.pt) or a file for it ({', '.join(known)}), got {path}"
        )
    command = chosen is not None and chosen.startswith(COMMAND) and ".onnx" in name
    if chosen not in (None, *runtimes) and not command:
        raise ValueError(f"{path} runs by {' or '.join(runtimes)}, got the runtime {chosen!r}")
    return runtimes[0] if chosen is None else chosen
