"""What a run's baseline says of plans before any was tried."""

from __future__ import annotations

import numpy as np
import pytest

from paretoprune.pruning.plan import Plan
from paretoprune.search.samplers.prior import Prior, path_levels
from paretoprune.search.space.space import Axis, GroupChoice, SizeAxis, Space

CHOICES = (
    GroupChoice("model.0.conv", 0, ("model.0.conv",), 32, (32, 24, 16)),
    GroupChoice("model.1.conv", 1, ("model.1.conv",), 16, (16, 8)),
)
GROUPS = [
    {"name": "model.0.conv", "losses": {"32": 0.0, "24": 1.0, "16": 3.0, "8": 9.0}},  # as JSON has them
    {"name": "model.1.conv", "losses": {"16": 0.0, "8": 5.0}},
]
ROWS = [
    {"keep": 0.7, "ratios": {"model.0.conv": 0.25}},
    {"keep": 0.3, "ratios": {"model.0.conv": 0.5, "model.1.conv": 0.5}},
]


def space(*more: SizeAxis, together: bool = False) -> Space:
    axes = (Axis("model.0", CHOICES),) if together else tuple(Axis(choice.name, (choice,)) for choice in CHOICES)
    return Space((*axes, *more), {})


def test_losses_are_those_of_each_level() -> None:
    prior = Prior.of(space(), {"groups": GROUPS, "sensitivity": ROWS})
    assert [list(values) for values in prior.losses] == [[0, 1, 3], [0, 5]]
    assert prior.path.tolist() == [[1, 0], [2, 1]]
    assert [list(values) for values in prior.in_usual_units()] == [[0, 1 / 4.5, 3 / 4.5], [0, 5 / 4.5]]


def test_an_axis_of_several_groups_loses_what_they_lose_together() -> None:
    prior = Prior.of(space(together=True), {"groups": GROUPS, "sensitivity": ROWS})
    assert [list(values) for values in prior.losses] == [[0, 1, 8]]


def test_the_path_is_tried_at_every_size() -> None:
    sized = space(SizeAxis((64, 32)))
    levels = path_levels(sized, ROWS)
    assert levels.tolist() == [[1, 0, 0], [1, 0, 1], [2, 1, 0], [2, 1, 1]]
    assert [sized.plan(tuple(row)) for row in levels[:2].tolist()] == [
        Plan({"model.0.conv": 0.25}),
        Plan({"model.0.conv": 0.25}, imgsz=32),
    ]


@pytest.mark.parametrize(
    "baseline", [{}, {"groups": None}, {"groups": [{"name": "model.0.conv"}]}, {"groups": GROUPS[:1]}]
)
def test_a_run_of_an_older_version_has_none(baseline: dict[str, object]) -> None:
    prior = Prior.of(space(), baseline)
    assert prior.losses == prior.in_usual_units() == ()
    assert np.size(prior.path) == 0
