"""Exact surgery on every family and task, against masking."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from paretoprune.pruning.graph.layers import LayerTable, prunable_share
from paretoprune.pruning.surgery.equivalence import EquivalenceCheck
from paretoprune.pruning.surgery.layer_table import build_layer_table
from paretoprune.pruning.surgery.surgery import prune, resolve
from tests.pruning.masking import build, relative_error

pytestmark = pytest.mark.slow

DETECT = (
    "yolov3-tiny yolov5n yolov5s yolov6n yolov8n yolov8s yolov8m yolov9t yolov9s yolov9c yolov10n yolo11n yolo11s "
    "yolo12n yolo12l yolo26n rtdetr-l"
).split()
TASKS = [f"{family}-{task}" for family in ("yolov8n", "yolo11n", "yolo26n") for task in ("seg", "pose", "obb", "cls")]
LARGE = ("yolo12l",)  # of YOLO12's sizes the smallest with a scaled residual sum
LEAST_REACH = {"yolov3-tiny": 0.92, "rtdetr-l": 0.85}  # share of convolution weights; else 0.95
EXACT = 2e-5  # float32 rounding was at most 5e-6; one wrong layer of an untrained network shows from 2e-4 on


def random_widths(table: LayerTable, round_to: int, seed: int) -> dict[int, int]:
    rng = np.random.default_rng(seed)
    drawn = {g.id: int(rng.choice(g.widths(round_to))) for g in table.groups}
    return {g: w for g, w in drawn.items() if w < table.groups[g].channels}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LARGE else n for n in DETECT + TASKS])
def test_pruned_equals_masked(name: str, record_property: Callable[[str, object], None]) -> None:
    """Also the source of the table in docs/families.md: `python -m benchmarks.families` reads what is recorded."""
    model = build(name)
    start = time.process_time()  # of one thread: whatever else the machine does
    table = build_layer_table(model)
    record_property("table_ms", round((time.process_time() - start) * 1e3))
    scores = np.random.default_rng(0).random(table.class_count)
    images = torch.rand(1, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plans = [resolve(table, {"*": ratio}, 8) for ratio in (0.25, 0.5, 0.75)]
    plans += [random_widths(table, round_to, seed) for seed, round_to in enumerate((1, 8, 16))]
    worst = 0.0
    check = EquivalenceCheck(model, 640)
    for number, widths in enumerate(plans):
        pruned, plan = prune(model, table, widths, scores)
        if number in (1, 3):  # halved, and any widths: the product's own check, which masks in its own way, agrees
            check.check(pruned, plan.kept)
        worst = max(worst, relative_error(model, pruned, plan.kept, images))
        assert_widths(table, pruned, widths)
        pruned.train()
        pruned(torch.rand(2, 3, 64, 64))  # the branches that only training runs fit together too
    assert worst < EXACT
    share = prunable_share(model, table)
    assert share >= LEAST_REACH.get(name, 0.95)
    assert all(layer.prunable or layer.reason for layer in table.layers)
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)  # surgery works on copies
    record_property("groups", len(table.groups))
    record_property("reach", round(share, 4))
    record_property("worst_relative_error", float(f"{worst:.1e}"))


def assert_widths(table: LayerTable, pruned: nn.Module, widths: dict[int, int]) -> None:
    for group in table.groups:
        width = widths.get(group.id, group.channels)
        removed = sum(len(p) - k for p, k in zip(group.parts, group.kept_per_part(width), strict=True))
        assert (removed > 0) == (group.id in widths)
    part_width = {}
    for group in table.groups:
        for part, kept in zip(group.parts, group.kept_per_part(widths.get(group.id, group.channels)), strict=True):
            part_width.update(dict.fromkeys(part.tolist(), kept / len(part)))
    for name, channels in table.convs.items():
        expected = sum(part_width.get(int(c), 1.0) for c in channels.outputs)
        assert pruned.get_submodule(name).out_channels == round(expected)


def test_an_unknown_operation_freezes_what_it_touches() -> None:
    class Sorting(nn.Module):
        """Mixes channels in a way the tracer does not know."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sort(dim=1).values

    model = build("yolov8n")
    model.model[4].cv2.act = nn.Sequential(nn.SiLU(), Sorting())  # type: ignore[index, union-attr]
    table = build_layer_table(model)
    layer = table.by_name["model.4.cv2"]
    assert not layer.prunable
    assert "sort" in layer.reason
    assert table.by_name["model.5"].prunable
