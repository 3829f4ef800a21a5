from __future__ import annotations

import math

import pytest

from paretoprune.cluster.errors import ClusterError
from paretoprune.cluster.resources import ClusterInfo, Node, TrialResources, slots


def cluster(*nodes: tuple[int, int]) -> ClusterInfo:
    made = tuple(Node(f"n{i}", cpus, gpus) for i, (cpus, gpus) in enumerate(nodes))
    return ClusterInfo(made, sum(n.cpus for n in made), sum(n.gpus for n in made), "local")


@pytest.mark.parametrize(
    ("nodes", "gpus", "cpus", "expected"),
    [
        # no GPU: half of the machine's CPUs, at most 4
        ([(1, 0)], None, None, (1, 0, 1)),
        ([(2, 0)], None, None, (1, 0, 2)),
        ([(4, 0)], None, None, (2, 0, 2)),
        ([(8, 0)], None, None, (4, 0, 2)),
        ([(64, 0)], None, None, (4, 0, 16)),
        ([(2, 0)], None, 2, (2, 0, 1)),
        ([(8, 0), (4, 0)], None, None, (2, 0, 6)),
        # one GPU each by default, with an even share of the CPUs, at most 8
        ([(16, 1)], None, None, (8, 1, 1)),
        ([(16, 4)], None, None, (4, 1, 4)),
        ([(2, 4)], None, None, (1, 1, 2)),  # too few CPUs for the fourth
        ([(64, 8), (32, 4)], None, None, (8, 1, 12)),
        ([(16, 2), (32, 0)], None, None, (8, 1, 2)),  # a node without GPU takes none
        # fractions never straddle two GPUs
        ([(16, 2)], 0.5, None, (4, 0.5, 4)),
        ([(16, 2)], 0.4, None, (4, 0.4, 4)),
        ([(16, 2)], 0.6, None, (8, 0.6, 2)),
        ([(30, 1)], 0.1, None, (3, 0.1, 10)),
        ([(32, 1)], 1 / 3, 1, (1, 1 / 3, 3)),
        # several GPUs for a trial
        ([(16, 5)], 2, None, (8, 2, 2)),
        # GPUs there, but not wanted
        ([(16, 2)], 0, None, (4, 0, 4)),
        ([(8, 2)], 1, 3, (3, 1, 2)),
    ],
)
def test_table(
    nodes: list[tuple[int, int]], gpus: float | None, cpus: int | None, expected: tuple[int, float, int]
) -> None:
    assert slots(cluster(*nodes), gpus, cpus) == TrialResources(*expected)


@pytest.mark.parametrize("gpus", [-1, 1.5, math.nan, math.inf])
def test_no_such_share_of_a_gpu(gpus: float) -> None:
    with pytest.raises(ClusterError, match=r"gpus_per_trial must be 0, a fraction below 1 or a whole number, but got"):
        slots(cluster((8, 2)), gpus)


def test_no_such_number_of_cpus() -> None:
    with pytest.raises(ClusterError, match=r"cpus_per_trial must be at least 1, but got 0"):
        slots(cluster((8, 0)), None, 0)


@pytest.mark.parametrize(("gpus", "cpus"), [(3, None), (1, 9), (0, 9)])
def test_nothing_fits(gpus: float, cpus: int | None) -> None:
    with pytest.raises(ClusterError, match=r"n0: 8 CPUs, 2 GPUs; ask for less per trial"):
        slots(cluster((8, 2)), gpus, cpus)
