"""The front and the hypervolume against brute force."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from paretoprune.results.errors import ResultsError
from paretoprune.results.selection.pareto import hypervolume, non_dominated


def brute_force_front(points: np.ndarray) -> list[bool]:
    """Straight from the definition of dominance."""
    return [
        not any(all(b <= a for a, b in zip(row, other, strict=True)) and any(other < row) for other in points)
        for row in points
    ]


def grid_volume(points: np.ndarray, corner: np.ndarray) -> float:
    """Exact: cut space at every coordinate that occurs, add up the cells whose lower corner is dominated."""
    cuts = [
        np.unique(np.append(np.minimum(points[:, axis], corner[axis]), corner[axis])) for axis in range(len(corner))
    ]
    total = 0.0
    for cell in np.ndindex(*(len(cut) - 1 for cut in cuts)):
        low = np.array([cut[index] for cut, index in zip(cuts, cell, strict=True)])
        high = np.array([cut[index + 1] for cut, index in zip(cuts, cell, strict=True)])
        if (points <= low).all(axis=1).any():
            total += float(np.prod(high - low))
    return total


def inclusion_exclusion(points: np.ndarray, corner: np.ndarray) -> float:
    """The volume of a union of boxes as the alternating sum over all their intersections."""
    total = 0.0
    for size in range(1, len(points) + 1):
        for subset in combinations(points, size):
            sides = np.clip(corner - np.max(subset, axis=0), 0, None)
            total += (-1) ** (size + 1) * float(np.prod(sides))
    return total


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
@pytest.mark.parametrize("levels", [3, 8, None])
def test_front_is_what_the_definition_says(objectives: int, levels: int | None) -> None:
    rng = np.random.default_rng(objectives)
    for size in (1, 2, 7, 40):
        points = rng.random((size, objectives)) if levels is None else rng.integers(0, levels, (size, objectives)) * 1.0
        assert non_dominated(points).tolist() == brute_force_front(points)


def test_equal_rows_all_stay_and_the_order_of_rows_does_not_matter() -> None:
    points = np.array([[1.0, 2.0], [0.0, 3.0], [1.0, 2.0], [1.0, 3.0]])
    assert non_dominated(points).tolist() == [True, True, True, False]
    order = np.array([3, 2, 1, 0])
    assert non_dominated(points[order]).tolist() == [False, True, True, True]


def test_a_front_without_points_is_empty() -> None:
    assert non_dominated(np.empty((0, 2))).shape == (0,)


def test_infinity_is_a_loss_like_any_other() -> None:
    assert non_dominated([[np.inf, 0.0], [1.0, 0.0], [0.0, np.inf]]).tolist() == [False, True, True]


def test_nan_and_wrong_shapes_are_refused() -> None:
    with pytest.raises(ResultsError, match=r"losses must not be NaN, but row 1 is \[nan, 2.0\]"):
        non_dominated([[1.0, 2.0], [np.nan, 2.0]])
    with pytest.raises(ResultsError, match=r"shape \(points, objectives\), but got \(3,\)"):
        non_dominated([1.0, 2.0, 3.0])
    with pytest.raises(ResultsError, match="must not be NaN"):
        hypervolume([[np.nan, 0.0]], [1.0, 1.0])


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
@pytest.mark.parametrize("levels", [4, None])
def test_hypervolume_equals_the_grid_and_inclusion_exclusion(objectives: int, levels: int | None) -> None:
    rng = np.random.default_rng(10 + objectives)
    for size in (1, 3, 8):
        points = (
            rng.random((size, objectives)) if levels is None else rng.integers(0, levels, (size, objectives)) / levels
        )
        corner = np.full(objectives, 0.8)  # some points lie beyond it
        found = hypervolume(points, corner)
        assert found == pytest.approx(grid_volume(points, corner), abs=1e-12)
        assert found == pytest.approx(inclusion_exclusion(points, corner), abs=1e-9)


def test_hypervolume_of_many_points_in_three_objectives_equals_the_grid() -> None:
    points = np.random.default_rng(0).integers(0, 7, (60, 3)) * 1.0
    corner = np.array([6.0, 7.0, 5.0])
    assert hypervolume(points, corner) == pytest.approx(grid_volume(points, corner), abs=1e-9)


def test_hypervolume_closed_forms() -> None:
    assert hypervolume([[0.25, 0.5]], [1.0, 1.0]) == pytest.approx(0.375)
    assert hypervolume([[0.25, 0.5], [0.25, 0.5]], [1.0, 1.0]) == pytest.approx(0.375)
    assert hypervolume([[1.0, 0.0]], [1.0, 1.0]) == 0.0
    assert hypervolume(np.empty((0, 2)), [1.0, 1.0]) == 0.0
    assert hypervolume([[np.inf, 0.0], [0.5, 0.5]], [1.0, 1.0]) == pytest.approx(0.25)


def test_hypervolume_refuses_what_has_no_volume() -> None:
    with pytest.raises(ResultsError, match="reference must be 2 finite numbers"):
        hypervolume([[0.0, 0.0]], [1.0, np.inf])
    with pytest.raises(ResultsError, match="reference must be 2 finite numbers"):
        hypervolume([[0.0, 0.0]], [1.0, 1.0, 1.0])
    with pytest.raises(ResultsError, match="above -inf"):
        hypervolume([[-np.inf, 0.0]], [1.0, 1.0])
