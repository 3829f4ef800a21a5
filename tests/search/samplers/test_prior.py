"""What a run's baseline says of plans before any was tried."""

from __future__ import annotations

import numpy as np
import pytest

from paretoprune.pruning.graph.branches import find_branches
from paretoprune.pruning.graph.geometry_reading import read_geometry
from paretoprune.pruning.latency.features import latency_features
from paretoprune.pruning.plan import Plan
from paretoprune.pruning.surgery.layer_table import build_layer_table
from paretoprune.search.config.sections import SpaceSection
from paretoprune.search.samplers.prior import Prior, path_levels
from paretoprune.search.space.depth import DepthAxis
from paretoprune.search.space.space import Axis, GroupChoice, SizeAxis, Space, build_space
from tests.pruning.masking import build

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


def test_a_branch_loses_what_it_is_estimated_to_with_what_lies_in_it() -> None:
    """A step of depth that takes a branch and what lies in it along loses the outer one's alone."""
    steps = ((), ("model.1.m.0.m.0",), ("model.1.m.0.m.0", "model.1.m.0"))
    deep = Space((*space().axes, DepthAxis("depth.model.1", steps)), {})
    branches = [{"name": "model.1.m.0.m.0", "loss": 2.0}, {"name": "model.1.m.0", "loss": 7.0}]
    prior = Prior.of(deep, {"groups": GROUPS, "branches": branches, "sensitivity": ROWS})
    assert [list(values) for values in prior.losses] == [[0, 1, 3], [0, 5], [0, 2, 7]]
    older = Prior.of(deep, {"groups": GROUPS, "sensitivity": ROWS})
    assert [list(values) for values in older.losses] == [[0, 1, 3], [0, 5], [0, 0, 0]]


def test_the_work_of_levels_is_that_of_their_plans() -> None:
    """Widths, branches and sizes together, against the features of the latency model, which reads plans."""
    model = build("yolov8n")
    table, branches = build_layer_table(model), find_branches(model)
    geometry = read_geometry(model, table, 64)
    sized = build_space(table, SpaceSection(), sizes=(64, 32), branches=branches)
    random = np.random.default_rng(0)
    levels = random.integers(0, [axis.size for axis in sized.axes], (20, len(sized.axes)))
    levels = np.array([sized.canonical(tuple(row)) for row in levels.tolist()])
    plans = [sized.plan(tuple(row)) for row in levels.tolist()]
    assert any(plan.branches for plan in plans)
    expected = latency_features(geometry, plans)
    work = Prior.of(sized, {"geometry": geometry.to_json()}).work
    assert work is not None
    found = work(levels)
    assert found[:, 0] == pytest.approx(expected.macs.sum(axis=1))
    assert found[:, 1:] == pytest.approx(expected.whole[:, 1 : found.shape[1]])
    assert not expected.whole[:, found.shape[1] :].any()  # of other precisions
    assert work(np.zeros((1, len(sized.axes)), dtype=np.int64)) == pytest.approx(1, abs=0.5)


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
