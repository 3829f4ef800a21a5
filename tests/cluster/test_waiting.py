"""A cluster on which no trial fits yet: the autoscaler is asked, a person is told, only time ends the wait."""

from __future__ import annotations

from typing import Any

import pytest

from paretoprune.cluster import waiting
from paretoprune.cluster.errors import ClusterError, NoRoomError
from paretoprune.cluster.resources import ClusterInfo, Node, TrialResources

HEAD = Node("head", 0, 0)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What an autoscaler is asked for; time passes by sleeping alone."""
    import ray.autoscaler.sdk

    now, requests = [100.0], list[Any]()
    monkeypatch.setattr(ray.autoscaler.sdk, "request_resources", lambda bundles: requests.append(bundles))
    monkeypatch.setattr(waiting.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(waiting.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return requests


def cluster_of(monkeypatch: pytest.MonkeyPatch, *stages: tuple[Node, ...]) -> None:
    """One stage a look, the last one for good."""
    left = list(stages)

    def describe(address: str) -> ClusterInfo:
        nodes = left.pop(0) if len(left) > 1 else left[0]
        return ClusterInfo(nodes, sum(node.cpus for node in nodes), sum(node.gpus for node in nodes), address)

    monkeypatch.setattr(waiting, "describe_cluster", describe)


def test_what_a_node_that_comes_later_has_decides(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    cluster_of(monkeypatch, *[(HEAD,)] * 14, (HEAD, Node("late", 8, 2)))
    said: list[str] = []
    assert waiting.wait_for_room("auto", None, None, 3, 30, said.append) == TrialResources(4, 1.0, 2)
    assert asked == [[{"CPU": 1}] * 3, []]  # asked once, and taken back: a later wish is said by who has it
    assert [line.partition(":")[0] for line in said] == [
        f"waiting for a node ({seconds} s, at most 30 min)" for seconds in (0, 10, 20)
    ]
    assert "head: 0 CPUs, 0 GPUs" in said[0]


def test_what_a_trial_takes_is_asked_for(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    cluster_of(monkeypatch, (HEAD, Node("small", 2, 0)), (HEAD, Node("big", 8, 1)))
    assert waiting.wait_for_room("auto", 0.5, 4, 1, 1, lambda line: None) == TrialResources(4, 0.5, 2)
    assert asked == [[{"CPU": 4, "GPU": 0.5}], []]


def test_a_node_that_never_comes_is_waited_for_so_long(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    cluster_of(monkeypatch, (HEAD,))
    with pytest.raises(NoRoomError, match=r"head: 0 CPUs, 0 GPUs after 2 minutes; ask for less .* `ray status`"):
        waiting.wait_for_room("auto", None, None, 1, 2, lambda line: None)
    assert asked[-1] == []


@pytest.mark.parametrize(
    ("address", "gpus", "minutes", "said"),
    [("local", 2.0, 30, "one trial must fit"), ("auto", 2.0, 0, "one trial must fit"), ("auto", 1.5, 30, "whole num")],
)
def test_what_can_never_come_is_not_waited_for(
    address: str, gpus: float, minutes: float, said: str, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """This machine alone does not grow; half of two GPUs is no number of GPUs."""
    cluster_of(monkeypatch, (Node("here", 4, 1),))
    with pytest.raises(ClusterError, match=said):
        waiting.wait_for_room(address, gpus, None, 1, minutes, pytest.fail)
    assert asked == []


def test_nothing_is_asked_of_a_cluster_that_has_room(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    cluster_of(monkeypatch, (Node("here", 4, 0),))
    assert waiting.wait_for_room("auto", None, None, 8, 30, pytest.fail).slots == 2
    assert asked == []
