"""Mappings: their solution against closed forms, their folding against the network that still has them."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from paretoprune.pruning.strategies.adapter import plan_cuts
from paretoprune.pruning.strategies.mapping import Cut, fold, insert, reconstruct, renamed
from paretoprune.pruning.strategies.readers import sole_readers
from paretoprune.pruning.surgery.layer_table import build_layer_table
from paretoprune.pruning.workbench import Workbench
from paretoprune.pruning.yolo.loading import model_stats
from paretoprune.pruning.yolo.saving import plain_copy
from tests.pruning.masking import relative_error
from tests.pruning.strategies_material import IMGSZ, CountingTune, difference, make_bench, run, shapes_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return make_bench(tmp_path_factory.mktemp("bench"))


class OneConvolution(nn.Module):
    """A network of one bare convolution: its answers are what the mapping sees."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answers: torch.Tensor = self.conv(x)
        return answers.tanh()


@pytest.mark.parametrize("biased", [True, False])
def test_a_mapping_is_ordinary_least_squares(biased: bool) -> None:
    """With every position sampled several times over, the solution is numpy's on all of them."""
    torch.manual_seed(0)
    model = OneConvolution(6, 8)
    images = torch.randn(4, 6, 12, 12) + 1
    cut = Cut("conv", "conv", (0, 2, 3, 7), 8, biased=biased)
    found = reconstruct(model, [cut], images, positions=400_000, ridge=0.0)["conv"]
    with torch.no_grad():
        rows = model.conv(images).permute(0, 2, 3, 1).reshape(-1, 8).double().numpy()
    kept, removed = rows[:, list(cut.kept)], rows[:, cut.removed]
    design = np.column_stack([kept, np.ones(len(rows))]) if biased else kept
    expected = np.linalg.lstsq(design, removed, rcond=None)[0]
    assert np.allclose(found.weights.numpy(), expected[:4].T, atol=0.02)
    assert np.allclose(found.constants.numpy(), expected[4] if biased else 0, atol=0.02)


def test_channels_that_repeat_others_are_rebuilt(bench: Workbench) -> None:
    """The second half of a layer repeats the first: the mapping finds it, and the network does not change."""
    model = plain_copy(bench.model)
    layer: Any = model.get_submodule("model.4.cv1")
    half = layer.conv.out_channels // 2
    with torch.no_grad():
        for tensor in (layer.conv.weight, layer.bn.weight, layer.bn.bias, layer.bn.running_mean, layer.bn.running_var):
            tensor[half:] = tensor[:half]
    cut = Cut("model.4.cv1", "model.4.cv1.conv", tuple(range(half)), 2 * half)
    images = torch.rand(4, 3, IMGSZ, IMGSZ)
    found = reconstruct(model, [cut], images, positions=4000, ridge=1e-9)
    damaged, mapped = deepcopy(model), deepcopy(model)
    insert(damaged, cut, None)
    insert(mapped, cut, found["model.4.cv1"])
    assert difference(model, mapped) < 1e-2 * difference(model, damaged)
    assert mapped.get_submodule("model.4.cv1.0.conv").out_channels == half


def test_a_numbered_block_stays_one(bench: Workbench) -> None:
    model = plain_copy(bench.model)
    before = model.model[5]  # type: ignore[index]
    insert(model, Cut("model.5", "model.5.conv", tuple(range(0, 64, 2)), 64), None)
    after = model.model[5]  # type: ignore[index]
    assert type(after) is nn.Sequential
    assert [getattr(after, a) for a in ("f", "i", "type")] == [getattr(before, a) for a in ("f", "i", "type")]
    assert after.np == sum(p.numel() for p in after.parameters())


@pytest.mark.parametrize(
    ("layer", "reader"),
    [
        ("model.0", "model.1.conv"),  # 3x3 with padding
        ("model.1", "model.2.cv1.conv"),  # 1x1
        ("model.2.m.0.cv1", "model.2.m.0.cv2.conv"),
        ("model.22.cv2.0.1", "model.22.cv2.0.2"),  # a bare convolution with a bias
        ("model.2.cv1", None),  # cut into pieces
        ("model.2.m.0.cv2", None),  # added to what came before
        ("model.4.cv2", None),  # read by two
        ("model.9.cv1", None),  # pooled
        ("model.21.cv2", None),  # read by both branches of the head
    ],
)
def test_who_alone_reads_a_layer(bench: Workbench, layer: str, reader: str | None) -> None:
    found = sole_readers(bench.model, bench.table, [(layer, f"{layer}.conv")])
    assert found.get(f"{layer}.conv") == reader


def test_a_layer_pooled_on_its_way_has_no_reader(bench: Workbench) -> None:
    """The table sees equal channels on both sides of a pooling; a mapping cannot pass through the maximum."""
    model = plain_copy(bench.model)
    first = model.model[0]  # type: ignore[index]
    pooled = nn.Sequential(first, nn.MaxPool2d(3, 1, 1))
    for name in ("f", "i", "type", "np"):
        setattr(pooled, name, getattr(first, name))
    model.model[0] = pooled  # type: ignore[index, operator]
    table = build_layer_table(model)
    assert np.array_equal(table.convs["model.0.0.conv"].outputs, table.convs["model.1.conv"].inputs)
    assert sole_readers(model, table, [("model.0.0", "model.0.0.conv")]) == {}


@pytest.mark.parametrize("name", ["yolov8n", "yolo11n", "yolov10n"])
def test_folding_changes_nothing(name: str, tmp_path: Path) -> None:
    """All mappings random, with constants where they have them: the folded network computes the same."""
    bench = make_bench(tmp_path, name, recoverable=False)
    cuts, _, _ = plan_cuts(bench, {"*": 0.5})
    model = plain_copy(bench.model)
    torch.manual_seed(0)
    for cut in cuts:
        insert(model, cut, None)
        mapping = model.get_submodule(f"{cut.layer}.1")
        with torch.no_grad():
            for p in mapping.parameters():
                p.add_(torch.randn_like(p) * 0.05)
    folded = deepcopy(model.double())  # so that rounding hides nothing
    gone = fold(folded, cuts, renamed(cuts))
    assert gone == [c.layer for c in cuts if c.reader is not None]
    assert len(gone) > 20
    assert any(c.biased and c.reader for c in cuts)
    assert any(not c.biased and c.reader for c in cuts)
    assert difference(model, folded) < 1e-4  # 1e-6 is rounding, a forgotten constant is 1e6
    assert sum(p.numel() for p in folded.parameters()) < sum(p.numel() for p in model.parameters())


def test_folding_into_all_readers_is_structural_pruning(bench: Workbench, tmp_path: Path) -> None:
    """Where every mapping folds, the architecture is what `structural` gives, and so is the network."""
    ratios = {"model.1": 0.5, "model.3": 0.25, "model.4.m.?.cv1": 0.5, "model.22.cv2.?.0": 0.25}
    adapted, structural = (run(n, bench, tmp_path / n, ratios=ratios) for n in ("adapter", "structural"))
    assert adapted.notes["mappings"] == adapted.notes["overhead_params_m"] == adapted.notes["overhead_gflops"] == 0
    assert adapted.notes["folded"] == len(adapted.layers) == 7
    assert adapted.plan == structural.plan
    assert shapes_of(adapted.model) == shapes_of(structural.model)
    assert difference(adapted.model, structural.model) < 1e-6


def test_the_overhead_is_what_the_mappings_cost(bench: Workbench, tmp_path: Path) -> None:
    """Counted by stock Ultralytics on the network with and without one mapping (its convolution made an identity)."""
    outcome = run("adapter", bench, tmp_path, ratios={"model.4.cv2": 0.5})
    mapping = outcome.model.get_submodule("model.4.cv2.1")
    side = IMGSZ // 8
    assert tuple(mapping.weight.shape) == (32, 16, 1, 1)  # type: ignore[union-attr]
    assert outcome.notes["overhead_params_m"] == pytest.approx((32 * 16 + 32) / 1e6)
    assert outcome.notes["overhead_gflops"] == pytest.approx(2 * 32 * 16 * side * side / 1e9)
    a_place = bench.model.get_submodule("model.4.cv2.conv").in_channels + 4  # type: ignore[operator]  # and the norm's
    removed = 2 * a_place * 16 * side * side / 1e9
    change = model_stats(outcome.model, IMGSZ).gflops - model_stats(bench.model, IMGSZ).gflops
    assert change == pytest.approx(float(outcome.notes["overhead_gflops"]) - removed, rel=1e-6)


def test_only_the_named_layers_are_cut(bench: Workbench, tmp_path: Path) -> None:
    """What others must lose together, a mapping lets go alone."""
    outcome = run("adapter", bench, tmp_path, ratios={"model.4.cv1": 0.5})
    assert outcome.layers == ("model.4.cv1",)
    assert outcome.model.model[4].c == bench.model.model[4].c  # type: ignore[index, union-attr]
    assert len(run("structural", bench, tmp_path, ratios={"model.4.cv1": 0.5}).layers) == 3


def test_mappings_are_tuned_before_they_are_folded(bench: Workbench, tmp_path: Path) -> None:
    tune = CountingTune()
    outcome = run("adapter", bench, tmp_path, 1, tune, ratios={"model.1": 0.5, "model.4.cv1": 0.5})
    assert {"model.1.1.weight", "model.4.cv1.1.weight", "model.4.cv1.1.bias"} <= set(tune.shapes[0])
    assert "model.1.1.weight" not in shapes_of(outcome.model)
    assert "model.4.cv1.1.weight" in shapes_of(outcome.model)


@pytest.mark.parametrize(
    ("name", "layer", "words"),
    [
        ("yolo11n", "model.23.cv3.0.0.0", "a depthwise convolution gives back the channels it reads"),
        ("yolov9t", "model.2.cv1", ""),
        ("yolov9t", None, "is merged into one convolution for inference"),
    ],
)
def test_what_cannot_be_mapped_says_why(name: str, layer: str | None, words: str, tmp_path: Path) -> None:
    bench = make_bench(tmp_path, name, recoverable=False)
    outcome = run("adapter", bench, tmp_path, ratios={"*": 0.5})
    skipped = dict(outcome.skipped)
    if layer is None:
        assert any(words in reason and ".conv1" in n for n, reason in skipped.items())
    else:
        assert words in skipped.get(layer, "")
    double = [deepcopy(m).double() for m in (bench.model, outcome.model)]
    assert relative_error(*double, outcome.plan.kept, torch.rand(1, 3, 128, 128).double()) < 1e-9
    fused = deepcopy(double[1]).fuse(verbose=False)  # type: ignore[operator]
    assert fused.is_fused()
    assert difference(outcome.model, fused) < 1e-4
