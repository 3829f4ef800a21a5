"""Nodes that join while trials run: none gets one before it was looked at like the nodes at the beginning.

A node that lacks the dataset would otherwise fail one trial after the other, faster than the others finish theirs.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from paretoprune.cluster.errors import NodeError
from paretoprune.cluster.nodes import check_nodes
from paretoprune.cluster.resources import ClusterInfo, Node, TrialResources

LOOK_AGAIN_SECONDS = 30.0
_LEAVE_SECONDS = 10.0


class Newcomers:
    """Looks at nodes in threads of its own. `close` it while Ray is still connected."""

    def __init__(
        self,
        present: ClusterInfo,
        trial: TrialResources,
        data: Sequence[str],
        run: Path | None,
        say: Callable[[str], None],
    ) -> None:
        """`present`: the nodes that were looked at already; `trial`: what a node must have to be of interest.

        `data`, `run`: see `check_nodes`. `say`: shows a line to a person."""
        self._trial = trial
        self._ready = {node.id for node in present.nodes}
        self._looks: dict[str, threading.Thread] = {}
        self._holders: dict[str, Any] = {}
        self._over = threading.Event()
        self._said: set[tuple[str, str]] = set()
        self._data, self._run, self._say = data, run, say

    def admitted(self, info: ClusterInfo) -> ClusterInfo:
        """`info` with those nodes only that may be given trials. Begins to look at the others, and does not wait."""
        for node in info.nodes:
            if node.id not in self._ready and node.id not in self._looks and self._is_of_use(node):
                self._holders[node.id] = _hold(node)
                thread = threading.Thread(target=self._look, args=(node,), daemon=True)
                self._looks[node.id] = thread
                thread.start()
        nodes = tuple(node for node in info.nodes if node.id in self._ready)
        cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
        return replace(info, nodes=nodes, cpus=cpus, gpus=gpus)

    def close(self) -> None:
        """Let go of nodes that are held."""
        self._over.set()
        for thread in self._looks.values():
            thread.join(_LEAVE_SECONDS)
        for node in list(self._holders):
            self._let_go(node)

    def _is_of_use(self, node: Node) -> bool:
        return node.cpus >= self._trial.cpus and node.gpus >= self._trial.gpus

    def _look(self, node: Node) -> None:
        """Until it is ready or gone. What is wrong with it is said once, also where it leaves and joins again."""
        while not self._over.is_set():
            try:
                found = check_nodes(self._data, self._run, lambda entry: entry["NodeID"] == node.id)
            except NodeError as error:
                self._say_once(node, f"a node joined and is left out until it is ready: {error}")
                self._over.wait(LOOK_AGAIN_SECONDS)
                continue
            except Exception as error:  # noqa: BLE001  the node is lost, or the cluster: the sweep must not be
                self._say_once(
                    node, f"{node.name} joined and could not be looked at ({str(error)[:100]}); it is left out"
                )
                return
            if found:
                self._say(f"{node.name} joined: {node.cpus} CPUs, {node.gpus} GPUs")
                self._let_go(node.id)
                self._ready.add(node.id)
            return

    def _say_once(self, node: Node, line: str) -> None:
        """Figures aside: while a dataset is copied there, the number of its files would be news every time."""
        key = (node.name, re.sub(r"\d+", "", line))
        if key not in self._said:
            self._said.add(key)
            self._say(line)

    def _let_go(self, node: str) -> None:
        import ray

        holder = self._holders.pop(node, None)
        if holder is not None:
            with suppress(Exception):  # its node is gone, and it with it
                ray.kill(holder)


class _Holder:
    """Takes all of a node's CPUs and does nothing with them."""


def _hold(node: Node) -> Any:
    """Ray gives a node's CPUs to waiting trials as soon as it knows it: be there first."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(node.id, soft=False)
    remote: Any = ray.remote
    return remote(num_cpus=node.cpus, scheduling_strategy=here)(_Holder).remote()
