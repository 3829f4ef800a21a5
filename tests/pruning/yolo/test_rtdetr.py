"""RT-DETR, whose decoder is no convolution: pruned as far as its convolutions go, then all that is done to a YOLO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from paretoprune.pruning.evaluation.evaluator import evaluate
from paretoprune.pruning.export.exporter import export_model
from paretoprune.pruning.export.outputs import differences, layout_of
from paretoprune.pruning.training.finetune import finetune
from paretoprune.pruning.training.settings import FinetuneSettings
from paretoprune.pruning.workbench import Workbench
from paretoprune.pruning.yolo.loading import load_model
from paretoprune.pruning.yolo.saving import save_checkpoint
from tests.pruning.masking import build
from tests.pruning.recovery_material import NAMES, shapes_dataset, widths

pytestmark = pytest.mark.slow  # 32 million parameters

IMGSZ = 64


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained rtdetr-l of three classes."""
    path = tmp_path_factory.mktemp("rtdetr") / "whole.pt"
    model: Any = build("rtdetr-l")
    model.names = dict(enumerate(NAMES))
    save_checkpoint(model, path)
    return path


def test_pruned_refitted_trained_and_validated(whole: Path, tmp_path: Path, stock_python: Any) -> None:
    data = str(shapes_dataset(tmp_path / "shapes", train=4, val=2))
    bench = Workbench(str(whole), data, IMGSZ, calibration_images=2, round_to=16)
    pruned, plan = bench.prune({"*": 0.75})
    bench.recover(pruned, plan)
    assert bench.allocated(0.6) is not None
    convolutions = sum(m.weight.numel() for m in bench.model.modules() if isinstance(m, nn.Conv2d))
    left = sum(m.weight.numel() for m in pruned.modules() if isinstance(m, nn.Conv2d))
    assert left < 0.25 * convolutions
    assert linears(pruned) == linears(bench.model)  # nothing of the decoder's own
    result = finetune(pruned, data, FinetuneSettings(epochs=1, imgsz=IMGSZ, batch=4, lr=1e-4), tmp_path / "run")
    assert widths(result.model) == widths(pruned)
    assert result.history[0]["train/giou_loss"] > 0
    save_checkpoint(result.model, tmp_path / "better.pt")
    assert evaluate(load_model(tmp_path / "better.pt"), data, IMGSZ, "cpu") == result.metrics
    done = stock_python(
        """
        import sys
        from ultralytics import YOLO
        model = YOLO(sys.argv[1])
        box = model.val(data=sys.argv[2], imgsz=64, plots=False, verbose=False).box
        print("FOUND", type(model).__name__, float(box.map) == float(sys.argv[3]))
        """,
        tmp_path / "better.pt", data, result.metrics["map50_95"],
    )  # fmt: skip
    assert "FOUND RTDETR True" in done.stdout


def linears(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def test_onnx_runtime_computes_the_same(tmp_path: Path) -> None:
    """As many queries as there are places, and one class: then nothing is left out, and near-ties only change rows.

    The decoder takes the best 300 places and gives the best 300 answers; which of two equally good ones is the 300th is
    a matter of the last bit. With all of them in, both runtimes must give the same set.
    """
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    size, places = 96, 12 * 12 + 6 * 6 + 3 * 3
    model: Any = build("rtdetr-l", 1)
    model.model[-1].num_queries = places
    for scores in model.model[-1].dec_score_head:
        scores.bias.data.fill_(0.0)  # a fresh head sees no object
    save_checkpoint(model, tmp_path / "whole.pt")
    bench = Workbench(str(tmp_path / "whole.pt"), importance="l2")
    pruned, _ = bench.prune({"*": 0.5})
    save_checkpoint(pruned, tmp_path / "pruned.pt")
    onnx_file = export_model(tmp_path / "pruned.pt", "onnx", size)
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    session = runtime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    with torch.no_grad():
        expected = pruned(image)[0].numpy()
    assert got.shape == expected.shape == (1, places, 6)
    apart = np.abs(expected[0][:, None] - got[0][None]).max(axis=2)  # (torch's rows, ONNX Runtime's rows)
    assert apart.min(axis=0).max() < 1e-3
    assert apart.min(axis=1).max() < 1e-3
    assert np.ptp(expected[0], axis=0)[:5].min() > 1e-2  # the rows do differ, in box and score
    layout = layout_of(pruned, size)
    objects, score, place = differences([expected], [got], layout)
    assert objects > 0
    assert max(score, place) < 1e-3
    moved = got.copy()
    moved[..., 0] += 0.05  # of the image's width, as the layout says
    assert differences([expected], [moved], layout)[2] > 0.02
    assert onnx_file.stat().st_size < 4.4 * sum(p.numel() for p in pruned.parameters())
