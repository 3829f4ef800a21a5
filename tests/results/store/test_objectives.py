"""The sign of the objectives has one owner."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from paretoprune.results.errors import ObjectiveError
from paretoprune.results.store.objectives import DIRECTIONS, metrics_to_losses, to_losses
from paretoprune.results.store.records import TrialRecord


def test_losses_are_lower_is_better_for_every_objective() -> None:
    for name, direction in DIRECTIONS.items():
        good, bad = (0.9, 0.1) if direction == "max" else (0.1, 0.9)
        assert metrics_to_losses({name: good}, [name])[0] < metrics_to_losses({name: bad}, [name])[0]


def test_columns_follow_the_names(record: Callable[..., TrialRecord]) -> None:
    records = [record("a", 0.5, 8.0), record("b", 0.6, 9.0)]
    assert to_losses(records, ["latency_ms", "map50_95"]).tolist() == [[8.0, -0.5], [9.0, -0.6]]
    assert to_losses([], ["latency_ms", "map50_95"]).shape == (0, 2)


def test_bad_objectives_are_named(record: Callable[..., TrialRecord]) -> None:
    with pytest.raises(ObjectiveError, match="but got 'speed'"):
        to_losses([], ["speed"])
    with pytest.raises(ObjectiveError, match="different names"):
        to_losses([], ["gflops", "gflops"])
    with pytest.raises(ObjectiveError, match="must have the metric gflops, but got None"):
        to_losses([record("a")], ["gflops"])
    with pytest.raises(ObjectiveError, match="gflops, but got nan"):
        metrics_to_losses({"gflops": float("nan")}, ["gflops"])
