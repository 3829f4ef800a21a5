"""Attentions that divide by a root of their width: narrower, they compute what they did with channels masked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from ultralytics.nn.tasks import DetectionModel, WorldModel

from paretoprune.pruning.errors import NotEquivalentError
from paretoprune.pruning.graph.layers import LayerTable, prunable_share
from paretoprune.pruning.strategies.mask import apply_mask, embed
from paretoprune.pruning.surgery.equivalence import EquivalenceCheck
from paretoprune.pruning.surgery.layer_table import build_layer_table
from paretoprune.pruning.surgery.surgery import choose_kept, prune, remove, resolve
from tests.pruning.masking import randomise_batch_norm, relative_error

_YAML: dict[str, Any] = {
    "nc": 3,
    "backbone": [[-1, 1, "Conv", [16, 3, 4]], [-1, 1, "Conv", [32, 3, 2]], [-1, 1, "A2C2f", [128, True, 4]]],
    "head": [[[2], 1, "Detect", ["nc"]]],
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return calibrated(DetectionModel(cfg=_YAML | {"yaml_file": "area.yaml", "scale": ""}, nc=3, verbose=False))


def calibrated(model: nn.Module) -> nn.Module:
    """Batch norms as after a training: else every place looks alike, and attention means nothing."""
    randomise_batch_norm(model)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None  # an average
            norm.reset_running_stats()
    model.train()
    with torch.no_grad():
        for _ in range(4):
            model(torch.rand(4, 3, 64, 64))
    return model.eval()


@pytest.fixture(scope="module")
def table(model: nn.Module) -> LayerTable:
    return build_layer_table(model)


def halved(table: LayerTable) -> tuple[dict[int, int], np.ndarray]:
    return resolve(table, {"*": 0.5}, 1), np.random.default_rng(0).random(table.class_count)


def test_narrower_it_computes_the_same(model: nn.Module, table: LayerTable) -> None:
    assert {"model.2.m.0.0.attn.qkv", "model.2.m.0.0.attn.pe", "model.2.m.0.1.attn.proj"} <= table.group_of.keys()
    pruned, plan = prune(model, table, *halved(table))
    attention: Any = pruned.get_submodule("model.2.m.0.0.attn")
    assert (attention.head_dim, attention.all_head_dim, attention.qkv.conv.out_channels) == (16, 32, 96)
    EquivalenceCheck(model, 64).check(pruned, plan.kept)
    assert relative_error(model, pruned, plan.kept, torch.rand(2, 3, 64, 64)) < 1e-5


def test_without_its_scale_taken_back_it_is_stopped(model: nn.Module, table: LayerTable) -> None:
    pruned, plan = prune(model, replace(table, scalings=()), *halved(table))
    with pytest.raises(NotEquivalentError, match=r"block model\.2 \(A2C2f\), seen at model\.2\.m\.0\.0\.attn\.proj"):
        EquivalenceCheck(model, 64).check(pruned, plan.kept)


def test_masked_it_has_its_own_scale(model: nn.Module, table: LayerTable) -> None:
    """The control strategy writes a narrower network's weights back into the wide one."""
    stays = choose_kept(table, *halved(table))
    pruned, masked = remove(model, table, stays), remove(model, table, np.ones_like(stays))
    embed(masked, table, stays, pruned)
    apply_mask(masked, table, stays)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(masked(images)[0], pruned(images)[0], rtol=1e-4, atol=1e-4)


def test_with_its_norm_merged_it_stays_whole(model: nn.Module) -> None:
    fused: Any = remove(model, build_layer_table(model), np.ones(build_layer_table(model).class_count, dtype=bool))
    layer = build_layer_table(fused.fuse(verbose=False)).by_name["model.2.m.0.0.attn.qkv"]
    assert not layer.prunable
    assert "scale" in layer.reason


def test_the_gates_of_yolo_world_lose_the_guides_channels_too() -> None:
    torch.manual_seed(0)
    model: Any = WorldModel("yolov8n-worldv2.yaml", verbose=False)
    model.txt_feats = torch.randn(model.txt_feats.shape)
    calibrated(model)
    table = build_layer_table(model)
    assert prunable_share(model, table) > 0.9
    pruned, plan = prune(model, table, *halved(table))
    gates: Any = [(model.model[k].attn, pruned.model[k].attn) for k in (12, 15, 18, 21)]  # type: ignore[index, union-attr]
    assert all(new.hc == old.hc / 2 == new.gl.out_features / new.nh for old, new in gates)
    EquivalenceCheck(model, 64).check(pruned, plan.kept)
    assert relative_error(model, pruned, plan.kept, torch.rand(1, 3, 64, 64)) < 2e-5
    wrong, _ = prune(model, replace(table, scalings=()), *halved(table))
    with pytest.raises(NotEquivalentError, match=r"block model\.12 \(C2fAttn\)"):
        EquivalenceCheck(model, 64).check(wrong, plan.kept)
