"""Where latency is measured: the setting ``latency.target`` and what it means. Plain data; no Ray here."""

from __future__ import annotations

import re
from dataclasses import dataclass

_CPU = re.compile(r"cpu:([1-9]\d*)")
_NODE = re.compile(r"node:([A-Za-z0-9][A-Za-z0-9_.-]*)")


@dataclass(frozen=True)
class LatencyTarget:
    """``threads`` are set for the CPU of the trial's host, ``resource`` for a node of the cluster; neither: own."""

    threads: int | None = None
    resource: str | None = None

    @classmethod
    def parse(cls, text: str) -> LatencyTarget:
        """``own``, ``cpu:N`` or ``node:RESOURCE``; ValueError for anything else."""
        if text == "own":
            return cls()
        if match := _CPU.fullmatch(text):
            return cls(threads=int(match.group(1)))
        if match := _NODE.fullmatch(text):
            return cls(resource=match.group(1))
        raise ValueError(
            "a latency target must be own (the trial's device), cpu:N (the CPU with N threads) or node:RESOURCE "
            f"(a node of the cluster with that custom resource), got {text!r}"
        )

    def is_device(self, device: str) -> bool:
        """Whether a trial that runs on ``device`` measures there, in its own process."""
        return self.resource is None and (self.threads is None or device == "cpu")

    def shares_cpu_with(self, device: str) -> bool:
        """Whether trials on ``device`` must pause for a measurement on their host's CPU too."""
        return self.threads is not None and device != "cpu"
