"""`paretoprune prune --keep-macs`, `--keep-params` and `--speedup`, run as commands on the built-in detector."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from paretoprune.base.messages import speaking
from paretoprune.pruning.budget.budget import Cut, cut_to
from paretoprune.pruning.builtin import BASELINE, IMGSZ
from paretoprune.pruning.builtin.dataset import build_dataset
from paretoprune.pruning.workbench import Workbench
from paretoprune.search.api import prune_budget
from paretoprune.search.cli import run
from tests.pruning.recovery_material import stock_model, write_yaml
from tests.search.commands.test_prune_estimate import run_of, true_ratio

pytestmark = pytest.mark.slow

Captured = pytest.CaptureFixture[str]

SMALL = ["prune", str(BASELINE), "--imgsz", str(IMGSZ), "--format", "json"]
PRUNE = [*SMALL, "--importance", "taylor", "--calibration-images", "4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_dataset(tmp_path_factory.mktemp("budgets") / "digits", train=4, val=1)


def answer(capsys: Captured, *more: object) -> tuple[dict[str, Any], str]:
    code = run([*PRUNE, *map(str, more)])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out), err


def test_half_of_the_work_is_written(data: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "half.pt"
    row, said = answer(capsys, "--keep-macs", 0.5, "--data", data, "-o", out)
    assert 0.49 < row["macs_kept"] <= 0.5
    assert row["params_kept"] == pytest.approx(row["params_m"] / row["params_m_before"], abs=1e-4)
    stock = stock_model(out)
    assert sum(p.numel() for p in stock.parameters()) == pytest.approx(row["params_m"] * 1e6)
    with torch.no_grad():
        assert torch.isfinite(stock(torch.rand(1, 3, IMGSZ, IMGSZ))[0]).all()
    plan = json.loads(out.with_suffix(".plan.json").read_text())
    assert plan["made_with"]["budget"] == row["budget"] == "at most 0.5 of the multiply-adds"
    lines = said.splitlines()
    head = next(i for i, line in enumerate(lines) if line.split()[:2] == ["block", "module"])
    assert lines[head].split() == ["block", "module", "channels", "macs_kept", "estimated_loss"]
    rows = [line.split() for line in lines[head + 1 :]]
    assert rows[0][:4] == ["0", "Conv", "16", "->"]
    assert rows[-1][:2] == ["22", "Detect"]
    assert any(int(after) < int(before) for _, _, before, _, after, *_ in rows)
    assert "scoring channels on 4 images" in said
    assert run(["prune", str(BASELINE), "--plan", str(out.with_suffix(".plan.json")), "--dry-run"]) == 0


def test_a_dry_run_of_parameters_writes_nothing(
    data: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    row, _ = answer(capsys, "--keep-params", 0.6, "--data", data, "--dry-run")
    assert 0.59 < row["params_kept"] <= 0.6
    assert row["params_kept"] == pytest.approx(row["params_m"] / row["params_m_before"], abs=1e-4)
    assert all(group["width"] % 8 == 0 for group in row["widths"])
    assert list(tmp_path.iterdir()) == []


def test_a_speed_by_a_runs_plans_is_said_to_be_predicted(data: Path, tmp_path: Path, capsys: Captured) -> None:
    bench = Workbench(str(BASELINE), imgsz=IMGSZ, importance="l2")
    given = ["--speedup", 1.5, "--data", data, "--run", run_of(bench, tmp_path / "run", 25)]
    row, said = answer(capsys, *given, "-o", tmp_path / "fast.pt")
    low, high = row["predicted_speedup_pi95"]
    assert 1.5 <= row["predicted_speedup"] < 1.53
    assert low < row["predicted_speedup"] < high
    ratios = json.loads((tmp_path / "fast.plan.json").read_text())["ratios"]
    assert low < 1 / true_ratio(bench.geometry, ratios) < high
    assert row["budget"] == "at least 1.5 times as fast, predicted"
    assert "are predicted to run 1.5 times as fast" in said
    dry, _ = answer(capsys, *given, "--dry-run")
    assert (dry["speedup"], dry["macs_kept"]) == (row["predicted_speedup"], row["macs_kept"])


def test_a_speed_by_plans_timed_now(data: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """The heaviest of them is beyond what the speed needs, on a machine where latency falls slowly."""
    asked: list[tuple[dict[str, float], int]] = []

    def timed(
        bench: Workbench, wanted: dict[str, float], count: int, device: str, say: object
    ) -> prune_budget.Measured:
        from paretoprune.pruning.latency.model import MeasuredPlan
        from paretoprune.search.api.prune_estimate import scattered

        asked.append((wanted, count))
        leaders = {g.layers[0]: wanted[g.layers[0]] for g in bench.table.groups if g.layers[0] in wanted}
        drawn = [bench.prune(plan)[1] for plan in scattered(leaders, count)]
        ratios = [MeasuredPlan(plan, true_ratio(bench.geometry, dict(plan.ratios)), 0.01) for plan in drawn]
        return prune_budget.Measured(tuple(ratios), 8.0, "timed")

    monkeypatch.setattr(prune_budget, "by_measuring", timed)
    row, _ = answer(capsys, "--speedup", 1.4, "--data", data, "--dry-run")
    assert 1.4 <= row["speedup"] < 1.45
    ((wanted, count),) = asked
    assert count == 12
    geometry = Workbench(str(BASELINE), imgsz=IMGSZ, importance="l2").geometry
    assert 1 / true_ratio(geometry, wanted) > 1.4


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--keep-macs", "0.5", "--ratio", "0.5"], "give exactly one of --ratio, --plan, --keep-macs, --keep-params"),
        (["--keep-macs", "0.5"], "choose widths by what images show of each layer: give --data"),
        (["--keep-macs", "0", "--data", "d"], "--keep-macs is the share that stays, in (0, 1], got 0"),
        (["--keep-params", "nan", "--data", "d"], "--keep-params is the share that stays, in (0, 1], got nan"),
        (["--speedup", "1", "--data", "d"], "--speedup says how many times as fast, above 1, got 1"),
        (["--speedup", "inf", "--data", "d"], "above 1, got inf"),
        (["--keep-macs", "0.5", "--data", "d", "--measure", "12"], "belong to --dry-run or --speedup"),
        (["--keep-macs", "0.5", "--data", "d", "--strategy", "mask"], "a budget is for the structural strategy"),
    ],
)
def test_wrong_usage_is_said(arguments: list[str], line: str, capsys: Captured) -> None:
    assert run(["prune", "m.pt", "-o", "o.pt", *arguments]) == 2
    assert line in capsys.readouterr().err


def test_a_budget_that_cannot_be_met_is_one_line(data: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "o.pt"
    assert run([*PRUNE, "--keep-macs", "0.01", "--data", str(data), "-o", str(out)]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "the narrowest widths (multiples of 8) leave 0.0" in errors[0]
    assert not out.exists()


def test_what_takes_long_is_said_again(capsys: Captured) -> None:
    import time

    with speaking(0.05) as say:
        say("scoring")
        time.sleep(0.4)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 2
    assert all(line.endswith("scoring: 0 s so far") for line in lines[1:])


# -- poor calibration images -------------------------------------------------------------------------------------------


def background(root: Path, count: int = 16) -> Path:
    """Plain walls where the labels say there are digits: a dataset without any object is refused before."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for folder in ("images", "labels"):
            (root / folder / split).mkdir(parents=True)
        for index in range(count):
            grey = int(rng.integers(60, 200))
            Image.new("RGB", (96, 96), (grey, grey, grey)).save(root / "images" / split / f"{index}.png")
            (root / "labels" / split / f"{index}.txt").write_text("3 0.5 0.5 0.2 0.2")
    return write_yaml(root, tuple(map(str, range(10))))


def digits(place: Path, count: int, side: int | None = None, grey: bool = False) -> Path:
    """Images of the built-in dataset, resized or made grey."""
    source = build_dataset(place / "source", train=count, val=1).parent
    root = place / "made"
    for folder in ("images", "labels"):
        (root / folder / "train").mkdir(parents=True)
    for path in sorted((source / "images" / "train").iterdir()):
        image = Image.open(path)
        shown = image.convert("L") if grey else image
        shown = shown if side is None else shown.resize((side, side))
        shown.save(root / "images" / "train" / f"{path.stem}.png")
        labels = (source / "labels" / "train" / f"{path.stem}.txt").read_text()
        (root / "labels" / "train" / f"{path.stem}.txt").write_text(labels)
    path = write_yaml(root, tuple(map(str, range(10))))
    path.write_text(path.read_text().replace("val: images/val", "val: images/train"))
    return path


POOR: dict[str, tuple[Callable[[Path], Path], str]] = {
    "one image": (lambda place: digits(place, 1), "calibration: 1 training image to look at, fewer than 16"),
    "three images": (lambda place: digits(place, 3), "calibration: 3 training images to look at, fewer than 16"),
    "all background": (lambda place: background(place / "made"), "the network sees no object in these images"),
    "much larger": (lambda place: digits(place, 16, side=1000), ""),
    "much smaller": (lambda place: digits(place, 16, side=24), ""),
    "grey": (lambda place: digits(place, 16, grey=True), ""),
}


@pytest.mark.parametrize("kind", POOR)
def test_poor_calibration_images_are_said_and_survived(
    kind: str, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, remark = POOR[kind]
    seen: list[Cut] = []
    monkeypatch.setattr(
        "paretoprune.pruning.budget.budget.cut_to", lambda *given: seen.append(cut_to(*given)) or seen[-1]
    )
    out = tmp_path / "o.pt"
    command = [*SMALL, "--calibration-images", "16", "--keep-macs", "0.6"]
    assert run([*command, "--data", str(make(tmp_path)), "-o", str(out)]) == 0
    printed = capsys.readouterr()
    assert 0.59 < json.loads(printed.out)["macs_kept"] <= 0.6
    assert all(torch.isfinite(tensor).all() for tensor in stock_model(out).state_dict().values())
    assert all(np.isfinite(block.loss) for block in seen[0].blocks)
    said = [line for line in printed.err.splitlines() if "calibration: " in line and "so far" not in line]
    assert len(said) == bool(remark)
    assert not remark or remark in said[0]
