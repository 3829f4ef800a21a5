"""The benchmark's rivals do what their names say, on a network of two layers."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest

from benchmarks.real_search import picks_of, volume
from benchmarks.rivals import RIVALS, Listed, Nsga2, OptunaTpe, Problem, spread_order
from paretoprune.results.store.records import TrialRecord, TrialState
from paretoprune.search.space.space import Axis, GroupChoice, Levels, Space
from tests.search.space.test_latency_predictor import LAYERS, geometry, record

WIDTHS = tuple(range(64, 15, -4))
TRIALS = 8


def problem() -> Problem:
    """The second layer's channels are worth half the first's, by both criteria; its curve is flat for long."""
    space = Space(tuple(Axis(n, (GroupChoice(n, i, (n,), 64, WIDTHS),)) for i, n in enumerate(LAYERS)), {})
    first = np.linspace(1.0, 2.0, 64)
    scores = {name: [first, first / 2] for name in ("taylor", "l2")}
    ratios = np.array([1 - width / 64 for width in WIDTHS])
    return Problem(space, geometry(), scores, [0.4 * ratios, 0.4 * ratios**4])


def ratios_of(levels: Levels) -> tuple[float, float]:
    ratios = problem().space.plan(levels).ratios
    return ratios.get(LAYERS[0], 0.0), ratios.get(LAYERS[1], 0.0)


def ratio(record: TrialRecord) -> float:
    return float(record.metrics["latency_ratio"])


def plans_of(name: str, seed: int = 0) -> list[Levels]:
    rival = RIVALS[name](problem(), TRIALS, seed)
    plans = []
    while len(plans) < TRIALS and (levels := rival.ask()) is not None:
        plans.append(levels)
        rival.tell(levels, {"map50_95": 0.5, "cost": 10.0})
    return plans


@pytest.mark.parametrize("name", RIVALS)
def test_every_rival_proposes_plans_of_the_space(name: str) -> None:
    plans = plans_of(name)
    assert 4 <= len(plans) <= TRIALS
    assert all(0 <= level < len(WIDTHS) for plan in plans for level in plan)
    assert plans_of(name) == plans


def test_random_search_depends_on_the_seed_and_the_ladder_does_not() -> None:
    assert plans_of("random", 0) != plans_of("random", 1)
    assert plans_of("uniform-ladder", 0) == plans_of("uniform-ladder", 1)
    assert all(first == pytest.approx(second) for first, second in map(ratios_of, plans_of("uniform-ladder")))


def test_a_ranking_removes_the_lowest_wherever_they_are() -> None:
    """Raw scores: all of the second layer's (0.5 to 1) lie below the first's (1 to 2), so it goes first."""
    for first, second in map(ratios_of, plans_of("global-taylor")):
        assert first == 0 or second == pytest.approx(0.75)
    # Divided by their means the two layers are alike.
    assert all(first == pytest.approx(second, abs=0.07) for first, second in map(ratios_of, plans_of("global-norm")))


def test_a_threshold_takes_each_layer_as_far_as_its_curve_allows() -> None:
    losses = problem().losses
    for levels in plans_of("sensitivity-threshold"):
        lost = max(float(curve[level]) for curve, level in zip(losses, levels, strict=True))
        least_next = [
            float(curve[level + 1]) for curve, level in zip(losses, levels, strict=True) if level + 1 < len(curve)
        ]
        assert all(following > lost for following in least_next)


def test_plans_by_cost_spread_over_the_costs() -> None:
    shares = sorted(problem().kept_macs(levels) for levels in plans_of("uniform-ladder"))
    assert shares[0] < 0.2
    ranked = sorted(problem().kept_macs(levels) for levels in plans_of("global-norm"))
    assert ranked[0] == pytest.approx(0.3, abs=0.05)
    assert ranked[-1] == pytest.approx(0.95, abs=0.07)


@pytest.mark.parametrize("kind", [OptunaTpe, Nsga2])
def test_learning_rivals_are_told_their_results_under_two_in_flight(kind: Any) -> None:
    rival = kind(problem(), TRIALS, 0)
    flying = [rival.ask(), rival.ask()]
    for _ in range(20):
        levels = flying.pop(0)
        rival.tell(levels, {"map50_95": 0.6 - 0.2 * ratios_of(levels)[0], "cost": 20.0 - 10 * ratios_of(levels)[1]})
        flying.append(rival.ask())
    study = rival._study if kind is Nsga2 else rival._search._ot_study
    done = [trial for trial in study.trials if trial.values is not None]
    assert len(done) == 20
    assert all(0.4 <= trial.values[0] <= 0.6 and 10 <= trial.values[1] <= 20 for trial in done)


def test_any_beginning_of_the_order_is_spread() -> None:
    for count in (1, 2, 7, 16, 18):
        order = spread_order(count)
        assert sorted(order) == list(range(count))
    assert {value // 4 for value in spread_order(16)[:4]} == {0, 1, 2, 3}
    plans: list[Levels] = [(level, level) for level in range(8)]
    listed = Listed(plans)
    assert [listed.ask() for _ in range(9)] == [plans[i] for i in spread_order(8)] + [None]


def finished(number: int, accuracy: float, ratio: float, state: TrialState = TrialState.COMPLETED) -> TrialRecord:
    content = record(number, {}).to_json()
    content["metrics"] |= {"map50_95": accuracy, "latency_ratio": ratio}
    return TrialRecord.from_json({**content, "state": state})


def test_picks_have_the_most_hypervolume() -> None:
    random = np.random.default_rng(0)
    points = [
        (float(a), float(r)) for a, r in zip(random.uniform(0.3, 0.9, 12), random.uniform(0.3, 0.9, 12), strict=True)
    ]
    records = [finished(i, *point) for i, point in enumerate(points)]
    best = max(volume(list(chosen)) for chosen in combinations(points, 3))
    chosen = [points[int(pick.trial_id[1:])] for pick in picks_of(records, 3, ratio)]
    assert volume(chosen) == pytest.approx(best)
    assert picks_of([], 3, ratio) == []
    better = finished(99, 0.99, 0.01, TrialState.STOPPED)
    assert better.trial_id not in {pick.trial_id for pick in picks_of([*records, better], 3, ratio)}


def test_volume_is_the_area_of_the_staircase() -> None:
    assert volume([(0.5, 0.6)]) == pytest.approx(0.5 * 0.4)
    assert volume([(0.5, 0.6), (0.8, 0.9)]) == pytest.approx(0.5 * 0.4 + 0.3 * 0.1)
    assert volume([(0.5, 1.2)]) == volume([]) == 0.0
