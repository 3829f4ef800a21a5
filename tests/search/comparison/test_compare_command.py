"""The commands `compare` and `prune --strategy` on real networks, and their one-line errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paretoprune.results.analysis.strategy_comparison import ComparisonFolder
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.cli import run

Captured = pytest.CaptureFixture[str]
PROMISED = {
    "strategy", "params_m", "gflops", "speedup", "speedup_ci95", "map50_95", "epochs", "skipped", "checkpoint",
}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--ratio", "1.0"], "a ratio must lie in [0, 1)"),
        (["--plan", "none.json"], "the plan none.json cannot be read"),
        (["--strategies", ","], "--strategies needs at least one name"),
        (["--strategies", "mask,magic"], "must be one of structural, sequential, adapter, skip, mask, but got 'magic'"),
        (["--set", "model.imgsz=100"], "`model.imgsz`: the image size must be a multiple of 32, but got 100: use 128"),
        (["--set", "finetune.bath=3"], "the nearest known one is `finetune.batch`"),
    ],
)
def test_bad_input_is_one_line_before_ray_starts(
    arguments: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("paretoprune.search.sweep.sweep.start_workers", None)
    (tmp_path / "m.pt").touch()
    (tmp_path / "d.yaml").touch()
    assert run(["compare", "m.pt", "d.yaml", "--budget-epochs", "1", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert line in captured.err
    assert captured.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.yaml", "m.pt"]


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["none.pt", "d.yaml", "--budget-epochs", "1"], 1, "the model must exist, but there is no file none.pt"),
        (["m.pt", "no/d.yaml", "--budget-epochs", "1"], 1, "dataset not found"),
        (["m.pt", "d.yaml"], 2, "Missing option '--budget-epochs'"),
        (["m.pt", "d.yaml", "--budget-epochs", "1", "--ratio", "0.1", "--plan", "p"], 2, "--ratio or --plan, not both"),
    ],
)
def test_missing_input(
    arguments: list[str], code: int, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.pt").touch()
    assert run(["compare", *arguments]) == code
    captured = capsys.readouterr()
    assert line in captured.err
    assert captured.err.count("\n") == 1


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from paretoprune.pruning.builtin.dataset import build_dataset

    return build_dataset(tmp_path_factory.mktemp("data") / "digits", train=32, val=16)


def test_ratios_that_remove_nothing_and_a_foreign_dataset_are_refused(
    dataset: Path, tmp_path: Path, capsys: Captured
) -> None:
    from paretoprune.pruning.builtin import BASELINE

    common = ["compare", str(BASELINE), "--budget-epochs", "1", "--run", str(tmp_path / "run")]
    assert run([*common, str(dataset), "--ratio", "0.001"]) == 1
    assert "the ratios remove no channel at widths in steps of 8" in capsys.readouterr().err
    few = tmp_path / "few.yaml"
    few.write_text(f"path: {dataset.parent}\ntrain: images/train\nval: images/val\nnames: [one]\n")
    assert run([*common, str(few)]) == 1
    assert "classes must be the model's" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def prune_arguments(out: Path, strategy: str) -> list[str]:
    from paretoprune.pruning.builtin import BASELINE

    arguments = ["prune", str(BASELINE), "--ratio", "0.3", "--imgsz", "160", "--strategy", strategy, "-o", str(out)]
    return [*arguments, "--format", "json"]


def test_prune_by_mask_leaves_the_size_and_says_what_was_masked(tmp_path: Path, capsys: Captured) -> None:
    from paretoprune.pruning.yolo.loading import load_model

    out = tmp_path / "masked.pt"
    assert run(prune_arguments(out, "mask")) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["params_m"] == row["params_m_before"]
    assert (row["strategy"], row["sessions"]) == ("mask", [])
    assert row["layers_cut"] > 5
    plan = json.loads((tmp_path / "masked.plan.json").read_text())
    network = load_model(out)
    zeroed = 0
    for name, kept in plan["kept"].items():
        weight = network.get_submodule(name).weight.detach()
        masked = sorted(set(range(len(weight))) - set(kept))
        assert not weight[masked].any(), name
        zeroed += len(masked)
    assert zeroed > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["masked.plan.json", "masked.pt"]


def test_prune_by_sequential_keeps_its_intermediate_networks(tmp_path: Path, capsys: Captured) -> None:
    from paretoprune.pruning.yolo.loading import load_model

    out = tmp_path / "net.pt"
    assert run(prune_arguments(out, "sequential")) == 0
    row = json.loads(capsys.readouterr().out)
    sessions = [Path(path) for path in row["sessions"]]
    assert len(sessions) > 1
    assert {path.parent for path in sessions} == {tmp_path / "net.sessions"}
    sizes = [sum(p.numel() for p in load_model(path).parameters()) for path in sessions]
    assert sizes == sorted(set(sizes), reverse=True)  # every session removes more
    assert all(item["layer"] and item["reason"] for item in row["skipped"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.plan.json", "net.pt", "net.sessions"]


def test_prune_by_an_unknown_strategy_names_the_known_ones(tmp_path: Path, capsys: Captured) -> None:
    assert run(prune_arguments(tmp_path / "x.pt", "magic")) == 1
    error = capsys.readouterr().err
    assert "must be one of structural, sequential, adapter, skip, mask, but got 'magic'" in error
    assert error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_real_comparison_of_two(dataset: Path, tmp_path: Path, capsys: Captured) -> None:
    from paretoprune.pruning.builtin import BASELINE, IMGSZ
    from paretoprune.pruning.yolo.loading import load_model

    arguments = ["compare", str(BASELINE), str(dataset), "--strategies", "structural,mask", "--budget-epochs", "1"]
    arguments += ["--imgsz", str(IMGSZ), "--run", str(tmp_path / "run"), "--format", "json"]
    for setting in ("recover.calibration_images=16", "latency.max_seconds=1.0", "latency.threads=1"):
        arguments += ["--set", setting]
    assert run(arguments) == 0
    structural, mask = json.loads(capsys.readouterr().out)
    for row in (structural, mask):
        assert set(row) >= PROMISED
        assert row["epochs"] == 1
        assert 0 <= row["map50_95_refit"] <= 1
        assert 0 <= row["map50_95"] <= 1
        network = load_model(row["checkpoint"])
        assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(row["params_m"], rel=0.01)
    assert structural["params_m"] < mask["params_m"]
    assert structural["gflops"] < mask["gflops"]
    folder = ComparisonFolder(tmp_path / "run")
    baseline = json.loads(folder.json.read_text())["baseline"]
    assert mask["params_m"] == pytest.approx(baseline["params_m"])
    assert (folder.strategy_dir("mask") / "strategy.log").is_file()
    assert RunFolder(folder.path).report_html.stat().st_size > 1e6
    capsys.readouterr()
    assert run(arguments) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == [structural, mask]
    assert "nothing to do" in captured.err
