"""What one trial gets, and how many trials run side by side. Pure arithmetic on what the cluster says it has."""

from __future__ import annotations

import math
from dataclasses import dataclass

from paretoprune.cluster.errors import ClusterError, NoRoomError

# More threads hardly speed up small detectors at 160 to 640 px, more trials side by side do.
MAX_DEFAULT_CPU_THREADS = 4
# Beside a GPU the threads load data; more than this wait for the GPU.
MAX_DEFAULT_LOADER_CPUS = 8
_EPSILON = 1e-6


@dataclass(frozen=True)
class Node:
    """One living machine of the cluster: logical CPUs and GPUs that Ray may hand out, Ray's `id` of it."""

    name: str
    cpus: int
    gpus: int
    id: str = ""


@dataclass(frozen=True)
class ClusterInfo:
    """What `connect` reached. `address` is "local" for a Ray that this process started."""

    nodes: tuple[Node, ...]
    cpus: int
    gpus: int
    address: str


@dataclass(frozen=True)
class TrialResources:
    """CPUs and GPUs of one trial (`gpus` may be a fraction below 1), and how many trials fit at the same time."""

    cpus: int
    gpus: float
    slots: int


def slots(info: ClusterInfo, gpus_per_trial: float | None = None, cpus_per_trial: int | None = None) -> TrialResources:
    """Divide the cluster into trials.

    gpus_per_trial: None means 1 where any node has a GPU and 0 otherwise. A fraction below 1 puts several trials on one
        GPU (never one trial on parts of two); above 1 it must be whole; 0 leaves the GPUs alone.
    cpus_per_trial: None means, with GPUs, an even share of the smallest GPU node's CPUs, at most 8; without,
        half of the smallest node's CPUs, at most 4: two trials on a small machine, one per four threads on a big one.
    Raises ClusterError where a figure makes no sense, NoRoomError where not a single trial fits.
    """
    gpus = _gpus_of_a_trial(info, gpus_per_trial)
    if cpus_per_trial is not None and cpus_per_trial < 1:
        raise ClusterError(f"cpus_per_trial must be at least 1, but got {cpus_per_trial}; leave it out for the default")
    cpus = cpus_per_trial if cpus_per_trial is not None else _default_cpus(info, gpus)
    count = sum(_trials_on(node, cpus, gpus) for node in info.nodes)
    if count == 0:
        have = ", ".join(f"{node.name}: {node.cpus} CPUs, {node.gpus} GPUs" for node in info.nodes) or "no nodes"
        raise NoRoomError(
            f"one trial must fit on a node, but it asks for {cpus} CPUs and {gpus:g} GPUs and there are {have}",
            "ask for less per trial",
        )
    return TrialResources(cpus, gpus, count)


def _gpus_of_a_trial(info: ClusterInfo, asked: float | None) -> float:
    if asked is None:
        return 1.0 if info.gpus else 0.0
    whole = float(asked).is_integer()
    if not math.isfinite(asked) or asked < 0 or (asked > 1 and not whole):
        raise ClusterError(
            f"gpus_per_trial must be 0, a fraction below 1 or a whole number, but got {asked:g}; "
            "0.5 puts two trials on one GPU"
        )
    return float(asked)


def _default_cpus(info: ClusterInfo, gpus: float) -> int:
    if gpus:
        hosts = [(node.cpus, _trials_by_gpu(node, gpus)) for node in info.nodes]
        shares = [cpus // trials for cpus, trials in hosts if trials]
        return max(1, min([MAX_DEFAULT_LOADER_CPUS, *shares]))
    halves = [node.cpus // 2 for node in info.nodes if node.cpus]
    return max(1, min([MAX_DEFAULT_CPU_THREADS, *halves]))


def _trials_on(node: Node, cpus: int, gpus: float) -> int:
    by_cpu = node.cpus // cpus
    return min(by_cpu, _trials_by_gpu(node, gpus)) if gpus else by_cpu


def _trials_by_gpu(node: Node, gpus: float) -> int:
    """Trials that the node's GPUs carry: 0.4 of a GPU fits twice into each, not five times into two."""
    if gpus < 1:
        return node.gpus * math.floor(1 / gpus + _EPSILON)
    return node.gpus // round(gpus)
