"""Exports against their checkpoint on real images: equal ones pass, another network does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from paretoprune.pruning.builtin import BASELINE, IMGSZ
from paretoprune.pruning.builtin.dataset import build_dataset
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.export.check import check_export, measure_export
from paretoprune.pruning.export.exporter import export_model
from paretoprune.pruning.latency.runtimes.autobackend import Backend
from paretoprune.pruning.workbench import Workbench
from paretoprune.pruning.yolo.image_size import trained_size
from paretoprune.pruning.yolo.loading import load_model
from paretoprune.pruning.yolo.saving import save_checkpoint
from paretoprune.search.cli import run

pytestmark = pytest.mark.slow

pytest.importorskip("onnxruntime", reason="the package of the onnx extra is not installed: nothing was exported")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_dataset(tmp_path_factory.mktemp("data") / "digits", train=4, val=4))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pruned checkpoint and its ONNX file."""
    folder = tmp_path_factory.mktemp("export")
    model, _ = Workbench(str(BASELINE), importance="l2").prune({"*": 0.25})
    save_checkpoint(model, folder / "pruned.pt", {"imgsz": IMGSZ})
    return folder / "pruned.pt", export_model(folder / "pruned.pt", "onnx", None)


def test_an_export_answers_like_its_checkpoint(pair: tuple[Path, Path], data: str) -> None:
    pruned, exported = pair
    assert exported.suffix == ".onnx"
    assert trained_size(load_model(pruned).args) == IMGSZ
    found = check_export(exported, pruned, IMGSZ, data=data)
    assert found.images == 4
    assert found.verdict == "the same as the checkpoint's"
    bundled = check_export(exported, pruned, IMGSZ)
    assert bundled.images == 2
    assert bundled.ok


def test_an_export_of_another_network_is_found_out(pair: tuple[Path, Path], data: str) -> None:
    found = check_export(pair[1], BASELINE, IMGSZ, data=data)
    assert found.objects > 0
    assert not found.ok
    assert found.verdict == "NOT the checkpoint's"


def test_an_export_is_timed_beside_its_checkpoint(pair: tuple[Path, Path]) -> None:
    found = measure_export(pair[1], pair[0], IMGSZ, threads=1, max_seconds=0.5)
    assert found.against == "pruned.pt"
    assert found.speedup_ci95[0] <= found.speedup <= found.speedup_ci95[1]
    assert 0 < found.median_ms <= found.p90_ms


def test_what_cannot_be_run_is_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no network")
    with pytest.raises(
        PruningError,
        match=r"broken.onnx' cannot be run here .*; check that it is whole and that its runtime is installed",
    ):
        Backend(broken, IMGSZ)


def test_the_command_prints_the_path_and_leaves_its_figures(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copy(pair[0], tmp_path / "m.pt")
    assert run(["export", str(model), "--seconds", "0.5", "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(tmp_path / "m.onnx")
    assert "answers: the same as the checkpoint's on 2 images" in printed.err
    found = json.loads((tmp_path / "m.onnx.check.json").read_text())
    assert (found["imgsz"], found["ok"], found["against"]) == (IMGSZ, True, "m.pt")
    assert run(["export", str(model), "--format", "onnxx"]) == 1
    assert "the format must be one of" in capsys.readouterr().err
