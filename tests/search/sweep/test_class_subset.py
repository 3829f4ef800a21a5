"""A run of some of the model's classes, from the search to the report, beside the network of all of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from paretoprune.pruning.builtin import BASELINE, IMGSZ
from paretoprune.pruning.builtin.dataset import build_dataset
from paretoprune.pruning.yolo.loading import load_model
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.cli import run
from paretoprune.search.config.stored import load_run_config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

Captured = pytest.CaptureFixture[str]

SETTINGS = (
    "space.imgsz=[]", "recover.calibration_images=16", "latency.max_seconds=0.5", "finetune.epochs=1",
    "trial.val_images=8", "recover.method=none", "recover.importance=l2", "search.warm_start=false",
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_dataset(tmp_path_factory.mktemp("data") / "digits", train=16, val=12)


def search(data: Path, folder: Path, classes: str, trials: int) -> list[str]:
    options = [f"--imgsz={IMGSZ}", f"--trials={trials}", "--epochs=0", f"--run={folder}", f"--classes={classes}"]
    return ["search", str(BASELINE), str(data), *options, *(f"--set={setting}" for setting in SETTINGS)]


def test_a_run_of_some_classes(data: Path, tmp_path: Path, capsys: Captured) -> None:
    folder = RunFolder(tmp_path / "run")
    assert run(search(data, folder.path, "7,3", trials=1)) == 0, capsys.readouterr().err
    config, baseline = load_run_config(folder), folder.read_baseline()
    assert config.data.classes == baseline["classes"] == baseline["identity"]["dataset"]["classes"] == ["3", "7"]
    assert (baseline["data"], Path(config.data.path).parent) == (str(data), folder.path / "model")
    for record in folder.read_records():
        assert load_model(folder.trial_checkpoint(record.trial_id)).names == {0: "3", 1: "7"}
    assert baseline["metrics"]["map50_95_all"] > 0.7  # as the whole network has of its ten
    # The same command again, and a dataset that lies elsewhere now
    assert run(search(data, folder.path, "3,7", trials=1)) == 0
    assert len(folder.read_records()) == 1
    assert run(search(data, folder.path, "3,8", trials=1)) == 1
    assert "`data.classes` is ['3', '7'] there, got ['3', '8']" in capsys.readouterr().err
    moved = Path(shutil.copytree(data.parent, tmp_path / "moved")) / "data.yaml"
    moved.write_text(yaml.safe_dump({**yaml.safe_load(data.read_text()), "path": str(moved.parent)}))
    assert run(["resume", str(folder.path), "--trials", "2", "--data", str(moved)]) == 0, capsys.readouterr().err
    assert len(folder.read_records()) == 2
    capsys.readouterr()
    finetune = ["finetune", str(folder.path), "--pick=1", "--format=json", "--set"]
    assert run([*finetune, "finetune.train.mosiac=1"]) == 1
    assert "near ones are mosaic" in capsys.readouterr().err
    taught = ["finetune.train.translate=0.05", "--teacher", str(BASELINE)]  # of ten classes, these among them
    assert run([*finetune, *taught]) == 0, capsys.readouterr().err
    (pick,) = json.loads(capsys.readouterr().out)
    selected = Path(pick["checkpoint"]).parent
    assert yaml.safe_load((selected / "args.yaml").read_text())["translate"] == 0.05
    settings = json.loads((selected / "metrics.json").read_text())["settings"]
    assert (settings["train"], settings["teacher"]) == ({"translate": 0.05}, str(BASELINE.resolve()))
    assert "train/teacher" in (selected / "train.log").read_text()
    assert load_model(pick["checkpoint"]).names == {0: "3", 1: "7"}
    card = (selected / "MODEL_CARD.md").read_text()
    assert "| Taught by | baseline.pt |" in card
    assert "| Training arguments | translate=0.05 |" in card
    assert f"| Trained on | {data} (classes: 3, 7) |" in card
    assert "yolo val" not in card
    assert run(["report", str(folder.path)]) == 0
    assert f"{data} (classes: 3, 7)" in (folder.path / "report.html").read_text()


def test_pruning_with_some_classes(data: Path, tmp_path: Path, capsys: Captured) -> None:
    out, both = tmp_path / "out.pt", tmp_path / "both.pt"
    assert run(["prune", str(BASELINE), "--classes", "7,3", "-o", str(out), "--format", "json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["classes"], row["layers_cut"]) == ("3, 7", 0)
    assert row["params_m"] < row["params_m_before"]
    whole, kept = load_model(BASELINE), load_model(out)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(whole(images)[0][:, [0, 1, 2, 3, 4 + 3, 4 + 7]], kept(images)[0], atol=1e-4)
    budget = ["--keep-macs", "0.6", "--data", str(data), "--imgsz", str(IMGSZ), "--calibration-images", "8"]
    budget += ["--importance", "taylor", "--classes", "3,7"]
    assert run(["prune", str(BASELINE), *budget, "-o", str(both), "--format", "json"]) == 0, capsys.readouterr().err
    row = json.loads(capsys.readouterr().out)
    assert 0.5 < row["macs_kept"] <= 0.6
    assert load_model(both).names == {0: "3", 1: "7"}
    assert json.loads(both.with_suffix(".plan.json").read_text())["made_with"]["classes"] == "3, 7"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--classes", "11"], "`classes` must be of the model's 10, by name or number, but got '11'; near ones are 1"),
        (["--classes", "3", "--recover", "refit", "--data", "d"], "alone loses nothing to regain"),
        (
            ["--classes", "3", "--dry-run"],
            "an estimate is of removed channels: give --ratio, --plan or a budget beside",
        ),
    ],
)
def test_a_prune_command_that_cannot_be_is_refused(arguments: list[str], line: str, capsys: Captured) -> None:
    output = [] if "--dry-run" in arguments else ["-o", "x.pt"]
    assert run(["prune", str(BASELINE), *arguments, *output]) != 0
    assert line in capsys.readouterr().err
