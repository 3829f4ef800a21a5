"""Nodes that join and are not ready: each is named once, with each thing that is wrong, however often it joins."""

from __future__ import annotations

import time
from typing import Any

import pytest

from paretoprune.cluster import joining_nodes
from paretoprune.cluster.errors import NodeError
from paretoprune.cluster.joining_nodes import Newcomers
from paretoprune.cluster.resources import ClusterInfo, Node, TrialResources

HEAD = Node("head", 4, 0, "id-head")


def info(*nodes: Node) -> ClusterInfo:
    return ClusterInfo(nodes, sum(node.cpus for node in nodes), 0, "auto")


def test_a_node_that_is_left_out_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """While its dataset is copied there it leaves and joins again (Ray gives it another id); then it lacks something
    else, then nothing."""
    data, torch = (
        "the dataset's /data holds {} entries, here 9; copy it",
        "it has torch 1.0, here 2.0; install the same",
    )
    stages: list[str | int] = [data.format(2), data.format(3), 0, data.format(5), torch, torch, 1]

    def check(*_: Any) -> int:
        found = stages.pop(0)
        if isinstance(found, str):
            raise NodeError(f"every node must be ready for trials, but on late {found}", "late")
        return found

    monkeypatch.setattr(joining_nodes, "check_nodes", check)
    monkeypatch.setattr(joining_nodes, "_hold", lambda node: None)
    monkeypatch.setattr(joining_nodes, "LOOK_AGAIN_SECONDS", 0.01)
    said: list[str] = []
    watch = Newcomers(info(HEAD), TrialResources(1, 0.0, 4), [], None, said.append)
    end = time.monotonic() + 30
    for name, left in (("id-1", 4), ("id-2", 0)):
        while len(stages) > left and time.monotonic() < end:
            watch.admitted(info(HEAD, Node("late", 2, 0, name)))
            time.sleep(0.01)
    watch.close()
    assert stages == []
    left_out = "a node joined and is left out until it is ready: every node must be ready for trials, but on late "
    assert said == [left_out + data.format(2), left_out + torch, "late joined: 2 CPUs, 0 GPUs"]
