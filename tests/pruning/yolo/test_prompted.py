"""YOLOE, whose head is asked by text and by visual prompts: pruned to match in both, and run by stock Ultralytics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from paretoprune.pruning.errors import NotEquivalentError
from paretoprune.pruning.graph.layers import prunable_share
from paretoprune.pruning.graph.passes import passes_of
from paretoprune.pruning.importance import Evidence, score
from paretoprune.pruning.surgery.equivalence import EquivalenceCheck
from paretoprune.pruning.surgery.layer_table import build_layer_table
from paretoprune.pruning.surgery.surgery import prune, resolve
from paretoprune.pruning.yolo.saving import save_checkpoint
from tests.pruning.masking import build, relative_error


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build("yoloe-11n")


def test_pruned_it_answers_visual_prompts(model: nn.Module, tmp_path: Path, stock_python: Any) -> None:
    table = build_layer_table(model)
    savpe = [f"model.23.savpe.{tower}.{scale}" for tower in ("cv1", "cv2") for scale in range(3)]
    assert {f"{name}.0" for name in savpe} <= table.group_of.keys()
    assert prunable_share(model, table) > 0.9
    pruned, plan = prune(model, table, resolve(table, {"*": 0.5}), score("l2", Evidence(model, table)))
    EquivalenceCheck(model, 640).check(pruned, plan.kept)
    assert relative_error(model, pruned, plan.kept, torch.rand(1, 3, 64, 64)) < 2e-5
    assert [each.name for each in passes_of(pruned)][2:] == ["inference with visual prompts"]
    save_checkpoint(pruned, tmp_path / "pruned.pt")
    done = stock_python(
        """
        import sys
        import numpy as np
        from ultralytics import YOLOE
        from ultralytics.models.yolo.yoloe import YOLOEVPDetectPredictor
        image = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
        prompts = {"bboxes": np.array([[10.0, 10.0, 60.0, 60.0]]), "cls": np.array([0])}
        found = YOLOE(sys.argv[1]).predict(
            image, visual_prompts=prompts, predictor=YOLOEVPDetectPredictor, imgsz=96, conf=1e-9, verbose=False
        )
        print("FOUND", len(found[0].boxes) > 0)
        """,
        tmp_path / "pruned.pt",
    )
    assert "FOUND True" in done.stdout


def test_a_visual_branch_of_the_old_width_is_stopped(model: nn.Module) -> None:
    table = build_layer_table(model)
    widths = resolve(table, {"model.16.*": 0.5})  # the finest of the head's feature maps
    pruned, plan = prune(model, table, widths, score("l2", Evidence(model, table)))
    pruned.model[23].savpe = model.model[23].savpe  # type: ignore[index, union-attr]
    with pytest.raises(
        NotEquivalentError, match=r"block model\.23 \(YOLOEDetect\), seen at model\.23\.savpe\..* in inf"
    ):
        EquivalenceCheck(model, 640).check(pruned, plan.kept)
