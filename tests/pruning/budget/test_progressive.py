"""Removal in steps: what is chosen fits the goal, is chosen on what is left, and becomes an ordinary plan."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paretoprune.pruning.budget.progressive import Removal, path_scores, removals
from paretoprune.pruning.importance.allocation import share_left
from paretoprune.pruning.surgery.layer_table import build_layer_table
from paretoprune.pruning.surgery.surgery import choose_kept, remove
from paretoprune.pruning.workbench import Workbench
from paretoprune.pruning.yolo.saving import save_checkpoint
from tests.pruning.masking import build
from tests.pruning.recovery_material import shapes_dataset

pytestmark = pytest.mark.slow

GOALS = (0.8, 0.6, 0.4)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    root = tmp_path_factory.mktemp("progressive")
    torch.manual_seed(0)
    model = build("yolov8n")
    save_checkpoint(model, root / "model.pt", {"imgsz": 64})
    data = shapes_dataset(root / "shapes", train=4)
    return Workbench(str(root / "model.pt"), str(data), 64, calibration_images=4, importance="taylor")


@pytest.fixture(scope="module")
def found(bench: Workbench) -> list[Removal]:
    return list(removals(bench, GOALS, bench.conv_costs, lambda line: None))


def test_every_goal_is_reached_from_the_one_before(bench: Workbench, found: list[Removal]) -> None:
    assert len(found) == len(GOALS)
    for goal, removal in zip(GOALS, found, strict=True):
        widths = {g.id: int(removal.stays[g.parts[0]].sum()) for g in bench.table.groups}
        assert goal - 0.03 < share_left(bench.table, bench.conv_costs, widths) <= goal
        assert all(width in bench.table.groups[g].widths(8) for g, width in widths.items())
    for before, after in pairwise(found):
        assert not (after.stays & ~before.stays).any()  # nothing comes back
        assert (after.losses[~before.stays] == before.losses[~before.stays]).all()  # it cost what it cost when it left
    assert (found[-1].losses[found[-1].stays] == 0).all()


def test_the_first_step_is_the_allocation_on_the_intact_network(bench: Workbench, found: list[Removal]) -> None:
    ratios = bench.allocated(GOALS[0])
    assert ratios == dict(found[0].plan(bench).ratios)


def test_later_steps_look_at_what_is_left(bench: Workbench, found: list[Removal]) -> None:
    """One step to the same share, by the intact network's scores, takes other channels."""
    widths = {g.id: int(found[-1].stays[g.parts[0]].sum()) for g in bench.table.groups}
    at_once = choose_kept(bench.table, widths, bench.loss_scores)
    assert (at_once != found[-1].stays).any()


def test_a_plan_is_what_it_says(bench: Workbench, found: list[Removal]) -> None:
    """Replayed it is an ordinary exact cut of the unpruned network."""
    plan = found[-1].plan(bench)
    model, applied = bench.prune(plan)
    assert applied.kept == plan.kept
    expected = remove(bench.model, bench.table, found[-1].stays).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_the_table_of_what_is_left_is_that_of_the_cut_network(bench: Workbench, found: list[Removal]) -> None:
    """Cut in two steps, or at once; and as a trace of the cut network counts."""
    first, last = found[0].stays, found[-1].stays
    part = remove(bench.model, bench.table, first)
    left: Any = bench.table.left(first)
    in_two = remove(part, left, last).state_dict()
    at_once = remove(bench.model, bench.table, last).state_dict()
    assert all(torch.equal(value, at_once[name]) for name, value in in_two.items())
    traced = build_layer_table(part)
    assert {n: len(c.outputs) for n, c in left.convs.items()} == {n: len(c.outputs) for n, c in traced.convs.items()}
    assert [len(p) for g in left.groups for p in g.parts] == [len(p) for g in traced.groups for p in g.parts]


def test_classes_are_weighed_only_for_a_criterion_that_asks(bench: Workbench, found: list[Removal]) -> None:
    """Weighing is a pass over the images; neither taylor nor the targets of so few images look at it."""
    assert {"loss_scores", "targets"} <= vars(bench).keys()
    assert "class_weights" not in vars(bench)


def test_a_goal_out_of_reach_ends_it(bench: Workbench) -> None:
    assert not list(removals(bench, [1e-4], bench.conv_costs, lambda line: None))


def test_images_are_spread_with_their_labels(bench: Workbench) -> None:
    whole = bench.calibration
    two = whole.spread(2)
    assert torch.equal(two.images, whole.images[[0, 3]])
    for new, old in ((0, 0), (1, 3)):
        mine, theirs = two.batch["batch_idx"] == new, whole.batch["batch_idx"] == old
        assert mine.any()
        assert torch.equal(two.batch["bboxes"][mine], whole.batch["bboxes"][theirs])
    assert whole.spread(9) is whole
    assert np.isfinite(bench.loss_scores).all()


def test_one_array_of_scores_holds_the_whole_path(bench: Workbench) -> None:
    """Channels chosen by it, for the widths of any step, are those that the step chose."""
    scores = path_scores(bench, lowest=0.4)
    steps = list(removals(bench, (0.85, 0.7, 0.55, 0.4), bench.conv_costs, lambda line: None))
    for step in steps:
        widths = {g.id: int(step.stays[g.parts[0]].sum()) for g in bench.table.groups}
        assert (choose_kept(bench.table, widths, scores) == step.stays).all()
    for part in (part for group in bench.table.groups for part in group.parts):
        last = scores[part[steps[-1].stays[part]]]
        gone = scores[part[~steps[-1].stays[part]]]
        assert not len(gone) or not len(last) or gone.max() < last.min()
    assert scores.max() <= max(bench.loss_scores.max(), max(s.scores.max() for s in steps)) * 1.001  # still losses


def test_a_folder_is_not_touched(bench: Workbench) -> None:
    assert sorted(p.name for p in Path(bench.model_path).parent.iterdir()) == ["model.pt", "shapes"]
