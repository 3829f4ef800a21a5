"""Expected hypervolume improvement against counting, and the free cells against the box they come from."""

from __future__ import annotations

import numpy as np
import pytest

from paretoprune.results.selection.pareto import hypervolume
from paretoprune.search.samplers.acquisition import expected_improvement, free_cells

NO_FLOORS = np.full((1, 2), -np.inf)


def a_front(objectives: int, points: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((points, objectives))


@pytest.mark.parametrize("objectives", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_cells_are_the_box_without_what_is_dominated(objectives: int, seed: int) -> None:
    front, reference = a_front(objectives, seed=seed), np.full(objectives, 0.8)
    lower, upper = free_cells(front, reference)
    free = np.prod(upper - np.maximum(lower, 0.0), axis=1).sum()
    assert free == pytest.approx(0.8**objectives - hypervolume(front, reference))
    middles = np.random.default_rng(seed).random((300, objectives)) * 0.8
    inside = ((middles[:, None] > lower) & (middles[:, None] < upper)).all(axis=2).sum(axis=1)
    dominated = (front[None] <= middles[:, None]).all(axis=2).any(axis=1)
    assert (inside == np.where(dominated, 0, 1)).all()


def every_cell(front: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of equal weight."""
    lower, upper = free_cells(front, reference)
    return lower, upper, np.ones(len(lower))


@pytest.mark.parametrize("objectives", [2, 3])
def test_the_expectation_is_the_mean_of_many_draws(objectives: int) -> None:
    front, reference = a_front(objectives), np.ones(objectives)
    random = np.random.default_rng(1)
    means, spreads = random.random((4, objectives)), 0.05 + 0.3 * random.random((4, objectives))
    floors = np.array(
        [[-np.inf] * objectives, [0.2] * objectives, [0.4, *[-np.inf] * (objectives - 1)], [0.9] * objectives]
    )
    found = expected_improvement(means, spreads, floors, *every_cell(front, reference))
    base = hypervolume(front, reference)
    for index in range(4):
        draws = np.maximum(random.normal(means[index], spreads[index], (3000, objectives)), floors[index])
        gains = [hypervolume(np.vstack([front, draw]), reference) - base for draw in draws]
        assert found[index] == pytest.approx(np.mean(gains), abs=4 * np.std(gains) / np.sqrt(3000) + 1e-9)


def test_without_a_front_everything_below_the_reference_counts() -> None:
    cells = every_cell(np.empty((0, 2)), np.array([1.0, 2.0]))
    sure = expected_improvement(np.array([[0.5, 0.5]]), np.full((1, 2), 1e-9), NO_FLOORS, *cells)
    assert sure[0] == pytest.approx(0.5 * 1.5)


def test_a_certainly_dominated_point_promises_nothing() -> None:
    cells = every_cell(np.array([[0.2, 0.2]]), np.ones(2))
    assert expected_improvement(np.array([[0.5, 0.5]]), np.full((1, 2), 1e-3), NO_FLOORS, *cells)[0] < 1e-12


def test_cells_count_by_their_weights() -> None:
    """Two boxes, the one inside the other with twice the weight: each one's own expectation, so weighed."""
    front, means, spreads = a_front(2), np.full((1, 2), 0.3), np.full((1, 2), 0.2)
    one, two = every_cell(front, np.ones(2)), every_cell(front, np.array([0.6, 1.0]))
    both = [np.concatenate(parts) for parts in zip(one, (two[0], two[1], 2 * two[2]), strict=True)]
    alone = [float(expected_improvement(means, spreads, NO_FLOORS, *cells)[0]) for cells in (one, two)]
    assert 0 < alone[1] < alone[0]
    assert expected_improvement(means, spreads, NO_FLOORS, *both)[0] == pytest.approx(alone[0] + 2 * alone[1])
