"""Group timing on pretended sessions with a pretended clock: drift, interleaving, the end; and one real session."""

from __future__ import annotations

import pytest

from paretoprune.pruning.builtin import BASELINE
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.latency.group import FEWEST_ROUNDS, measure_group, time_group
from paretoprune.pruning.yolo.loading import load_model


class Machine:
    """A clock that only inferences move; every inference is slower the later it comes (drift per second)."""

    def __init__(self, drift: float = 0.0) -> None:
        self.now_s = 0.0
        self.drift = drift
        self.order: list[str] = []

    def clock(self) -> float:
        return self.now_s

    def session(self, name: str, ms: float) -> Session:
        return Session(self, name, ms)


class Session:
    def __init__(self, machine: Machine, name: str, ms: float) -> None:
        self.machine, self.name, self.ms = machine, name, ms

    def time_ms(self) -> float:
        spent = self.ms * (1 + self.machine.drift * self.machine.now_s)
        self.machine.now_s += spent / 1e3
        self.machine.order.append(self.name)
        return spent


def test_ratios_survive_a_drifting_clock() -> None:
    machine = Machine(drift=0.2)  # a fifth slower every second
    sessions = {name: machine.session(name, ms) for name, ms in {"base": 12.0, "half": 6.0, "third": 4.0}.items()}
    times = time_group(sessions, "base", 20.0, 0.01, machine.clock)
    assert times.speedup("half", "base").value == pytest.approx(2.0, rel=0.01)
    assert times.speedup("third", "half").value == pytest.approx(1.5, rel=0.01)
    assert times.speedup("base", "third").value == pytest.approx(1 / 3, rel=0.01)
    assert times.converged


def test_every_round_times_each_network_forwards_and_backwards() -> None:
    machine = Machine()
    sessions = {name: machine.session(name, 30.0) for name in "abc"}  # a block of one inference
    times = time_group(sessions, "a", 1e3, 0.01, machine.clock)
    assert all(len(pairs) == FEWEST_ROUNDS for pairs in times.rounds.values())
    blocks = machine.order[-FEWEST_ROUNDS * 12 :][::2]  # each block follows one uncounted inference
    rounds = ["".join(blocks[at : at + 6]) for at in range(0, len(blocks), 6)]
    assert rounds[:3] == ["abccba", "bcaacb", "cabbac"]


def test_the_time_ends_it_unsettled() -> None:
    machine = Machine()
    sessions = {name: machine.session(name, 100.0) for name in "ab"}
    times = time_group(sessions, "a", 3.0, 1e-9, machine.clock)
    assert 2 <= len(times.rounds["a"]) < FEWEST_ROUNDS
    assert not times.converged
    assert machine.now_s < 5.0


def test_wrong_arguments_are_refused() -> None:
    sessions = {"a": Machine().session("a", 1.0)}
    with pytest.raises(PruningError, match="must be one of the networks, but got 'b'"):
        time_group(sessions, "b", 1.0, 0.01)
    with pytest.raises(PruningError, match="max_seconds=0"):
        time_group(sessions, "a", 0, 0.01)


def test_real_networks_in_one_session() -> None:
    model = load_model(BASELINE)
    found = measure_group({"baseline": model, "same": model}, "baseline", 64, threads=1, max_seconds=1.0)
    assert found["baseline"]["speedup"] == 1.0
    low, high = found["same"]["speedup_ci95"]
    assert low <= found["same"]["speedup"] <= high
    assert found["same"]["over"]["baseline"][0] == found["same"]["speedup"]
    assert found["same"]["baseline_median_ms"] == found["baseline"]["median_ms"] > 0
