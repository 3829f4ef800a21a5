"""Ties and standings against their definitions written out pair by pair."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from paretoprune.results.selection.selection import front
from paretoprune.results.selection.uncertainty import (
    UNKNOWN,
    Z95,
    AccuracyNoise,
    accuracy_noise,
    beaten_by_free_moves,
    beaten_picks,
    loss_intervals,
    standings,
)
from paretoprune.results.store.records import TrialRecord, as_record
from paretoprune.results.store.run_files import Native, Selected

Build = Callable[..., TrialRecord]
BASE_MS = 12.0


def measured(record: Build, name: str, accuracy: float, speedup: float, half: float) -> TrialRecord:
    metrics = {"speedup": speedup, "speedup_ci95": [speedup - half, speedup + half]}
    return record(name, accuracy, BASE_MS / speedup, metrics=metrics)


@pytest.fixture(params=range(5))
def trials(request: pytest.FixtureRequest, record: Build) -> list[TrialRecord]:
    rng = np.random.default_rng(request.param)
    rows = zip(rng.uniform(0.4, 0.6, 30), rng.uniform(1, 2, 30), rng.uniform(0.01, 0.1, 30), strict=True)
    return [measured(record, f"t{i:02d}", round(a, 2), s, h) for i, (a, s, h) in enumerate(rows)]


def clearly_better(a: TrialRecord, b: TrialRecord, std: float) -> list[bool]:
    """Per objective: accuracy beyond the noise of the difference, latency with intervals that do not meet."""
    accuracy = a.metrics["map50_95"] - b.metrics["map50_95"] > Z95 * std
    return [accuracy, a.metrics["speedup_ci95"][0] > b.metrics["speedup_ci95"][1]]


@pytest.mark.parametrize("std", [0.0, 0.017, 0.2])
def test_standings_are_what_every_pair_says(trials: list[TrialRecord], std: float) -> None:
    found = standings(trials, trials, noise=AccuracyNoise({"map50_95": std}))
    for a in trials:
        others = [b for b in trials if b is not a]
        tied = [b.trial_id for b in others if not any(clearly_better(a, b, std) + clearly_better(b, a, std))]
        beating = [b.trial_id for b in others if any(clearly_better(b, a, std)) and not any(clearly_better(a, b, std))]
        assert found[a.trial_id].tied_with == tuple(tied)
        assert found[a.trial_id].beaten_by == tuple(beating)
        assert found[a.trial_id].firm == (not tied and not beating)


@pytest.mark.parametrize("std", [0.0, 0.017])
def test_a_free_move_beats_what_every_pair_says(trials: list[TrialRecord], std: float) -> None:
    """The most accurate one that is clearly better in accuracy or latency and clearly worse in neither."""
    moves = [as_record(f"unpruned@{32 * k}", {**item.metrics, "params_m": 9.0}) for k, item in enumerate(trials[:4], 7)]
    found = beaten_by_free_moves(trials[4:], moves, AccuracyNoise({"map50_95": std}))
    for trial in trials[4:]:
        beating = [m for m in moves if any(clearly_better(m, trial, std)) and not any(clearly_better(trial, m, std))]
        best = max((move.metrics["map50_95"] for move in beating), default=None)
        assert (trial.trial_id in found) == bool(beating)
        if beating:
            assert found[trial.trial_id] in {m.trial_id for m in beating if m.metrics["map50_95"] == best}
    assert found
    assert beaten_by_free_moves(trials, []) == {}


def test_as_accurate_and_as_fast_is_not_beaten_and_a_failed_trial_neither(record: Build) -> None:
    move = measured(record, "unpruned@256", 0.6, 1.5, 0.0)
    same, slower = measured(record, "same", 0.6, 1.5, 0.0), measured(record, "slower", 0.6, 1.4, 0.0)
    failed = record("failed", state="failed", error="no luck", metrics={}).changed(metrics={})
    assert beaten_by_free_moves([same, slower, failed], [move]) == {"slower": "unpruned@256"}


def test_a_pick_is_compared_with_the_fine_tuned_free_move_where_there_is_one(record: Build) -> None:
    def after(accuracy: float, speedup: float) -> dict[str, Any]:
        return dict(measured(record, "x", accuracy, speedup, 0.01).metrics)

    picks = [Selected(trial_id="t1", after=after(0.62, 1.5), directory="t1")]
    move = measured(record, "unpruned@256", 0.6, 1.5, 0.01)
    tuned = Native(name="unpruned@256", after=after(0.63, 1.5), directory="n")
    assert beaten_picks(picks, [move]) == {}
    assert beaten_picks(picks, [move], [tuned]) == {"t1": "unpruned@256"}


def test_a_front_member_that_leads_by_less_than_the_noise_is_said_to(record: Build) -> None:
    slow, fast = measured(record, "slow", 0.601, 1.2, 0.01), measured(record, "fast", 0.600, 1.6, 0.01)
    noise = AccuracyNoise({"map50_95": 0.01})
    assert standings([slow, fast], [slow, fast], noise=noise)["slow"].beaten_by == ("fast",)
    assert standings([slow, fast], [slow, fast], noise=AccuracyNoise())["slow"].beaten_by == ()


def test_a_predicted_latency_ties_by_the_predictions_interval(record: Build) -> None:
    a = measured(record, "a", 0.6, 1.50, 0.03)
    metrics = {"speedup": 1.6, "latency_source": "foretold"}
    for half, tied in ((0.08, ("a",)), (0.06, ())):
        b = record("b", 0.6, BASE_MS / 1.6, metrics={**metrics, "speedup_pi95": [1.6 - half, 1.6 + half]})
        assert standings([b], [a])["b"].tied_with == tied


def test_overlapping_latencies_of_equal_accuracy_tie(record: Build) -> None:
    a, b = measured(record, "a", 0.6, 1.50, 0.03), measured(record, "b", 0.6, 1.54, 0.03)
    assert standings([a], [a, b])["a"].tied_with == ("b",)
    c = measured(record, "c", 0.6, 1.60, 0.03)
    assert standings([a], [a, c])["a"].tied_with == ()


def test_intervals_hold_the_loss_and_are_exact_without_measurements(record: Build) -> None:
    rows = [measured(record, "a", 0.6, 1.5, 0.1), record("bare", 0.5, 8.0)]
    low, high = loss_intervals(rows, noise=AccuracyNoise({"map50_95": 0.02}))
    assert low.shape == high.shape == (2, 2)
    assert low[0] == pytest.approx([-0.6 - Z95 * 0.01, BASE_MS / 1.6])
    assert high[0] == pytest.approx([-0.6 + Z95 * 0.01, BASE_MS / 1.4])
    assert low[1, 1] == high[1, 1] == 8.0
    params = record("p", metrics={"params_m": 2.0})
    assert loss_intervals([params], ("map50_95", "params_m"))[0][0, 1] == 2.0


def test_noise_comes_from_the_run_or_from_the_number_of_images(baseline: dict[str, Any]) -> None:
    assert accuracy_noise(baseline).source == UNKNOWN
    assert accuracy_noise(baseline).text == UNKNOWN
    counted = accuracy_noise({**baseline, "noise": {"images": 100}})
    assert counted.std["map50_95"] == pytest.approx(math.sqrt(2 * 0.612 * 0.388 / 100))
    assert "number of validation images (100)" in counted.source
    own = accuracy_noise({**baseline, "noise": {"map50_95_std": 0.01, "images": 100, "source": "bootstrap"}})
    assert own.std == {"map50_95": 0.01}
    assert own.text == "differences of mAP50-95 up to 0.020 may be luck (bootstrap)"


def test_on_all_images_the_noise_is_that_of_more_images(baseline: dict[str, Any]) -> None:
    """The deviation of a mean over four times as many is half; so it is where only their numbers are known."""
    sampled = {**baseline, "metrics": {**baseline["metrics"], "val_images": 100, "val_images_all": 400}}
    for noise in ({"map50_95_std": 0.01, "images": 100}, {"images": 100}):
        some, every = (accuracy_noise({**sampled, "noise": noise}, on_all=on_all) for on_all in (False, True))
        assert every.std["map50_95"] == pytest.approx(some.std["map50_95"] / 2)
        assert accuracy_noise({**baseline, "noise": noise}, on_all=True).std == some.std


def test_a_pick_is_compared_with_a_free_move_on_all_images(record: Build) -> None:
    pick = Selected(trial_id="t1", after=measured(record, "x", 0.60, 1.5, 0.0).metrics, directory="t1")
    for on_all, beaten in ((0.59, {}), (0.61, {"t1": "unpruned@256"})):
        move = measured(record, "unpruned@256", 1.2 - on_all, 1.5, 0.0)
        move = move.changed(metrics={**move.metrics, "map50_95_all": on_all})
        assert beaten_picks([pick], [move]) == beaten


def test_nobody_to_compare_with(record: Build) -> None:
    assert standings([], []) == {}
    assert standings([record("a")], [])["a"].firm


def test_a_front_over_two_devices(record: Build) -> None:
    """Three trials of which each is the best somewhere, and one that another beats everywhere."""
    figures = {"a": (0.5, 8.0, 100.0), "b": (0.5, 9.0, 80.0), "c": (0.6, 9.5, 120.0), "d": (0.5, 9.0, 100.0)}
    records = []
    for name, (accuracy, here, there) in figures.items():
        plain = record(name, accuracy, here)
        more = {"latency_ms_pi": there, "speedup_pi": 200 / there, "speedup_ci95_pi": [190 / there, 210 / there]}
        records.append(plain.changed(metrics={**plain.metrics, **more}))
    names = ["map50_95", "latency_ms", "latency_ms_pi"]
    assert {each.trial_id for each in front(records, names)} == {"a", "b", "c"}
    low, high = loss_intervals(records, names)
    assert [low[0, 2], high[0, 2]] == pytest.approx([100 * 200 / 210, 100 * 200 / 190])
