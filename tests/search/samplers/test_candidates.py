"""What the proposer promises: new plans, equal ones for equal evidence, and good ones on a problem that is known."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from scipy.stats import kendalltau

from benchmarks.synthetic import accuracy_of, exact_front, make_problem, volume
from paretoprune.results.selection.pareto import non_dominated
from paretoprune.search.samplers import candidates as module
from paretoprune.search.samplers.candidates import CandidateGenerator, Evidence, corners_of
from paretoprune.search.samplers.features import PlanFeatures
from paretoprune.search.samplers.gaussian_process import Surrogate, fit_hyperparameters

FEATURES = PlanFeatures.of_widths([(tuple(range(64, 16, -8)), 64)] * 4)
NONE = np.empty((0, 4), dtype=np.int64)


def evidence(count: int = 12, seed: int = 0, bounds: int = 0) -> Evidence:
    random = np.random.default_rng(seed)
    levels = random.integers(0, 6, (count, 4))
    losses = np.stack([(levels**2).sum(axis=1) / 100.0, 20.0 - levels.sum(axis=1)], axis=1).astype(float)
    return Evidence(levels, losses, np.zeros_like(losses), np.zeros((count, bounds)), NONE)


def test_equal_evidence_and_seed_give_the_equal_plan() -> None:
    assert CandidateGenerator(FEATURES, 3).propose(evidence(), set()) == CandidateGenerator(FEATURES, 3).propose(
        evidence(), set()
    )


def test_a_taken_plan_is_never_proposed_again() -> None:
    features = PlanFeatures.of_widths([((32, 24, 16), 32)] * 3)
    everything = set(product(range(3), repeat=3))
    last = (2, 0, 1)
    levels = np.array([(0, 0, 0), (1, 1, 1), (2, 2, 2)])
    losses = levels[:, :2] * [1.0, -1.0]
    known = Evidence(levels, losses, np.zeros((3, 2)), np.zeros((3, 0)), levels[:0])
    assert CandidateGenerator(features, 0).propose(known, everything - {last}) == last


def test_a_plan_under_way_is_not_the_best_idea_once_more() -> None:
    first = CandidateGenerator(FEATURES, 0).propose(evidence(), set())
    again = CandidateGenerator(FEATURES, 0).propose(replace(evidence(), pending=np.array([first])), {first})
    assert sum(abs(a - b) for a, b in zip(first, again, strict=True)) > 1


def test_bounds_turn_the_search_to_where_they_are_kept() -> None:
    free = evidence(20)
    slack = 14.0 - (20.0 - free.losses[:, 1])  # violated above 0: latency must fall by 14 or more
    bounded = replace(free, violations=slack[:, None])
    plan = CandidateGenerator(FEATURES, 0).propose(bounded, set())
    assert sum(plan) >= 13


def test_many_trials_are_thinned_and_the_front_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_POINTS", 10)
    known = evidence(40)
    thin = CandidateGenerator(FEATURES, 0)._thinned(known)
    assert len(thin.levels) == 10
    front = {tuple(row) for row in known.losses[non_dominated(known.losses)]}
    kept = {tuple(row) for row in thin.losses}
    assert front <= kept or len(front) > 10


def test_three_objectives() -> None:
    known = evidence()
    losses = np.column_stack([known.losses, known.losses.sum(axis=1)])
    plan = CandidateGenerator(FEATURES, 0).propose(
        replace(known, losses=losses, variances=np.zeros_like(losses)), set()
    )
    assert all(0 <= level < 6 for level in plan)


def test_hypervolume_counts_from_beyond_the_worst_and_from_what_is_of_use() -> None:
    """Of an accuracy from a half and three quarters of the best, too. Where no trial is that bad, or none is any good,
    all corners lie where the first one does."""
    losses = np.array([[-0.8, 5.0], [-0.1, 4.0]])
    beyond, *others = corners_of(losses)
    assert (beyond > losses.max(axis=0)).all()
    assert np.array_equal(others, [beyond, beyond])
    found = corners_of(losses, [0])
    assert found[:, 0] == pytest.approx([beyond[0], -0.4, -0.6])
    assert found[:, 1] == pytest.approx(beyond[1])
    good = corners_of(np.array([[-0.8, 5.0], [-0.7, 4.0]]), [0])
    assert np.array_equal(good, [good[0]] * 3)
    nothing = corners_of(np.zeros((2, 2)), [0])
    assert np.isfinite(nothing).all()
    assert (nothing[:, 1] > 0).all()


def test_plans_that_ruin_the_network_are_no_candidates() -> None:
    """By their estimated loss: no more than the heaviest plan of the path. Without estimates all are."""
    problem = make_problem(layers=6, seed=3)
    prior, tops = problem.prior, np.array(list(problem.space.sizes.values())) - 1
    light = replace(prior, path=prior.path[: len(prior.path) // 2])
    features = PlanFeatures.of(problem.space, light)
    ruin = np.array([[*tops[:-1], 0]])
    most = features.lost(light.path).max()
    assert features.lost(ruin)[0, 0] > most
    pool = CandidateGenerator(features, 0, light.path)._candidates(light.path[:1], set())
    assert len(pool) > 100
    assert features.lost(pool).max() <= most
    assert CandidateGenerator(features, 0, light.path)._sensible(ruin).tolist() == ruin.tolist()
    plain = CandidateGenerator(PlanFeatures.of(problem.space), 0)._candidates(light.path[:1], set())
    assert features.lost(plain).max() > most


def test_no_plan_is_expected_to_beat_the_unpruned_network_of_its_size() -> None:
    """Where that was measured, and no trial there did; costs have no floor."""
    features = replace(FEATURES, areas=np.array([1.0, 0.6, 0.3]))
    levels = np.array([(0, 0, 0, 0, 0), (1, 0, 0, 0, 0), (0, 0, 0, 0, 1), (2, 1, 0, 0, 1), (1, 1, 1, 1, 2)])
    losses = np.array([[-0.8, 9.0], [-0.82, 8.0], [-0.7, 5.0], [-0.6, 4.0], [-0.5, 3.0]])
    known = Evidence(levels, losses, np.zeros_like(losses), np.zeros((5, 0)), levels[:0], accuracies=[0])
    floors = CandidateGenerator(features, 0)._floors(known)
    plans = np.array([(3, 0, 0, 0, 0), (3, 3, 3, 3, 1), (3, 0, 0, 0, 2)])
    assert floors(plans).tolist() == [[-0.82, -np.inf], [-0.7, -np.inf], [-np.inf, -np.inf]]


def test_the_exact_front_of_the_synthetic_problem_is_brute_forces() -> None:
    problem = make_problem(layers=4, seed=2)
    front = exact_front(problem)
    plans = product(*(range(size) for size in problem.space.sizes.values()))
    truth = [problem.truth(plan) for plan in plans]
    assert volume(front.tolist()) == pytest.approx(volume(truth), rel=1e-3)
    assert accuracy_of(0.0) == pytest.approx(front[:, 0].max())


def test_estimated_losses_are_a_family_and_the_path_is_tried() -> None:
    """The feature is the sum of the axes' losses at the plan's widths; plans of least loss are candidates."""
    problem = make_problem(layers=6, seed=3)
    prior = problem.prior
    features = PlanFeatures.of(problem.space, prior)
    sums = np.array([sum(prior.losses[axis][level] for axis, level in enumerate(plan[:-1])) for plan in prior.path])
    plain, family = PlanFeatures.of(problem.space).design(prior.path), features.design(prior.path).families[0]
    assert len(features.design(prior.path).families) == len(plain.families) + 1
    sums /= np.median(sums)
    assert np.corrcoef(family[:, 1], sums / (1 + sums))[0, 1] == pytest.approx(1)
    assert np.corrcoef(family[:, 0], np.log1p(sums))[0, 1] == pytest.approx(1)
    pool = CandidateGenerator(features, 0, prior.path)._candidates(prior.path[:1], set())
    assert set(map(tuple, prior.path)) <= set(map(tuple, pool))


def test_a_cost_does_not_see_what_accuracy_loses() -> None:
    """Else a plan of an unusual estimated loss would be of unknown cost. Bounds may be on either and see everything."""
    problem = make_problem(layers=6, seed=3)
    features, path = PlanFeatures.of(problem.space, problem.prior), problem.prior.path[:8]
    losses = np.zeros((len(path), 2))
    known = Evidence(path, losses, losses, np.zeros((len(path), 1)), path[:0], accuracies=[1])
    design = features.design(path)
    seen = [view(design).families for view in CandidateGenerator(features, 0)._seen_by(known)]
    assert [len(families) for families in seen] == [len(design.families) - 1, *[len(design.families)] * 2]
    assert seen[0][0] is design.families[1]


def test_an_estimate_of_the_loss_tells_plans_apart_that_were_not_tried() -> None:
    """Accuracy falls with the estimated loss: from 6 plans the order of 200 others is known, else it is not."""
    problem, random = make_problem(layers=24, seed=0), np.random.default_rng(0)
    sizes = np.array(list(problem.space.sizes.values()))
    plans = random.integers(0, sizes, (206, len(sizes)))
    plans[:, -1] = 0  # one size
    lost = sum(values[plans[:, axis]] for axis, values in enumerate(problem.prior.losses))
    agreements = []
    for features in (PlanFeatures.of(problem.space, problem.prior), PlanFeatures.of(problem.space)):
        design, rest = features.design(plans[:6]), features.design(plans[6:])
        surrogate = Surrogate(
            design, lost[:6] ** 0.75, np.zeros(6), fit_hyperparameters(design, lost[:6] ** 0.75, np.zeros(6))
        )
        agreements.append(kendalltau(surrogate.predict(rest)[0], lost[6:]).statistic)
    assert agreements[0] > 0.9 > 0.5 > agreements[1]


def test_it_beats_chance_by_far_on_the_synthetic_problem() -> None:
    problem = make_problem(layers=12, seed=1)
    front, random = exact_front(problem), np.random.default_rng(0)
    features = PlanFeatures.of(problem.space)
    tops = np.array(features.sizes)
    drawn = [tuple(int(x) for x in random.integers(0, tops)) for _ in range(40)]
    tried = drawn[:6]
    proposer = CandidateGenerator(features, 0)
    while len(tried) < 40:
        seen = [problem.observe(plan, random) for plan in tried]
        losses = np.array([[-metrics["map50_95"], metrics["latency_ms"]] for metrics in seen])
        levels = np.array(tried)
        known = Evidence(levels, losses, np.zeros_like(losses), np.zeros((len(tried), 0)), levels[:0])
        tried.append(proposer.propose(known, set(tried)))
    assert problem.share(tried, front) > problem.share(drawn, front) + 0.2
