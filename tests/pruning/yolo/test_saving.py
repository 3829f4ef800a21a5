"""Checkpoints: what stock Ultralytics loads must be what was in memory, and nothing else."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from paretoprune.pruning.yolo import loading
from paretoprune.pruning.yolo.saving import pickled_classes, plain_copy, save_checkpoint, task_of
from tests.pruning.recovery_material import (
    fresh_yolov8n,
    halve_bottlenecks,
    same_weights,
    shapes_dataset,
    stock_model,
    weights,
    widths,
)


class Foreign(nn.Module):
    """A class that a stock machine does not have."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.fixture
def pruned() -> nn.Module:
    return halve_bottlenecks(fresh_yolov8n())


def test_stock_process_gets_the_same_network(pruned: nn.Module, tmp_path: Path, stock_python: Any) -> None:
    data = shapes_dataset(tmp_path / "shapes")
    image = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        expected = pruned(image)[0]
    torch.save({"image": image, "expected": expected, "widths": widths(pruned)}, tmp_path / "oracle.pth")
    save_checkpoint(pruned, tmp_path / "pruned.pt", {"imgsz": 96, "data": str(data)})
    stock_python(
        """
        import sys, torch
        from ultralytics import YOLO
        path, oracle, data, image = sys.argv[1:]
        known = torch.load(oracle)
        yolo = YOLO(path)
        model = yolo.model.eval()
        got = {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)}
        assert got == known["widths"]
        assert all(t.dtype == torch.float32 for t in model.state_dict().values() if t.is_floating_point())
        with torch.no_grad():
            assert torch.equal(model(known["image"])[0], known["expected"])
        assert type(model).__module__ == "ultralytics.nn.tasks"
        assert yolo.overrides["imgsz"] == 96 and yolo.overrides["data"] == "data.yaml" and yolo.task == "detect"
        assert len(yolo.predict(image, imgsz=96, verbose=False, save=False)) == 1
        assert yolo.val(data=data, imgsz=96, batch=4, plots=False, verbose=False).box.map >= 0
        """,
        tmp_path / "pruned.pt", tmp_path / "oracle.pth", data, data.parent / "images" / "val" / "0.png",
    )  # fmt: skip


def test_only_stock_classes_are_pickled(pruned: nn.Module, tmp_path: Path) -> None:
    save_checkpoint(pruned, tmp_path / "a.pt")
    found = set(pickled_classes(tmp_path / "a.pt"))
    assert "ultralytics.nn.tasks.DetectionModel" in found
    assert {name.split(".")[0] for name in found} <= {"torch", "ultralytics", "collections", "__builtin__"}


@pytest.mark.parametrize("where", ["layer", "attribute", "hook"])
def test_a_class_of_ours_is_refused_and_the_old_file_stays(
    pruned: Any, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = type("Ours", (nn.Identity,), {"__module__": "paretoprune.pruning.yolo.loading"})
    monkeypatch.setattr(loading, "Ours", ours, raising=False)
    path = tmp_path / "kept.pt"
    path.write_bytes(b"what was here before")
    if where == "layer":
        pruned.model[2].extra = ours()
    elif where == "attribute":
        pruned.model[2].note = [ours()]
    else:
        pruned.model[2].register_forward_hook(ours())
    with pytest.raises(AssertionError, match=r"pruning\.yolo\.loading\.Ours"):
        save_checkpoint(pruned, path)
    assert path.read_bytes() == b"what was here before"
    assert list(tmp_path.iterdir()) == [path]


def test_layers_of_a_users_own_class_are_stored_by_reference(pruned: Any, tmp_path: Path) -> None:
    pruned.model[2].extra = Foreign()
    save_checkpoint(pruned, tmp_path / "a.pt")
    assert [name for name in pickled_classes(tmp_path / "a.pt") if "Foreign" in name] == [f"{__name__}.Foreign"]


def test_what_a_stock_network_carries_beside_its_layers_is_stock(pruned: Any, tmp_path: Path) -> None:
    pruned.model[2].note = [np.float64(1)]
    with pytest.raises(AssertionError, match=r"numpy\."):
        save_checkpoint(pruned, tmp_path / "a.pt")


def test_no_path_of_this_machine(pruned: Any, tmp_path: Path) -> None:
    place = str(tmp_path)
    pruned.args = {"data": f"{place}/d.yaml", "project": place, "save_dir": place, "model": f"{place}/m.pt"}
    pruned.pt_path = f"{place}/m.pt"
    pruned.yaml["yaml_file"] = f"{place}/yolov8n.yaml"
    save_checkpoint(pruned, tmp_path / "a.pt", {"name": place, "pretrained": Path(place) / "b.pt"})
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        for name in archive.namelist():
            assert place.encode() not in archive.read(name), name
    model: Any = stock_model(tmp_path / "a.pt")
    assert model.args["data"] == "d.yaml"
    assert model.yaml["yaml_file"] == "yolov8n.yaml"
    assert pruned.args["project"] == place  # the network in memory is not touched


def test_half_precision_and_training_leftovers(pruned: Any, tmp_path: Path) -> None:
    pruned.criterion = Foreign()
    pruned.train()(torch.rand(1, 3, 64, 64))["boxes"].sum().backward()  # leaves gradients behind
    pruned.eval()(torch.rand(1, 3, 64, 64))  # leaves anchors behind
    assert pruned.model[-1].anchors.numel() > 0
    pruned.half()
    save_checkpoint(pruned, tmp_path / "deep" / "er" / "a.pt")
    loaded: Any = stock_model(tmp_path / "deep" / "er" / "a.pt")
    assert loaded.criterion is None
    assert loaded.model[-1].anchors.numel() == 0
    assert all(p.grad is None and p.dtype == torch.float32 for p in loaded.parameters())
    assert next(pruned.parameters()).dtype == torch.float16
    assert same_weights(weights(loaded), weights(pruned.float()))


def test_full_precision_is_kept_bit_by_bit(pruned: nn.Module, tmp_path: Path) -> None:
    save_checkpoint(pruned, tmp_path / "a.pt")
    assert same_weights(weights(stock_model(tmp_path / "a.pt")), weights(pruned))


def test_no_teacher_and_no_hooks_of_a_distillation(pruned: Any) -> None:
    from ultralytics.nn.distill_model import DistillationModel, FeatureHook
    from ultralytics.utils import DEFAULT_CFG

    pruned.args = DEFAULT_CFG
    expected = widths(pruned)
    copy = plain_copy(DistillationModel(fresh_yolov8n(1), pruned))
    assert widths(copy) == expected
    assert not any(isinstance(h, FeatureHook) for m in copy.modules() for h in m._forward_hooks.values())
    assert any(isinstance(h, FeatureHook) for m in pruned.modules() for h in m._forward_hooks.values())


def test_permissions_follow_the_umask(pruned: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "usual").write_text("")
    save_checkpoint(pruned, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_task_is_guessed_from_the_head() -> None:
    from ultralytics.nn.tasks import PoseModel

    assert task_of(fresh_yolov8n()) == "detect"
    assert task_of(PoseModel("yolov8n-pose.yaml", nc=1, verbose=False)) == "pose"
