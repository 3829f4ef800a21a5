"""What hurts people who prune YOLO with other tools today, one test per pain. Numbers are of public issue threads.

TP is VainF/Torch-Pruning, UL is ultralytics/ultralytics.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.evaluation.evaluator import evaluate
from paretoprune.pruning.export.exporter import export_model
from paretoprune.pruning.plan import Plan
from paretoprune.pruning.surgery.layer_table import build_layer_table
from paretoprune.pruning.surgery.surgery import prune, resolve
from paretoprune.pruning.training.finetune import finetune
from paretoprune.pruning.training.settings import FinetuneSettings
from paretoprune.pruning.workbench import Workbench
from paretoprune.pruning.yolo.loading import load_model, model_stats
from paretoprune.pruning.yolo.saving import save_checkpoint
from tests.pruning.masking import build, relative_error
from tests.pruning.recovery_material import same_weights, shapes_dataset, weights, widths
from tests.pruning.tiny import tiny_model

SETTINGS = FinetuneSettings(epochs=1, imgsz=64, batch=4, lr=1e-3)


def cut(model: nn.Module, ratios: dict[str, float], round_to: int = 8) -> tuple[nn.Module, Plan]:
    """Remove channels at random."""
    table = build_layer_table(model)
    scores = np.random.default_rng(0).random(table.class_count)
    return prune(model, table, resolve(table, ratios, round_to), scores)


@pytest.fixture(scope="module")
def yolov8n() -> nn.Module:
    return build("yolov8n")


@pytest.fixture
def pruned_file(tmp_path: Path) -> Path:
    """A small pruned detector for the three kinds of shapes."""
    save_checkpoint(cut(tiny_model(), {"*": 0.5}, round_to=1)[0], tmp_path / "pruned.pt")
    return tmp_path / "pruned.pt"


def test_chunk_of_c2f_breaks_the_channel_groups(yolov8n: Any) -> None:
    """TP#147, UL#14171: the convolution had to be split by hand."""
    ratios = {f"model.{i}.cv1": r for i, r in zip((2, 4, 6, 8, 12, 15), (0.5, 0.25, 0.75, 0.5, 0.25, 0.5), strict=True)}
    pruned, plan = cut(yolov8n, ratios)
    assert relative_error(yolov8n, pruned, plan.kept, torch.rand(1, 3, 96, 96)) < 2e-5
    for layer in ratios:
        block: Any = pruned.get_submodule(layer.removesuffix(".cv1"))
        assert type(block) is type(yolov8n.model[2])  # still the stock class with its chunk
        assert block.cv1.conv.out_channels == 2 * block.c < yolov8n.get_submodule(layer).conv.out_channels


def test_random_shape_mismatch_and_concat_index_errors(yolov8n: nn.Module) -> None:
    """TP#415, #477, #481, #503: which combination of ratios runs was a matter of luck."""
    table = build_layer_table(yolov8n)
    rng = np.random.default_rng(0)
    for _ in range(12):
        drawn = {g.id: int(rng.choice(g.widths(1))) for g in table.groups}
        pruned, _ = prune(yolov8n, table, drawn, rng.random(table.class_count))
        with torch.no_grad():
            pruned(torch.rand(1, 3, 64, 96))
            pruned.train()(torch.rand(2, 3, 64, 64))


@pytest.mark.parametrize(
    ("name", "attention"),
    [("yolov10n", "model.10.attn"), ("yolo11n", "model.10.m.0.attn"), ("yolo12n", "model.6.m.0.0")],
)
def test_attention_blocks_of_yolo10_11_12(name: str, attention: str) -> None:
    """TP#386, #522: people left them out, with everything around them."""
    model = build(name)
    table = build_layer_table(model)
    inside = [layer for layer in table.layers if layer.name.startswith(attention)]
    assert any(layer.prunable for layer in inside)
    assert all(layer.prunable or layer.reason for layer in inside)
    pruned, plan = cut(model, {"*": 0.5})
    assert any(layer.name in plan.ratios for layer in inside)
    assert relative_error(model, pruned, plan.kept, torch.rand(1, 3, 128, 128)) < 2e-5


def test_train_brings_the_unpruned_network_back(pruned_file: Path, tmp_path: Path) -> None:
    """TP#409, UL#14856, #9813, #7498: "Transferred 349/355 items", and the rest is random."""
    start = load_model(pruned_file)
    result = finetune(start, str(shapes_dataset(tmp_path / "shapes")), SETTINGS, tmp_path / "run")
    assert widths(result.model) == widths(start) != widths(tiny_model())
    assert result.start_metrics == evaluate(start, str(tmp_path / "shapes" / "data.yaml"), 64, "cpu")
    assert "Transferred" not in (tmp_path / "run" / "train.log").read_text()


def test_fine_tuning_resumed_from_a_pt_is_rebuilt_from_yaml(pruned_file: Path, tmp_path: Path) -> None:
    data = str(shapes_dataset(tmp_path / "shapes"))
    first = finetune(load_model(pruned_file), data, SETTINGS, tmp_path / "first")
    save_checkpoint(first.model, tmp_path / "first.pt")
    second = finetune(load_model(tmp_path / "first.pt"), data, SETTINGS, tmp_path / "second")
    assert widths(second.model) == widths(load_model(pruned_file))
    assert second.start_metrics == pytest.approx(first.metrics)  # it goes on where the first ended


def test_nothing_is_pruned_and_the_speed_up_is_1(yolov8n: nn.Module, tmp_path: Path) -> None:
    """TP#505, #136, #356: checkpoints come with frozen weights, for which no graph was found."""
    frozen = copy.deepcopy(yolov8n).requires_grad_(False)
    pruned, plan = cut(frozen, {"*": 0.5})
    assert model_stats(pruned, 64).gflops < 0.35 * model_stats(frozen, 64).gflops
    assert len(plan.ratios) > 50
    save_checkpoint(frozen, tmp_path / "frozen.pt")
    loaded = load_model(tmp_path / "frozen.pt")
    assert sum(p.requires_grad for p in loaded.parameters()) > 150


def test_the_head_is_pruned_although_ignored(yolov8n: nn.Module) -> None:
    """TP#341, #160: only the outputs of what is ignored were kept."""
    pruned, plan = cut(yolov8n, {"*": 0.5, "model.22.*": 0.0})
    assert plan.ratios
    assert not any(layer.startswith("model.22.") for layer in plan.ratios)
    for name, conv in yolov8n.named_modules():
        if name.startswith("model.22.") and isinstance(conv, nn.Conv2d):
            now: Any = pruned.get_submodule(name)
            assert now.out_channels == conv.out_channels
            if name.split(".")[-2] != "0":  # the towers' first convolutions read narrower maps
                assert now.in_channels == conv.in_channels


def test_the_heads_outputs_cannot_be_pruned_at_all(yolov8n: nn.Module) -> None:
    table = build_layer_table(yolov8n)
    last = [layer for layer in table.layers if layer.name.endswith((".2", ".dfl.conv")) and layer.block == 22]
    assert len(last) == 7
    assert all("fixed meaning for the Detect head" in layer.reason for layer in last)


@pytest.mark.slow
def test_map_is_0_right_after_pruning(assets: Path) -> None:
    """TP#147, #286: even at 10 %. Unpruned, this network has 0.612."""
    data = str(assets / "bccd" / "data.yaml")
    bench = Workbench(str(assets / "weights" / "bccd_yolov8n.pt"), data, 320, calibration_images=48)
    assert evaluate(bench.prune({"*": 0.1})[0], data, 320, "cpu")["map50_95"] > 0.5
    pruned, plan = bench.prune({"*": 0.2})
    assert evaluate(pruned, data, 320, "cpu")["map50_95"] < 0.3
    bench.recover(pruned, plan, "refit")  # no training
    assert evaluate(pruned, data, 320, "cpu")["map50_95"] > 0.5


def test_nan_while_fine_tuning(pruned_file: Path, tmp_path: Path) -> None:
    """yolov5#12591. A network that is broken already is refused in one line; a sound one stays sound."""
    data = str(shapes_dataset(tmp_path / "shapes"))
    result = finetune(load_model(pruned_file), data, SETTINGS, tmp_path / "sound")
    assert all(np.isfinite(list(row.values())).all() for row in result.history)
    assert all(torch.isfinite(t).all() for t in result.model.state_dict().values())
    broken: Any = load_model(pruned_file)
    broken.model[1].conv.weight.data[0] = float("nan")
    with pytest.raises(PruningError) as error:
        finetune(broken, data, SETTINGS, tmp_path / "broken")
    assert "\n" not in str(error.value)


def test_no_speed_up_for_widths_the_hardware_does_not_like(yolov8n: nn.Module) -> None:
    """TP#149, #33, #382, #484, TensorRT#1310, #3884: 5 % less of everything was slower than nothing less."""
    for ratio in (0.05, 0.3, 0.61):
        pruned, _ = cut(yolov8n, {"*": ratio})
        for name, module in pruned.named_modules():
            before: Any = yolov8n.get_submodule(name)
            if isinstance(module, nn.Conv2d) and module.out_channels != before.out_channels:
                assert module.out_channels % 8 == 0, name


def test_saved_model_cannot_be_loaded_elsewhere(pruned_file: Path, stock_python: Any) -> None:
    """TP#363, UL#9374: the whole object was pickled, with private classes."""
    done = stock_python(
        """
        import sys
        from ultralytics import YOLO
        model = YOLO(sys.argv[1]).model
        origins = {type(module).__module__.partition(".")[0] for module in model.modules()}
        print("found", sum(p.numel() for p in model.parameters()), sorted(origins))
        """,
        pruned_file,
    )
    count = sum(p.numel() for p in load_model(pruned_file).parameters())
    found = next(line for line in done.stdout.splitlines() if line.startswith("found"))
    assert found == f"found {count} ['torch', 'ultralytics']"


def test_exported_onnx_is_as_large_as_before(pruned_file: Path, tmp_path: Path) -> None:
    """UL#16806, TP#484: the channels were only masked."""
    pytest.importorskip("onnx")
    save_checkpoint(tiny_model(), tmp_path / "whole.pt")
    before, after = (export_model(path, "onnx", 64).stat().st_size for path in (tmp_path / "whole.pt", pruned_file))
    saved = sum(p.numel() for p in tiny_model().parameters()) - sum(
        p.numel() for p in load_model(pruned_file).parameters()
    )
    assert before - after == pytest.approx(4 * saved, rel=0.1)  # bytes of float32


def test_half_precision_checkpoints_drift(pruned_file: Path) -> None:
    """TP's YOLOv8 readme: save in full precision."""
    expected = cut(tiny_model(), {"*": 0.5}, round_to=1)[0]
    assert same_weights(weights(load_model(pruned_file)), weights(expected))
    content = torch.load(pruned_file, weights_only=False)
    assert {t.dtype for t in content["model"].state_dict().values() if t.is_floating_point()} == {torch.float32}


@pytest.mark.slow
def test_several_gpus_bring_the_unpruned_network_back(pruned_file: Path, tmp_path: Path) -> None:
    """yolov5-v6#2: with several devices the trainer is made anew in each process, from the yaml. Here two processes."""
    data, model = str(shapes_dataset(tmp_path / "shapes")), load_model(pruned_file)
    result = finetune(model, data, SETTINGS, tmp_path / "run", device="cpu,cpu")
    assert result.epochs == SETTINGS.epochs
    assert widths(result.model) == widths(model)
