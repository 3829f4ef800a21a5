"""Axes of branches: every level is a plan that can be applied, and no two of them are evaluated as different ones."""

from __future__ import annotations

import random

import numpy as np
import pytest

from paretoprune.pruning.graph.branches import Branch, Branches, Chain
from paretoprune.pruning.plan import Plan
from paretoprune.search.config.sections import SpaceSection
from paretoprune.search.samplers.features import PlanFeatures
from paretoprune.search.samplers.study import SearchStudy
from paretoprune.search.space.space import Space, build_space
from tests.search.fakes import FakeGroup, FakeTable


def unit(name: str, residual: bool = True, needs: tuple[str, ...] = (), reason: str = "") -> Branch:
    return Branch(name, int(name.split(".")[1]), 16, not reason, reason, residual, (name,), needs)


def chain(name: str, *units: Branch) -> Chain:
    return Chain(name, tuple((branch.name, (branch,)) for branch in units), f"{name}.closing", True, "")


BRANCHES = Branches(
    (
        chain("model.1.m", unit("model.1.m.0"), unit("model.1.m.1")),
        chain("model.2.m", unit("model.2.m.0", False, ("model.2.m.1",)), unit("model.2.m.1", False)),
        chain("model.2.m.1.m", unit("model.2.m.1.m.0"), unit("model.2.m.1.m.1")),
        chain("model.3.m", unit("model.3.m.0", False, (), "it is needed")),
    ),
    (),
)
LAYERS = (
    "model.1.m.0.cv1", "model.1.m.1.cv1", "model.2.m.0.cv1", "model.2.m.1.m.0.cv1", "model.2.m.1.cv3", "model.3.cv1"
)  # fmt: skip
TABLE = FakeTable(
    tuple(FakeGroup(i, name, int(name.split(".")[1]), (name,), 32 + 8 * i) for i, name in enumerate(LAYERS))
)


def space_of(**settings: object) -> Space:
    return build_space(TABLE, SpaceSection.model_validate(settings), branches=BRANCHES)


def test_a_shortcut_is_an_axis_of_two_levels_and_a_tail_one_of_rising_steps() -> None:
    steps = {axis.name: axis.steps for axis in space_of().depth_axes}
    assert steps == {
        "depth.model.1.m.0": ((), ("model.1.m.0",)),
        "depth.model.1.m.1": ((), ("model.1.m.1",)),
        "depth.model.2.m.tail": (
            (),
            ("model.2.m.1.m.1",),
            ("model.2.m.1.m.0", "model.2.m.1.m.1"),
            ("model.2.m.1",),
            ("model.2.m.1", "model.2.m.0"),
        ),
    }


def test_many_branches_have_one_axis_a_block() -> None:
    units = [unit(f"model.1.m.{number}") for number in range(13)]
    many = build_space(TABLE, SpaceSection(), branches=Branches((chain("model.1.m", *units),), ()))
    (axis,) = many.depth_axes
    assert axis.steps[:3] == ((), ("model.1.m.12",), ("model.1.m.11", "model.1.m.12"))
    assert axis.size == 14


@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_every_plan_can_be_applied_and_leads_back_to_its_levels(granularity: str) -> None:
    space, generator = space_of(granularity=granularity), random.Random(0)
    by_plan = {}
    for _ in range(300):
        drawn = space.random(generator)
        plan, levels = space.plan(drawn), space.canonical(drawn)
        assert set(BRANCHES.checked(plan.branches)) == set(plan.branches)
        assert not any(layer.startswith(f"{branch}.") for layer in plan.ratios for branch in plan.branches)
        assert space.plan(levels) == plan
        assert space.levels_of(plan) == levels == space.canonical(levels)
        assert by_plan.setdefault(plan.hash, levels) == levels
    assert space.levels_of(Plan({}, branches=("model.2.m.0",))) is None


def test_what_must_stay_stays() -> None:
    assert {axis.name for axis in space_of(blocks=[1, 3]).depth_axes} == {"depth.model.1.m.0", "depth.model.1.m.1"}
    names = {axis.name: axis.size for axis in space_of(exclude=["model.2.m.0.*"]).depth_axes}
    assert names["depth.model.2.m.tail"] == 4  # the last one and what is in it
    assert "depth.model.2.m.tail" not in {axis.name for axis in space_of(exclude=["model.2.m.1.cv3"]).depth_axes}
    assert space_of(exclude=["model.2.m.1.cv3"]).depth_axes[-1].steps == ((), ("model.2.m.1.m.1",))


def test_equal_plans_are_asked_once_until_none_is_left() -> None:
    table = FakeTable((FakeGroup(0, "model.1.m.0.cv1", 1, ("model.1.m.0.cv1",), 16),))
    branches = Branches((chain("model.1.m", unit("model.1.m.0")),), ())
    space = build_space(table, SpaceSection(max_ratio=0.5), branches=branches)
    study = SearchStudy(space, {"map50_95": "max", "latency_ms": "min"}, sampler="random")
    asked = []
    while (suggestion := study.ask()) is not None:
        asked.append(space.plan(suggestion.levels).hash)
    assert len(asked) == len(set(asked)) == 3  # whole, half of the channels, without the branch


def test_features_have_a_column_for_every_axis() -> None:
    space = build_space(TABLE, SpaceSection(), sizes=(64, 32), branches=BRANCHES)
    features = PlanFeatures.of(space)
    assert features.sizes == tuple(axis.size for axis in space.axes)
    tops = np.array([np.zeros(len(space.axes), dtype=int), np.array(features.sizes) - 1])
    points = features.design(tops).points
    assert (points[0] == 1).all()
    assert (points[1] == 0).all()
