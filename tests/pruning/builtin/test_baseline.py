from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from paretoprune.pruning.builtin import BASELINE, BASELINE_YAML, IMGSZ

pytestmark = pytest.mark.slow

StockPython = Callable[..., "subprocess.CompletedProcess[str]"]

PROBE = """
import json, sys
import torch
from ultralytics import YOLO

stored = torch.load(sys.argv[1], map_location="cpu", weights_only=False)["model"].state_dict().values()
yolo = YOLO(sys.argv[1])
model = yolo.model
convs = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)}
widths = [m.out_channels for n, m in convs.items() if not n.endswith("dfl.conv")]
with torch.inference_mode():
    output = model.float().eval()(torch.zeros(1, 3, 160, 160))[0]
print(json.dumps({
    "task": yolo.task,
    "precisions": sorted({str(tensor.dtype) for tensor in stored if tensor.is_floating_point()}),
    "names": list(model.names.values()),
    "widths": widths,
    "parameters": sum(p.numel() for p in model.parameters()),
    "finite": bool(torch.isfinite(output).all()),
    "anchors": output.shape[-1],
    "modules": sorted({type(m).__module__.split(".")[0] for m in model.modules()}),
}))
"""


def test_the_shipped_file_is_at_most_4_mb() -> None:
    assert 0 < BASELINE.stat().st_size <= 4_000_000


def test_it_loads_and_runs_in_stock_ultralytics_without_this_project(stock_python: StockPython) -> None:
    loaded = json.loads(stock_python(PROBE, BASELINE).stdout.splitlines()[-1])
    assert loaded["task"] == "detect"
    assert loaded["precisions"] == ["torch.float16"]
    assert loaded["names"] == [str(digit) for digit in range(10)]
    assert loaded["modules"] == ["torch", "ultralytics"]
    assert loaded["finite"] is True
    assert loaded["anchors"] == (IMGSZ // 8) ** 2 + (IMGSZ // 16) ** 2 + (IMGSZ // 32) ** 2
    assert 1.6e6 <= loaded["parameters"] <= 1.9e6
    assert loaded["widths"].count(10) == 3, "one class output for each of the three strides"
    assert all(width % 8 == 0 for width in loaded["widths"] if width != 10)


def test_it_names_no_file_of_the_training_machine() -> None:
    with zipfile.ZipFile(BASELINE) as archive:
        pickled = b"".join(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    assert b"DetectionModel" in pickled
    for prefix in (b"/tmp", b"/home", b"/root", b"/work", b"/usr", b"site-packages", str(Path.home()).encode()):
        assert prefix not in pickled


def test_portable_arguments_drop_paths_and_keep_the_recipe() -> None:
    from paretoprune.pruning.builtin.train import portable_arguments

    arguments = {
        "data": "d.yaml",
        "model": "m.yaml",
        "save_dir": "/a",
        "other": "/b/c",
        "lr0": 0.1,
        "imgsz": 160,
        "x": None,
    }
    assert portable_arguments(arguments) == {"lr0": 0.1, "imgsz": 160, "x": None}


def test_the_yaml_builds_the_shipped_architecture() -> None:
    from ultralytics.nn.tasks import DetectionModel, load_checkpoint

    built, shipped = DetectionModel(str(BASELINE_YAML), verbose=False), load_checkpoint(str(BASELINE))[0]
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (built, shipped)]
    assert shapes[0] == shapes[1]


def test_importing_the_package_is_light() -> None:
    heavy = "torch", "ultralytics", "cv2", "sklearn", "numpy"
    code = f"import paretoprune.pruning.builtin, sys; print([m for m in {heavy} if m in sys.modules])"
    root = Path(__file__).parents[3]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "[]", run.stderr


def test_it_reaches_its_accuracy_on_the_validation_split(tmp_path: Path) -> None:
    from paretoprune.pruning.builtin.dataset import build_dataset
    from paretoprune.pruning.builtin.train import validate_baseline

    accuracy = validate_baseline(BASELINE, build_dataset(tmp_path / "digits", train=1))
    assert accuracy["map50_95"] >= 0.65
    assert accuracy["map50"] >= accuracy["map50_95"]


def test_the_training_command_writes_a_loadable_checkpoint(tmp_path: Path) -> None:
    from ultralytics import YOLO

    out = tmp_path / "new" / "tiny.pt"
    command = [
        sys.executable,
        "-m",
        "paretoprune.pruning.builtin.train",
        "--epochs",
        "1",
        "--images",
        "32",
        "--out",
        str(out),
    ]
    run = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    assert f"{out}: mAP50-95 0." in run.stdout
    assert [p.name for p in out.parent.iterdir()] == ["tiny.pt"]
    assert YOLO(str(out)).names == {digit: str(digit) for digit in range(10)}
