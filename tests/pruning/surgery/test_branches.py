"""Branches removed whole: against the unpruned network in which they contribute nothing, in every family."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from ultralytics.nn.tasks import ClassificationModel, DetectionModel

from paretoprune.pruning.errors import NotEquivalentError, PlanError
from paretoprune.pruning.graph.branches import find_branches, name_after
from paretoprune.pruning.plan import Plan
from paretoprune.pruning.surgery.branches import cut_branches, remove_branches, without_branches
from paretoprune.pruning.surgery.equivalence import EquivalenceCheck
from paretoprune.pruning.surgery.layer_table import build_layer_table
from paretoprune.pruning.surgery.surgery import prune, resolve
from paretoprune.pruning.workbench import Workbench
from paretoprune.pruning.yolo.saving import save_checkpoint
from tests.conftest import StockPython
from tests.pruning.masking import build, masked, randomise_batch_norm, raw_outputs, tensors
from tests.pruning.recovery_material import same_weights, weights
from tests.pruning.surgery.test_families import random_widths
from tests.pruning.tiny import tiny_model

FAMILIES = "yolov5n yolov8n yolov9t yolov10n yolo11n yolo12n yolo26n yolo11n-cls".split()
OTHERS = "yolov3 yolov8m yolo12l yolov8s-worldv2 rtdetr-l".split()
EXACT = 1e-5
# Blocks that no small stock model has, each with two units; C3TR's and ResNet's differ most from the others.
_BLOCKS: list[list[Any]] = [
    [-1, 1, "Conv", [32, 6, 4]],
    [-1, 2, "C2", [32]],
    [-1, 2, "C2", [32, False]],
    [-1, 2, "C2f", [32, False]],
    [-1, 2, "C2fPSA", [32]],
    [-1, 2, "C3", [32, False]],
    [-1, 2, "C3x", [32]],
    [-1, 2, "C3Ghost", [32]],
    [-1, 2, "C3TR", [32]],
    [-1, 2, "BottleneckCSP", [32]],
    [-1, 2, "BottleneckCSP", [32, False]],
    [-1, 2, "RepC3", [32]],
    [-1, 2, "C1", [32]],
    [-1, 2, "Bottleneck", [32]],
    [-1, 2, "HGBlock", [16, 32, 3, True, True]],
    [-1, 1, "PSA", [32]],
    [-1, 1, "ELAN1", [32, 32, 16]],
    [-1, 1, "Conv", [48, 3, 2]],
]


def rare_blocks() -> nn.Module:
    torch.manual_seed(0)
    head = [[[16, 17], 1, "Detect", ["nc"]]]
    return DetectionModel({"nc": 3, "backbone": _BLOCKS, "head": head, "yaml_file": "rare.yaml"}, nc=3, verbose=False)


def resnet() -> nn.Module:
    layers: list[list[Any]] = [
        [-1, 1, "ResNetLayer", [3, 16, 1, True, 1]],
        [-1, 1, "ResNetLayer", [16, 16, 1, False, 3]],
        [-1, 1, "ResNetLayer", [64, 32, 2, False, 3]],
    ]
    cfg = {"nc": 3, "backbone": layers, "head": [[-1, 1, "Classify", ["nc"]]], "yaml_file": "resnet.yaml"}
    torch.manual_seed(0)
    return ClassificationModel(cfg, nc=3, verbose=False)


def network(name: str) -> nn.Module:
    made = {"rare blocks": rare_blocks, "resnet": resnet}
    if name not in made:
        return build(name)
    model = made[name]()
    randomise_batch_norm(model)
    return model.eval()


@contextmanager
def left_out(model: nn.Module, names: tuple[str, ...]) -> Iterator[None]:
    """Each of these units gives what it reads if it has a shortcut, else zero: not what the product's check masks."""
    handles = []
    for name in names:
        unit: Any = model.get_submodule(name)
        residual = getattr(unit, "add", type(unit).__name__ in HAVE_A_SHORTCUT)
        handles.append(unit.register_forward_hook(_passing if residual else _zero))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


HAVE_A_SHORTCUT = ("ABlock", "GhostBottleneck", "ResNetBlock", "TransformerLayer")


def _passing(_: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    assert inputs[0].shape == output.shape
    return inputs[0]  # type: ignore[no-any-return]


def _zero(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(output)


def error(model: nn.Module, pruned: nn.Module, plan: Plan, images: torch.Tensor) -> float:
    """The largest difference to the masked original, relative to the largest output."""
    with torch.no_grad(), masked(model, plan.kept), left_out(model, plan.branches):
        expected = raw_outputs(model, images)
    with torch.no_grad():
        got = raw_outputs(pruned, images)
    assert [t.shape for t in got] == [t.shape for t in expected]
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(expected, got, strict=True))


def drawn(model: nn.Module, rng: np.random.Generator) -> tuple[str, ...]:
    """Some of the branches, with what they need."""
    branches = find_branches(model)
    chosen = {b.name for b in branches.by_name.values() if b.removable and rng.random() < 0.5}
    return branches.checked(chosen.union(*(branches.by_name[name].needs for name in chosen)))


@pytest.mark.parametrize(
    "name", [*FAMILIES, "rare blocks", "resnet", *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)]
)
def test_the_network_without_branches_equals_the_masked_one(name: str) -> None:
    model, rng = network(name), np.random.default_rng(0)
    branches, table = find_branches(model), build_layer_table(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    size = 128 if name.startswith("rtdetr") else 64
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    every = branches.checked(b.name for b in branches.by_name.values() if b.removable)
    assert every
    assert error(model, remove_branches(model, every), Plan({}, branches=every), images) <= EXACT
    for seed in range(2):  # widths and branches together, as the workbench puts them together
        names = drawn(model, rng)
        pruned, plan = prune(model, table, random_widths(table, 8, seed), rng.random(table.class_count))
        cut_branches(pruned, branches, names)
        plan = without_branches(plan, branches, names)
        assert error(model, pruned, plan, images) <= EXACT
        if seed == 0:  # the product's own check, which masks in its own way, agrees
            EquivalenceCheck(model, 640).check(pruned, plan.kept, names)
        pruned.train()
        pruned(torch.rand(2, 3, 64, 64))
        again = build_layer_table(pruned.eval())  # and what is left can be pruned
        narrower, _ = prune(pruned, again, resolve(again, {"*": 0.5}), rng.random(again.class_count))
        assert len(tensors(narrower(images)))
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_each_branch_alone() -> None:
    model = network("yolov8n")
    branches = find_branches(model)
    images = torch.rand(1, 3, 64, 64)
    for branch in branches.by_name.values():
        names = branches.checked([branch.name, *branch.needs])
        pruned = remove_branches(model, names)
        assert error(model, pruned, Plan({}, branches=names), images) <= EXACT
        lists = [module for module in pruned.modules() if isinstance(module, nn.ModuleList)]
        assert len(names) == sum(map(len, (m for m in model.modules() if isinstance(m, nn.ModuleList)))) - sum(
            map(len, lists)
        )


def test_what_no_stock_class_can_express_has_its_reason() -> None:
    found = find_branches(network("rare blocks")).by_name
    reasons = {name: branch.reason for name, branch in found.items() if not branch.removable}
    blocks = {name.split(".")[1] for name in reasons}
    assert blocks == {"11", "12", "15", "16"}  # RepC3, C1, PSA, ELAN1
    assert all(reasons.values())
    assert "no shortcut" in reasons["model.11.m.0"]
    assert "calls it by name" in reasons["model.15.attn"]
    first = find_branches(network("resnet")).by_name["model.1.layer.0"]
    assert not first.removable
    assert "resolution" in first.reason


def test_a_plan_of_branches_that_do_not_fit_is_refused() -> None:
    model = network("rare blocks")
    branches = find_branches(model)
    assert branches.by_name["model.3.m.0"].needs == ("model.3.m.1",)  # a C2f without shortcuts
    for names, text in {
        "model.3.m.9": "has none named model.3.m.9",
        "model.11.m.0": "not removable: it has no shortcut",
        "model.3.m.0": "Remove model.3.m.1 as well",
    }.items():
        with pytest.raises(PlanError, match=text):
            branches.checked([names])
    row = branches.to_rows()[0]  # beside a layer's, and never taken for one that can lose channels
    assert row.keys() - {"removable"} == build_layer_table(tiny_model()).to_rows()[0].keys()
    assert not any(row["prunable"] for row in branches.to_rows())
    inner = find_branches(build("yolo11n"))
    assert inner.checked(["model.6.m.0.m.1", "model.6.m.0"]) == ("model.6.m.0",)


def test_what_stays_is_found_under_its_new_name() -> None:
    """The copy's parameters hold the original's values, but for the merged columns."""
    model = network("yolo12n")
    branches, rng = find_branches(model), np.random.default_rng(3)
    names = drawn(model, rng)
    pruned = dict(remove_branches(model, names).named_parameters())
    gone = branches.removed_modules(names)
    merged = {f"{chain.closing}.weight" for chain in branches.chains}
    stays = {name: after for name, _ in model.named_parameters() if (after := name_after(name, gone)) is not None}
    assert set(stays.values()) == set(pruned)
    for name, value in model.named_parameters():
        if name in stays and name not in merged:
            assert torch.equal(pruned[stays[name]], value)


def test_a_wrong_removal_is_stopped() -> None:
    model = network("yolov8n")
    names = ("model.4.m.0",)
    pruned: Any = remove_branches(model, names)
    with torch.no_grad():
        pruned.model[4].cv2.conv.weight[:, 32:64] = 0  # as if the identity had been taken for a zero
    with pytest.raises(NotEquivalentError, match=r"block model\.4"):
        EquivalenceCheck(model, 640).check(pruned, {}, names)


def test_a_refit_finds_what_stays_under_its_new_name() -> None:
    """Branches that contribute nothing leave an equal network: every convolution meets its targets as it is."""
    model: Any = network("yolov8n")
    names = ("model.4.m.0", "model.6.m.1", "model.15.m.0")
    for name in names:
        norm = model.get_submodule(f"{name}.cv2.bn")
        norm.weight.data.zero_()
        norm.bias.data.zero_()
    bench = Workbench("yolov8n.pt", importance="l2", round_to=8)
    bench.model, bench.images, bench.class_weights = model, torch.rand(6, 3, 64, 64), None
    pruned, plan = bench.prune(Plan({}, branches=names))
    assert plan.branches == names
    before = {key: value.clone() for key, value in pruned.state_dict().items()}
    bench.recover(pruned, plan, "refit")
    assert all(torch.equal(before[key], value) for key, value in pruned.state_dict().items())
    # and where something is missing, the refit comes nearer to the unpruned answers than the bare removal
    names = ("model.4.m.1", "model.6.m.0")
    bare, plan = bench.prune(Plan({"model.5": 0.25}, branches=names))
    refitted, _ = bench.prune(plan)  # a replay
    bench.recover(refitted, plan, "refit")
    assert same_weights(weights(bare), weights(bench.prune(plan)[0]))
    with torch.no_grad():
        whole, *left = (raw_outputs(net, bench.images)[0] for net in (model, bare, refitted))
    assert (left[1] - whole).square().mean() < 0.5 * (left[0] - whole).square().mean()


def test_stock_ultralytics_loads_fuses_and_exports_it(tmp_path: Path, stock_python: StockPython) -> None:
    model = tiny_model()
    table, branches = build_layer_table(model), find_branches(model)
    pruned, _ = prune(model, table, resolve(table, {"*": 0.25}), np.arange(table.class_count))
    cut_branches(pruned, branches, branches.checked(["model.2.m.0"]))
    save_checkpoint(pruned, tmp_path / "shallow.pt", {"imgsz": 64})
    stock_python(
        """
        import sys, torch
        from ultralytics import YOLO
        yolo = YOLO(sys.argv[1])
        assert len(yolo.model.model[2].m) == 0
        before = yolo.model(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))[0]
        yolo.model.train()(torch.rand(2, 3, 64, 64))
        after = YOLO(sys.argv[1]).fuse().model(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))[0]
        assert torch.allclose(before, after, rtol=1e-3, atol=1e-3), (before - after).abs().max()
        assert YOLO(sys.argv[1]).export(format="torchscript", imgsz=64)
        """,
        tmp_path / "shallow.pt",
    )
