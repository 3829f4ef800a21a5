"""The geometry against the networks that surgery makes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from torch import nn

from paretoprune.pruning.errors import PlanError
from paretoprune.pruning.graph.branches import Branches, find_branches, name_after
from paretoprune.pruning.graph.geometry import NetworkGeometry
from paretoprune.pruning.graph.geometry_reading import positions, read_geometry
from paretoprune.pruning.plan import Plan
from paretoprune.pruning.surgery.branches import cut_branches
from paretoprune.pruning.surgery.layer_table import build_layer_table
from paretoprune.pruning.surgery.surgery import prune, resolve
from paretoprune.pruning.yolo.loading import model_stats
from tests.pruning.masking import build
from tests.pruning.tiny import tiny_model

IMGSZ = 128
# A chunk, a split by size, attention, a second head, a linear layer, a transposed convolution.
NETWORKS = "yolov5n yolov8n yolov9t yolov10n yolo12n yolo26n yolo11n-cls yolov8n-seg".split()


@pytest.mark.parametrize("name", NETWORKS)
def test_it_foretells_what_surgery_makes(name: str) -> None:
    model = build(name)
    table = build_layer_table(model)
    geometry = read_geometry(model, table, IMGSZ)
    widths = resolve(table, {group.name: (0.5, 0.25, 0.0)[group.id % 3] for group in table.groups})
    pruned, plan = prune(model, table, widths, np.random.default_rng(0).random(table.class_count))
    shares = geometry.shares([{}, plan.ratios])

    outputs, inputs = geometry.widths(shares)
    weights, macs = geometry.weights(shares), geometry.macs(shares)
    for row, network in enumerate((model, pruned)):
        seen = positions(network, list(table.convs), IMGSZ)
        for column, conv in enumerate(geometry.convs):
            module = network.get_submodule(conv.name)
            assert (outputs[row, column], inputs[row, column]) == (module.out_channels, module.in_channels)
            assert weights[row, column] == module.weight.numel()  # type: ignore[operator, union-attr]
            if conv.name in seen:
                uses = seen[conv.name].read if isinstance(module, nn.ConvTranspose2d) else seen[conv.name].written
                assert macs[row, column] == module.weight.numel() * uses  # type: ignore[operator, union-attr]
            else:
                assert macs[row, column] == 0  # only training reaches it

    params, gflops = geometry.costs(shares)
    stats = [model_stats(network, IMGSZ) for network in (model, pruned)]
    assert params == pytest.approx([s.params_m for s in stats], rel=1e-12)
    assert gflops == pytest.approx([s.gflops for s in stats], rel=3e-3)
    assert gflops[1] < 0.8 * gflops[0]

    found = find_branches(model)
    for names in _removals(found):  # beside the same widths
        shallow, _ = prune(model, table, widths, np.random.default_rng(0).random(table.class_count))
        cut_branches(shallow, found, names)
        gone, shares = found.removed_modules(names), geometry.shares([Plan(plan.ratios, branches=names)])
        outputs, inputs = geometry.widths(shares)
        for column, conv in enumerate(geometry.convs):
            after = name_after(conv.name, gone)
            module = None if after is None else shallow.get_submodule(after)
            expected = (0, 0) if module is None else (module.out_channels, module.in_channels)
            assert (outputs[0, column], inputs[0, column]) == expected
        params, gflops = geometry.costs(shares)
        stats = [model_stats(shallow, IMGSZ)]
        assert params[0] == pytest.approx(stats[0].params_m, rel=1e-12)
        assert gflops[0] == pytest.approx(stats[0].gflops, rel=2e-2)  # attention itself has no weights

    shares, smaller, read = geometry.shares([{}, plan.ratios]), geometry.at(96), read_geometry(model, table, 96)
    assert smaller.norms == read.norms
    for mine, its in zip(smaller.convs, read.convs, strict=True):
        assert replace(mine, in_pixels=its.in_pixels) == its
        assert mine.in_pixels == pytest.approx(its.in_pixels, rel=0.2)  # YOLOv9 pools to one row less
    at_96 = [model_stats(network, 96).gflops for network in (model, pruned)]
    assert smaller.costs(shares)[1] == pytest.approx(at_96, rel=1e-2)  # attention itself has no weights
    assert geometry.at(None) is geometry.at(IMGSZ) is geometry


def _removals(found: Branches) -> Iterator[tuple[str, ...]]:
    """All branches, and every second one with what it needs."""
    removable = [branch for branch in found.by_name.values() if branch.removable]
    yield found.checked(branch.name for branch in removable)
    some = removable[::2]
    yield found.checked({name for branch in some for name in (branch.name, *branch.needs)})


def test_it_goes_through_json_whole() -> None:
    model = tiny_model()
    geometry = read_geometry(model, build_layer_table(model), 64)
    assert NetworkGeometry.from_json(json.loads(json.dumps(geometry.to_json()))) == geometry


def test_what_is_no_geometry_says_so() -> None:
    with pytest.raises(PlanError, match=r"geometry is not readable.*measure the baseline again"):
        NetworkGeometry.from_json({"imgsz": 64})


def test_a_plan_of_another_model_is_refused() -> None:
    model = tiny_model()
    geometry = read_geometry(model, build_layer_table(model), 64)
    with pytest.raises(PlanError, match=r"model\.99 is no prunable layer"):
        geometry.shares([{"model.99": 0.5}])


def test_plans_are_judged_without_torch() -> None:
    """The driver of a search does so."""
    code = "import sys, paretoprune.pruning.graph.geometry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
