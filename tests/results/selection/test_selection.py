"""Every choice against brute force over all trials or all subsets."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paretoprune.results.errors import ResultsError
from paretoprune.results.selection.selection import (
    best_under,
    choose,
    comparable,
    fastest_within_drop,
    front,
    knee,
    lead_pick,
    main_fidelity,
    spread,
)
from paretoprune.results.store.records import TrialRecord
from paretoprune.results.store.run_folder import RunFolder

Build = Callable[..., TrialRecord]


@pytest.fixture(params=range(6))
def trials(request: pytest.FixtureRequest, record: Build) -> list[TrialRecord]:
    """Random trials; half of the cases on a coarse grid, so that there are ties and duplicates."""
    rng = np.random.default_rng(request.param)
    coarse = request.param % 2
    records = []
    for index in range(25):
        latency = 2 + 10 * rng.random()
        accuracy = 0.5 * (1 - (1 - latency / 12) ** 2) + 0.3 * rng.random()  # slower is mostly better
        accuracy, latency = (round(accuracy, 1), float(round(latency))) if coarse else (accuracy, latency)
        records.append(record(f"t{index:02d}", accuracy, latency, metrics={"params_m": 1 + latency / 5}))
    return records


def pairs(records: list[TrialRecord]) -> list[tuple[float, float]]:
    return [(item.metrics["map50_95"], item.metrics["latency_ms"]) for item in records]


def brute_front(records: list[TrialRecord]) -> list[TrialRecord]:
    def dominated(item: TrialRecord) -> bool:
        (accuracy, latency) = pairs([item])[0]
        return any(a >= accuracy and s <= latency and (a, s) != (accuracy, latency) for a, s in pairs(records))

    return [item for item in records if not dominated(item)]


def test_front_is_every_trial_that_nobody_dominates(trials: list[TrialRecord]) -> None:
    found = front(trials)
    assert {item.trial_id for item in found} == {item.trial_id for item in brute_front(trials)}
    accuracies = [item.metrics["map50_95"] for item in found]
    assert accuracies == sorted(accuracies, reverse=True)


def test_front_of_three_objectives_keeps_what_two_would_drop(record: Build) -> None:
    records = [record("a", 0.6, 8.0, metrics={"params_m": 2.0}), record("b", 0.5, 9.0, metrics={"params_m": 1.0})]
    assert [item.trial_id for item in front(records)] == ["a"]
    assert {item.trial_id for item in front(records, ("map50_95", "latency_ms", "params_m"))} == {"a", "b"}


def test_knee_is_farthest_from_the_chord(trials: list[TrialRecord]) -> None:
    members = brute_front(trials)
    points = np.array([[latency, -accuracy] for accuracy, latency in pairs(members)])
    low, high = points.min(axis=0), points.max(axis=0)
    scaled = (points - low) / np.where(high > low, high - low, 1.0)
    start, end = np.array([0.0, 1.0]), np.array([1.0, 0.0])  # the extremes of a scaled front
    chord = (end - start) / np.linalg.norm(end - start)
    offsets = scaled - start
    heights = -(chord[0] * offsets[:, 1] - chord[1] * offsets[:, 0])
    found = knee(trials)
    assert found is not None
    height = heights[[item.trial_id for item in members].index(found.trial_id)]
    assert height == pytest.approx(heights.max(), abs=1e-9)


def test_knee_of_tiny_fronts(record: Build) -> None:
    assert knee([]) is None
    only = record("only")
    assert knee([only]) == only
    assert knee([record("fast", 0.4, 5.0), record("good", 0.6, 9.0)]) == record("good", 0.6, 9.0)


@pytest.mark.parametrize("limit", [0.0, 2.5, 5.0, 7.0, 100.0])
def test_best_under_is_the_most_accurate_within_the_bound(trials: list[TrialRecord], limit: float) -> None:
    within = [pair for pair in pairs(trials) if pair[1] <= limit]
    found = best_under(trials, max_latency_ms=limit)
    assert pairs([found] if found else []) == sorted(within, key=lambda pair: (-pair[0], pair[1]))[:1]


def test_several_bounds_hold_together(trials: list[TrialRecord]) -> None:
    found = best_under(trials, max_latency_ms=9.0, max_params_m=2.0)
    within = [item for item in trials if item.metrics["latency_ms"] <= 9 and item.metrics["params_m"] <= 2]
    assert found is not None
    assert found.metrics["map50_95"] == max(item.metrics["map50_95"] for item in within)
    assert best_under(trials, max_gflops=5.0) is None  # no trial has the metric
    with pytest.raises(ResultsError, match="but got 'latency'"):
        best_under(trials, latency=9.0)


@pytest.mark.parametrize("drop", [-1.0, 0.0, 0.12, 0.35, 2.0])
def test_fastest_within_drop(trials: list[TrialRecord], drop: float) -> None:
    within = [pair for pair in pairs(trials) if pair[0] >= 0.8 - drop]
    found = fastest_within_drop(trials, {"metrics": {"map50_95": 0.8}}, drop)
    assert pairs([found] if found else []) == sorted(within, key=lambda pair: (pair[1], -pair[0]))[:1]


def test_a_drop_that_is_met_exactly_counts(record: Build) -> None:
    baseline = {"metrics": {"map50_95": 0.3}}
    assert fastest_within_drop([record("a", 0.2)], baseline, 0.1) is not None  # 0.3 - 0.1 is above 0.2 in binary


def smallest_gap(members: list[TrialRecord], chosen: tuple[TrialRecord, ...], whole: list[TrialRecord]) -> float:
    points = np.array(pairs(whole))
    scale = np.ptp(points, axis=0)
    shown = np.array(sorted(pairs(list(chosen)))) / scale
    return float(np.abs(np.diff(shown, axis=0)).sum(axis=1).min())


@pytest.mark.parametrize("k", [2, 3, 4])
def test_spread_has_the_largest_smallest_gap(trials: list[TrialRecord], k: int) -> None:
    members = brute_front(trials)
    found = spread(trials, k)
    assert len({item.trial_id for item in found}) == min(k, len(members))
    if len(members) > k:
        best = max(smallest_gap(members, subset, members) for subset in combinations(members, k))
        assert smallest_gap(members, tuple(found), members) == pytest.approx(best, abs=1e-9)


def test_spread_of_one_is_the_knee_and_of_none_is_refused(trials: list[TrialRecord]) -> None:
    assert spread(trials, 1) == [knee(trials)]
    assert spread([], 3) == []
    with pytest.raises(ResultsError, match="at least 1, but got 0"):
        spread(trials, 0)


def test_stopped_failed_and_other_fidelities_never_compete(record: Build) -> None:
    best = {"map50_95": 0.99, "latency_ms": 0.1}
    records = [
        record("a", 0.5, 8.0, epochs=3, fidelity="epochs"),
        record("b", 0.4, 7.0, epochs=3, fidelity="epochs"),
        record("full", 0.99, 0.1, epochs=50, fidelity="full"),
        record("refit", 0.99, 0.1),
        record("stopped", 0.99, 0.1, state="stopped", epochs=1, fidelity="epochs"),
        record("failed", state="failed", error="why", metrics=best),
    ]
    assert main_fidelity(records) == "3 epochs"
    assert [item.trial_id for item in front(records)] == ["a", "b"]
    for found in (
        knee(records),
        best_under(records),
        fastest_within_drop(records, {"metrics": {"map50_95": 1.0}}, 1.0),
    ):
        assert found is not None
        assert found.trial_id in ("a", "b")
    assert [item.trial_id for item in comparable(records, "full fine-tuning")] == ["full"]


def test_the_further_fidelity_wins_a_tie(record: Build) -> None:
    records = [record("a"), record("b", epochs=2, fidelity="epochs"), record("c", epochs=10, fidelity="epochs")]
    assert main_fidelity(records) == "10 epochs"
    assert main_fidelity([]) is None


def test_choose_gives_different_trials_of_the_front_and_the_knee_first(
    trials: list[TrialRecord], baseline: dict[str, Any]
) -> None:
    members = set(pairs(brute_front(trials)))
    for k in (1, 2, 3, 5, 100):
        picks = choose(trials, baseline, k)
        found = pairs([pick.record for pick in picks])
        assert picks[0].record == knee(trials)
        assert picks[0].chosen_as == "knee"
        assert len(set(found)) == len(found) == min(k, len(members))
        assert set(found) <= members
    assert choose([], baseline, 3) == []


def test_choose_says_why(record: Build, baseline: dict[str, Any]) -> None:
    records = [
        record("top", 0.611, 12.0),
        record("close", 0.60, 10.0),
        record("bend", 0.5, 6.0),
        record("low", 0.1, 5.0),
    ]
    reasons = {pick.trial_id: pick.chosen_as for pick in choose(records, baseline, 4)}
    assert reasons == {
        "bend": "knee",
        "close": "fastest within 0.02 of the unpruned model's mAP50-95",
        "top": "best under the baseline's 12.4 ms",
        "low": "spread over the front",
    }


def test_the_leading_pick_is_the_fastest_close_one_else_the_knee_else_the_most_accurate(tmp_path: Path) -> None:
    folder, baseline = RunFolder(tmp_path), {"metrics": {"map50_95": 0.8}}

    def leading(*picks: tuple[str, float, float, str]) -> str | None:
        for trial_id, accuracy, latency, chosen_as in picks:
            after = {"map50_95": accuracy, "latency_ms": latency}
            folder.write_selected(trial_id, {"after": after, "chosen_as": chosen_as})
        found = lead_pick(folder.read_selected(), baseline)
        return found.trial_id if found else None

    assert leading() is None
    assert leading(("a", 0.5, 5.0, "spread over the front"), ("b", 0.6, 6.0, "chosen by hand")) == "b"
    assert leading(("c", 0.4, 4.0, "knee")) == "c"
    assert leading(("d", 0.79, 8.0, "chosen by hand")) == "d"
    assert leading(("e", 0.78, 7.0, "chosen by hand"), ("f", 0.779, 6.5, "chosen by hand")) == "e"
