"""The space: widths, bounds, exclusion, no dead axes, and the way back from ratios to levels."""

from __future__ import annotations

import random

import pytest

from paretoprune.base.image_size import ImageSize
from paretoprune.pruning.plan import Plan
from paretoprune.search.config.sections import SpaceSection
from paretoprune.search.errors import SpaceError
from paretoprune.search.samplers.features import PlanFeatures
from paretoprune.search.samplers.warm_start import SensitivityPath, ladder_plans, ladder_ratios, warm_start
from paretoprune.search.space.space import build_space, image_sizes
from tests.search.fakes import FakeGroup, FakeTable, make_space, make_table


def test_levels_are_the_widths_between_the_bounds() -> None:
    space = build_space(make_table(), SpaceSection(round_to=8, min_ratio=0.1, max_ratio=0.5))
    # 64 channels: ratio 0.1 to 0.5 is width 57.6 to 32
    assert [axis.groups[0].widths for axis in space.axes] == [(56, 48, 40, 32)] * 6
    assert space.plan((0,) * 6).ratios["model.0.c0"] == pytest.approx(1 - 56 / 64)


def test_every_level_vector_is_another_plan() -> None:
    space = build_space(make_table(2, channels=40), SpaceSection())
    plans = {
        tuple(sorted(space.plan((a, b)).ratios.items()))
        for a in range(space.axes[0].size)
        for b in range(space.axes[1].size)
    }
    assert len(plans) == space.count() == space.axes[0].size * space.axes[1].size


@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_ratios_lead_back_to_their_levels(granularity: str) -> None:
    groups = tuple(
        FakeGroup(i, f"model.{i // 2}.c{i % 2}", i // 2, (f"model.{i // 2}.c{i % 2}",), 40 + 24 * i) for i in range(6)
    )
    space = build_space(FakeTable(groups), SpaceSection(granularity=granularity))
    generator = random.Random(0)
    for _ in range(200):
        levels = space.random(generator)
        assert space.levels_of(space.plan(levels)) == levels


def test_ratios_of_another_space_are_not_mistaken() -> None:
    table = make_table()
    wide, narrow = build_space(table, SpaceSection()), build_space(table, SpaceSection(max_ratio=0.3))
    assert narrow.levels_of(wide.plan((5,) * 6)) is None


def test_one_axis_per_block() -> None:
    groups = (
        FakeGroup(0, "model.0.a", 0, ("model.0.a",), 32),
        FakeGroup(1, "model.0.b", 0, ("model.0.b",), 128),
        FakeGroup(2, "model.1.a", 1, ("model.1.a",), 64),
    )
    space = build_space(FakeTable(groups), SpaceSection(granularity="block"))
    assert [axis.name for axis in space.axes] == ["model.0", "model.1"]
    ratios = space.plan(space.uniform(0.5)).ratios
    assert ratios == {"model.0.a": 0.5, "model.0.b": 0.5, "model.1.a": 0.5}
    assert space.axes[0].groups[0].name == "model.0.b"  # the widest leads, so no level repeats a plan


def test_an_axis_with_one_width_does_not_exist() -> None:
    groups = (FakeGroup(0, "model.0", 0, ("model.0",), 16), FakeGroup(1, "model.1", 1, ("model.1",), 128))
    space = build_space(FakeTable(groups), SpaceSection(round_to=16))
    assert [axis.name for axis in space.axes] == ["model.1"]
    assert "no two widths in steps of 16" in space.left_out["model.0"]


def test_blocks_exclusion_and_bounds() -> None:
    bounds = {"model.1.c0": (0.2, 0.4), "model.*": (0.0, 0.5), "*": (0.0, 0.1)}
    space = build_space(make_table(), SpaceSection(blocks=[0, 1], exclude=["model.0.d1"], layer_bounds=bounds))
    # model.0.c1 loses channels together with model.0.d1, so it is excluded too; a name beats a pattern
    assert {axis.name: axis.groups[0].widths for axis in space.axes} == {
        "model.0.c0": (64, 56, 48, 40, 32),
        "model.1.c0": (48, 40),
        "model.1.c1": (64, 56, 48, 40, 32),
    }
    assert space.left_out["model.0.c1"] == "excluded by model.0.d1"
    assert space.left_out["model.2.c0"] == "its block is not in space.blocks"


@pytest.mark.parametrize(
    ("section", "line"),
    [
        (
            SpaceSection(exclude=["model.77.*"]),
            r"space.exclude: the pattern 'model.77.\*' matches no layer",
        ),
        (
            SpaceSection(layer_bounds={"nothing": (0, 0.5)}),
            "space.layer_bounds: the pattern 'nothing' matches no layer",
        ),
        (SpaceSection(blocks=[9]), "space.blocks: block 9 has nothing to prune; blocks that have are 0, 1, 2"),
        (
            SpaceSection(exclude=["model.*"]),
            r"nothing is left to prune: all 6 groups are left out \(6 because excluded by",
        ),
        (SpaceSection(round_to=64), "6 because no two widths in steps of 64"),
    ],
)
def test_what_matches_nothing_is_an_error(section: SpaceSection, line: str) -> None:
    with pytest.raises(SpaceError, match=line):
        build_space(make_table(), section)


def test_a_pattern_that_matches_only_what_cannot_be_pruned_is_fine() -> None:
    assert len(build_space(make_table(), SpaceSection(exclude=["model.9.*"])).axes) == 6


@pytest.mark.parametrize(("trials", "steps"), [(1, 1), (2, 2), (4, 2), (12, 3), (20, 5), (40, 5), (400, 5)])
def test_ladder_takes_a_quarter_of_the_trials(trials: int, steps: int) -> None:
    ratios = ladder_ratios(trials)
    assert len(ratios) == steps
    assert ratios == sorted(set(ratios))
    assert all(0.1 <= ratio <= 0.6 + 1e-9 for ratio in ratios)


def test_ladder_plans_are_different_within_bounds_and_pruned() -> None:
    space = build_space(make_table(), SpaceSection(max_ratio=0.3))
    plans = ladder_plans(space, 40)
    assert len(plans) == len(set(plans)) == 2  # ten ratios, but only widths 56 and 48 lie below the bound
    assert all(any(plan) for plan in plans)


def test_the_first_trials_are_plans_by_sensitivity() -> None:
    space = build_space(make_table(channels=512), SpaceSection())
    rows = [{"keep": 1 - k / 40, "ratios": {"model.0.c0": 0.1 + k / 60, "model.2.c1": k / 60}} for k in range(30)]
    starts = warm_start(space, 20, rows)
    assert [start.provenance for start in starts] == ["sensitivity"] * 6
    assert len({start.levels for start in starts}) == len(starts)
    assert space.uniform(0.0) not in {start.levels for start in starts}
    levels = {start.levels for start in starts}
    assert not levels & {
        space.nearest(Plan(rows[0]["ratios"])),
        space.nearest(Plan(rows[-1]["ratios"])),
    }


@pytest.mark.parametrize(("trials", "order"), [(12, [3, 5, 1, 4, 2, 0]), (5, [2, 4, 1, 3, 0]), (2, [1, 0])])
def test_a_warm_start_that_is_cut_off_has_the_front_in_outline(trials: int, order: list[int]) -> None:
    """The middle, then the middles of what it leaves, the heavier half first: `order` counts from the lightest."""
    space = build_space(make_table(channels=512), SpaceSection())
    rows = [{"keep": 1 - k / 40, "ratios": {"model.0.c0": k / 40}} for k in range(1, 30)]
    starts = warm_start(space, trials, rows)
    sensible = [start.levels for start in starts if start.provenance == "sensitivity"]
    assert [sorted(sensible).index(levels) for levels in sensible] == order


def test_a_warm_start_shares_the_cut_between_size_and_widths() -> None:
    """At half of the work both are smaller; hardly cut, the size is the run's; each plan leaves the work of its row."""
    sizes = (320, 288, 256, 224, 192)
    space = build_space(make_table(channels=512), SpaceSection(), sizes=sizes)
    rows = [{"keep": 1 - k / 40, "ratios": {"model.0.c0": k / 40}} for k in range(1, 33)]
    path = [space.plan(start.levels) for start in warm_start(space, 8, rows)]
    assert len({plan.hash for plan in path}) == 6
    works = []
    for plan in sorted(path, key=lambda plan: (-(plan.imgsz or 320), sum(plan.ratios.values()))):
        area = ((plan.imgsz or 320) / 320) ** 2
        works.append(area * (1 - plan.ratios.get("model.0.c0", 0.0)))
    wanted = [rows[int((part + 0.5) * 32 / 6)]["keep"] for part in range(6)]  # the middles of six equal parts
    assert sorted(works, reverse=True) == pytest.approx(wanted, abs=0.02)
    assert {plan.imgsz for plan in path} == {None, 288, 256, 224}
    at_half = min(path, key=lambda plan: abs(((plan.imgsz or 320) / 320) ** 2 * (1 - plan.ratios["model.0.c0"]) - 0.5))
    assert at_half.imgsz == 288
    assert at_half.ratios["model.0.c0"] == pytest.approx(0.34, abs=0.02)


@pytest.mark.parametrize(
    ("lost_by_size", "lost_by_widths", "wanted"),
    [
        pytest.param({288: 0.017, 256: 0.031, 224: 0.068, 192: 0.112}, {0.7: 0.029, 0.5: 0.108}, 256, id="VOC"),
        pytest.param({288: 0.017, 256: 0.031, 224: 0.068, 192: 0.112}, {}, 256, id="VOC, sizes alone"),
        pytest.param({288: 0.012, 256: 0.033, 224: 0.09}, {0.7: 0.003, 0.6: 0.003, 0.5: 0.005}, 320, id="digits"),
        pytest.param({288: -0.01, 256: 0.0, 224: -0.002, 192: 0.0}, {0.7: 0.03, 0.5: 0.12}, 256, id="free"),
        pytest.param({}, {}, 256, id="unknown"),
    ],
)
def test_a_cut_to_half_is_shared_by_what_sizes_and_widths_cost(
    lost_by_size: dict[int, float], lost_by_widths: dict[float, float], wanted: int
) -> None:
    """The size that loses least among those that leave half of the work (224 px leave 0.49), when a plan is asked for:
    it counts what the first trials gave."""
    space = build_space(make_table(channels=512), SpaceSection(), sizes=(320, 288, 256, 224, 192))
    rows = [{"keep": 1 - k / 40, "ratios": {"model.0.c0": k / 40}} for k in range(1, 33)]
    known = {space.uniform(0.0): 0.54}
    known |= {space.nearest(Plan({}, imgsz=size)): 0.54 - lost for size, lost in lost_by_size.items()}
    known |= {space.nearest(Plan({"model.0.c0": 1 - keep})): 0.54 - lost for keep, lost in lost_by_widths.items()}
    plan = space.plan(SensitivityPath(space, rows).levels(0.5, 0, known))
    assert (plan.imgsz or 320) == wanted
    left = ((plan.imgsz or 320) / 320) ** 2 * (1 - plan.ratios.get("model.0.c0", 0.0))
    assert left == pytest.approx(0.5, abs=0.02)


def test_a_size_is_an_axis_of_its_own() -> None:
    """Equal widths at two sizes are two plans; the run's own size counts as none, as in a plan of an older run."""
    space = build_space(make_table(2), SpaceSection(), sizes=(320, 256, 192))
    assert space.sizes == {"model.0.c0": 6, "model.0.c1": 6, "imgsz": 3}
    every = [(a, b, c) for a in range(6) for b in range(6) for c in range(3)]
    plans = [space.plan(levels) for levels in every]
    assert len({plan.hash for plan in plans}) == space.count() == 108
    assert [space.levels_of(plan) for plan in plans] == every
    ratios = {"model.0.c0": 0.5, "model.0.d0": 0.5}
    own, given = space.levels_of(Plan(ratios)), space.levels_of(Plan(ratios, imgsz=320))
    assert own == given == (4, 0, 0)
    assert space.plan((4, 0, 0)) == Plan(ratios)
    assert space.levels_of(Plan(ratios, imgsz=224)) is None
    assert space.nearest(Plan(ratios, imgsz=200)) == (4, 0, 2)
    assert space.uniform(0.5) == (4, 4, 0)
    without = build_space(make_table(2), SpaceSection(), sizes=(320,))
    assert without.sizes == {"model.0.c0": 6, "model.0.c1": 6}
    assert without.levels_of(Plan(ratios, imgsz=256)) is None


def test_a_precision_is_an_axis_of_its_own() -> None:
    """As a size is: the run's own counts as none, and sizes and precisions come in every combination."""
    space = build_space(make_table(1), SpaceSection(), sizes=(320, 256), precisions=("fp32", "bf16", "int8"))
    assert space.sizes == {"model.0.c0": 6, "imgsz": 2, "precision": 3}
    every = [(a, b, c) for a in range(6) for b in range(2) for c in range(3)]
    plans = [space.plan(levels) for levels in every]
    assert len({plan.hash for plan in plans}) == space.count() == 36
    assert [space.levels_of(plan) for plan in plans] == every
    assert {plan.precision for plan in plans} == {None, "bf16", "int8"}
    assert space.levels_of(Plan({}, precision="fp32")) == (0, 0, 0)
    assert space.levels_of(Plan({}, precision="fp16")) is None
    assert space.nearest(Plan({}, precision="fp16")) == (0, 0, 0)
    assert space.uniform(0.5) == (4, 0, 0)
    its = [(plan.imgsz, plan.precision) for plan in space.unpruned]
    assert its == [(None, None), (256, None), (None, "bf16"), (256, "bf16"), (None, "int8"), (256, "int8")]
    without = build_space(make_table(1), SpaceSection(), precisions=("int8",))
    assert (without.sizes, without.unpruned) == ({"model.0.c0": 6}, [Plan({})])


def test_a_warm_start_tries_every_precision_from_light_to_heavy() -> None:
    space = build_space(make_table(channels=512), SpaceSection(), precisions=("fp32", "int8"))
    rows = [{"keep": 1 - k / 40, "ratios": {"model.0.c0": k / 40}} for k in range(1, 33)]
    path = [space.plan(start.levels) for start in warm_start(space, 8, rows)]
    by_width = sorted(path, key=lambda plan: plan.ratios["model.0.c0"])
    assert [plan.precision for plan in by_width] == [None, "int8"] * 3


@pytest.mark.parametrize(
    ("own", "wanted", "stride", "sizes"),
    [
        (640, None, 32, (640, 576, 512, 448, 384)),
        (320, None, 32, (320, 288, 256, 224, 192)),
        (160, None, 32, (160, 128, 96)),
        (1280, None, 64, (1280, 1152, 1024, 896, 768)),
        (320, None, 64, (320, 256, 192)),
        (64, None, 32, (64,)),
        (32, None, 32, (32,)),
        (640, [], 32, (640,)),
        (640, [640], 32, (640,)),
        (640, [320, 512], 32, (640, 512, 320)),
        ((384, 640), None, 32, ((384, 640), (352, 576), (320, 512), (288, 480), (256, 416))),
        ((640, 384), None, 32, ((640, 384), (576, 352), (512, 320), (480, 288), (416, 256))),
        ((96, 160), None, 32, ((96, 160), (64, 128), (64, 96))),
        ((768, 1280), None, 64, ((768, 1280), (704, 1152), (640, 1024), (576, 960), (512, 832))),
        ((32, 320), None, 32, ((32, 320), (32, 288), (32, 256), (32, 224), (32, 192))),
        ((384, 640), [], 32, ((384, 640),)),
        # By area: a square of 448 is smaller than the rectangle although its height is not
        ((384, 640), [448, (256, 416), (320, 544)], 32, ((384, 640), 448, (320, 544), (256, 416))),
        (512, [(384, 640)], 32, (512, (384, 640))),
    ],
)
def test_the_sizes_of_a_space(
    own: ImageSize, wanted: list[ImageSize] | None, stride: int, sizes: tuple[ImageSize, ...]
) -> None:
    assert image_sizes(own, wanted, stride) == sizes


@pytest.mark.parametrize(
    ("own", "wanted", "stride", "line"),
    [
        (320, [640], 32, "every size must be at most the run's 320 px, but got 640; leave it out, or"),
        (320, [288], 64, "must be a multiple of 64, the largest stride of the model, but got 288; give 256"),
        ((256, 384), [384], 32, r"the run's 256,384 px, but got 384; leave it out \(a rectangle is \[height, width\]"),
        ((256, 384), [(384, 256)], 32, "must be at most the run's 256,384 px, but got 384,256"),
        ((256, 384), [(128, 224)], 64, "must be a multiple of 64, .*, but got 128,224; give 128,192"),
    ],
)
def test_a_size_that_cannot_be_is_one_line(own: ImageSize, wanted: list[ImageSize], stride: int, line: str) -> None:
    with pytest.raises(SpaceError, match=line):
        image_sizes(own, wanted, stride)


def test_rectangles_are_levels_by_their_area() -> None:
    """The surrogate's features and the shares of the first plans see areas; a plan of an unknown size is taken to the
    nearest one."""
    sizes: tuple[ImageSize, ...] = ((96, 160), 96, (64, 128), (64, 96))
    space = build_space(make_table(1), SpaceSection(), sizes=sizes)
    assert space.image_sizes == sizes
    plans = [space.plan((2, level)) for level in range(4)]
    assert [plan.imgsz for plan in plans] == [None, 96, (64, 128), (64, 96)]
    assert [space.levels_of(plan) for plan in plans] == [(2, level) for level in range(4)]
    assert space.levels_of(Plan(plans[0].ratios, imgsz=(96, 160))) == (2, 0)
    assert space.levels_of(Plan(plans[0].ratios, imgsz=(128, 64))) is None
    assert space.nearest(Plan({}, imgsz=(128, 64))) == (0, 2)
    areas = [96 * 160, 96 * 96, 64 * 128, 64 * 96]
    assert PlanFeatures.of(space).areas == pytest.approx([area / areas[0] for area in areas])
    rows = [{"keep": keep / 20, "ratios": {"model.0.c0": 1 - keep / 20}} for keep in range(4, 20)]
    for start in warm_start(space, 8, rows):
        assert start.provenance == "sensitivity"
    assert len({space.plan(start.levels).imgsz for start in warm_start(space, 8, rows)}) > 1


@pytest.mark.parametrize("trials", [1, 2, 3])
def test_warm_start_never_takes_more_than_the_trials(trials: int) -> None:
    assert 1 <= len(warm_start(make_space(), trials, [{"keep": 0.5, "ratios": {"model.0.c0": 0.5}}])) <= trials


def test_nearest_plan_is_the_nearest_level_of_every_axis() -> None:
    space = make_space()
    ratios = {"model.0.c0": 0.31, "model.1.c1": 0.9, "model.2.c0": 0.02}
    for axis, level in zip(space.axes, space.nearest(Plan(ratios)), strict=True):
        leader = axis.groups[0]
        wanted = next((ratios[name] for name in leader.layers if name in ratios), 0.0)
        distances = [abs(leader.ratio(width) - wanted) for width in leader.widths]
        assert distances[level] == min(distances)
