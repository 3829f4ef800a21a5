"""What is to run and on what, in plain data; the launchers turn it into their tool's own words."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from paretoprune.cluster.errors import ClusterError

LONGEST_NAME = 40  # Kubernetes appends to it and allows 63


@dataclass(frozen=True)
class LaunchRequest:
    """A command for a cluster. Raises ClusterError where a figure makes no sense.

    command: the words of the command line; every launcher quotes them for its own shell.
    nodes: machines that run trials. least_nodes: with fewer than `nodes`, an autoscaler starts the others when needed.
    cpus, gpus, memory_gb: of one node. hours: longest time, where a scheduler wants one.
    setup: shell lines that each node runs first (`module load ...`, `source .venv/bin/activate`).
    """

    name: str
    command: tuple[str, ...]
    nodes: int = 1
    least_nodes: int | None = None
    cpus: int = 8
    gpus: int = 1
    memory_gb: int = 32
    hours: float = 24.0
    setup: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        for what, value, least in (
            ("nodes", self.nodes, 1), ("cpus", self.cpus, 1), ("gpus", self.gpus, 0), ("memory", self.memory_gb, 1),
            ("least nodes", self.fewest, 0),
        ):  # fmt: skip
            if value < least:
                raise ClusterError(f"{what} must be at least {least}, but got {value}; correct it")
        if self.fewest > self.nodes:
            raise ClusterError(f"least nodes must not be above nodes, but got {self.fewest} and {self.nodes}")
        if not 0 < self.hours <= 24 * 365:
            raise ClusterError(f"hours must be above 0 and within a year, but got {self.hours:g}; correct it")
        for text in (*self.command, *self.setup):
            if re.search(r"[\x00-\x08\x0a-\x1f\x7f]", text):
                raise ClusterError(f"a command must be one line, but got {text!r}; take the control characters out")

    @property
    def fewest(self) -> int:
        """Nodes that are there from the start."""
        return self.nodes if self.least_nodes is None else self.least_nodes

    @property
    def slug(self) -> str:
        """The name as every tool takes it: small letters, digits and hyphens, a letter first."""
        text = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")[:LONGEST_NAME].strip("-")
        return text if text[:1].isalpha() else f"run-{text}".strip("-")
