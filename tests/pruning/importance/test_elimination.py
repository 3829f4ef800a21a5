"""Giving up inputs with the rest refitted: against ridge regressions solved anew for every subset."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from paretoprune.pruning.importance.elimination import Reader, removal_errors

RIDGE = 1e-6


def problem(inputs: int = 6, outputs: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated inputs' second moments (inputs, inputs), regular, and weights (inputs, outputs); float64."""
    g = torch.Generator().manual_seed(seed)
    mixed = torch.randn(200, inputs, generator=g, dtype=torch.float64) @ torch.randn(
        inputs, inputs, generator=g, dtype=torch.float64
    )
    moments = mixed.T @ mixed / 200 + RIDGE * torch.eye(inputs, dtype=torch.float64)
    return moments, torch.randn(inputs, outputs, generator=g, dtype=torch.float64)


def least_error(moments: torch.Tensor, weights: torch.Tensor, gone: tuple[int, ...]) -> float:
    """min over v of (w - v)' H (w - v) where v is zero at `gone`, by solving for the others."""
    keep = [i for i in range(len(moments)) if i not in gone]
    wanted = moments @ weights
    best = torch.zeros_like(weights)
    if keep:
        best[keep] = torch.linalg.solve(moments[keep][:, keep], wanted[keep])
    return float(((weights - best) * (moments @ (weights - best))).sum())


def reader(moments: torch.Tensor, weights: torch.Tensor, places: dict[int, list[int]]) -> Reader:
    return Reader(torch.linalg.inv(moments), weights.clone(), places)


def test_costs_are_those_of_a_new_regression_without_the_class() -> None:
    moments, weights = problem()
    places = {10: [0], 11: [1, 4], 12: [2, 3, 5]}
    costs = reader(moments, weights, dict(places)).costs()
    for name, inputs in places.items():
        assert costs[name] == pytest.approx(least_error(moments, weights, tuple(inputs)), rel=1e-6)


def test_removals_one_after_the_other_add_up_to_the_joint_one() -> None:
    moments, weights = problem()
    mine = reader(moments, weights, {c: [c] for c in range(6)})
    total = 0.0
    for name in (3, 0, 5):
        total += mine.costs()[name]
        mine.remove([name])
    assert total == pytest.approx(least_error(moments, weights, (0, 3, 5)), rel=1e-6)
    jointly = reader(moments, weights, {c: [c] for c in range(6)})
    jointly.remove([3, 0, 5])
    assert mine.costs() == pytest.approx(jointly.costs(), rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_the_order_is_the_greedy_one_of_new_regressions(seed: int) -> None:
    """Two readers, each input a class of its own; every step compared with all alternatives solved anew."""
    problems = [problem(seed=seed), problem(seed=seed + 100)]
    losses = removal_errors([reader(h, w, {c: [c] for c in range(6)}) for h, w in problems], [np.arange(6)], rounds=6)
    gone: tuple[int, ...] = ()
    for name in losses:
        left = [c for c in range(6) if c not in gone]
        error = {c: sum(least_error(h, w, (*gone, c)) for h, w in problems) for c in left}
        assert error[name] == pytest.approx(min(error.values()), rel=1e-6)
        gone = (*gone, name)
    assert list(losses.values()) == sorted(losses.values())


def test_a_copy_of_another_channel_is_free_but_not_both() -> None:
    """Magnitudes or single removals would let both go: each is worthless while the other is there."""
    moments, weights = problem(4)
    twice = torch.tensor([0, 1, 2, 3, 3])
    moments = moments[twice][:, twice] + 1e-9 * torch.eye(5, dtype=torch.float64)
    weights = weights[twice]
    single = reader(moments, weights, {c: [c] for c in range(5)}).costs()
    assert max(single[3], single[4]) < 1e-6 < min(single[c] for c in range(3))
    order = list(losses := removal_errors([reader(moments, weights, {c: [c] for c in range(5)})], [np.arange(5)], 5))
    assert order[0] in (3, 4)
    assert losses[order[0]] < 1e-6
    other = 7 - order[0]
    assert losses[other] > 1e-3


def test_parts_keep_the_same_proportion() -> None:
    moments, weights = problem(12)
    weights[:8] *= 1e-3  # the first part is worthless; the second still loses its share
    parts = [np.arange(8), np.arange(8, 12)]
    losses = removal_errors([reader(moments, weights, {c: [c] for c in range(12)})], parts, rounds=4)
    order = list(losses)
    for k in range(4):
        step = order[3 * k : 3 * k + 3]
        assert [c < 8 for c in step] == [True, True, False]


def test_a_class_nobody_reads_costs_nothing_and_goes_first() -> None:
    moments, weights = problem()
    losses = removal_errors([reader(moments, weights, {c: [c] for c in range(6)})], [np.arange(8)], rounds=8)
    assert set(itertools.islice(losses, 2)) == {6, 7}
    assert losses[6] == losses[7] == 0.0
