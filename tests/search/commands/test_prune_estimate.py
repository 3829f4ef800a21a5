"""`paretoprune prune --dry-run`: what a plan brings, with nothing written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paretoprune.pruning.builtin import BASELINE, IMGSZ
from paretoprune.pruning.graph.geometry import NetworkGeometry
from paretoprune.pruning.latency.model import FEWEST_PLANS
from paretoprune.pruning.workbench import Workbench
from paretoprune.results.store.records import TrialRecord, TrialState
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.api import prune_estimate
from paretoprune.search.cli import run
from tests.search.fakes import make_config

Captured = pytest.CaptureFixture[str]

MODEL = str(BASELINE)
PLAN = ["prune", MODEL, "--ratio", "0.3", "--imgsz", str(IMGSZ), "--format", "json"]
LATENCY_KEYS = {
    "latency_ratio", "latency_ratio_ci95", "speedup", "latency_ms", "latency_ms_before", "latency_error_median",
    "latency_error_p95", "latency_plans",
}  # fmt: skip
BASELINE_MS = 8.0


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench(MODEL, imgsz=IMGSZ, importance="l2")


def true_ratio(geometry: NetworkGeometry, ratios: dict[str, float]) -> float:
    macs = geometry.macs(geometry.shares([{}, ratios])).sum(axis=1)
    return float(0.3 + 0.7 * macs[1] / macs[0])


def run_of(bench: Workbench, folder: Path, trials: int) -> Path:
    """A run of the built-in model on a machine that follows `true_ratio`."""
    run_folder = RunFolder(folder)
    folder.mkdir()
    make_config(**{"model.path": MODEL, "model.imgsz": IMGSZ}).save(run_folder.config)
    geometry = bench.geometry
    metrics: dict[str, Any] = {"map50_95": 0.9, "latency_ms": BASELINE_MS}
    run_folder.write_baseline({"metrics": metrics, "device": "cpu", "geometry": geometry.to_json()})
    random = np.random.default_rng(0)
    for number in range(trials):
        drawn = {group.name: float(random.uniform(0, 0.6)) for group in bench.table.groups}
        ratios = dict(bench.prune(drawn)[1].ratios)
        ratio = true_ratio(geometry, ratios)
        found = {**metrics, "latency_ratio": ratio, "speedup_ci95": [0.99 / ratio, 1.01 / ratio]}
        run_folder.store.append(
            TrialRecord(
                trial_id=f"t{number}", state=TrialState.COMPLETED, plan_hash=str(number), ratios=ratios, metrics=found,
                epochs=0, fidelity="refit", finished_at=float(number),
            )
        )  # fmt: skip
    return folder


def answer(capsys: Captured, *more: str) -> dict[str, Any]:
    assert run([*PLAN, "--dry-run", *more]) == 0
    row: dict[str, Any] = json.loads(capsys.readouterr().out)
    return row


def test_it_says_what_pruning_will_give_and_writes_nothing(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    row = answer(capsys)
    assert list(tmp_path.iterdir()) == []
    assert run([*PLAN, "-o", "out.pt"]) == 0
    written = json.loads(capsys.readouterr().out)
    for name in ("layers_cut", "params_m", "params_m_before", "gflops", "gflops_before"):
        assert row[name] == written[name]
    assert {row[name] for name in LATENCY_KEYS} == {None}
    assert "add --measure 12" in row["latency_source"]

    plan = json.loads(Path("out.plan.json").read_text())
    ratios, made_with = plan["ratios"], {"importance": "l2", "recovery": "none"}
    assert plan["made_with"] == made_with == {name: written[name] for name in made_with}
    widths = {layer: group["width"] / group["channels"] for group in row["widths"] for layer in group["layers"]}
    assert widths == pytest.approx({layer: 1 - ratio for layer, ratio in ratios.items()}, abs=1e-5)
    assert run(["prune", MODEL, "--plan", "out.plan.json", "--dry-run"]) == 0
    table = capsys.readouterr().out
    assert table.splitlines()[0].split() == ["layers_cut", str(row["layers_cut"])]
    assert "group" in table
    assert len(list(tmp_path.iterdir())) == 2


def test_a_run_foretells_latency_with_its_error(bench: Workbench, tmp_path: Path, capsys: Captured) -> None:
    folder = run_of(bench, tmp_path / "run", 25)
    row = answer(capsys, "--run", str(folder))
    plan = bench.prune({"*": 0.3})[1]
    true = true_ratio(bench.geometry, dict(plan.ratios))
    low, high = row["latency_ratio_ci95"]
    assert low < true < high
    assert row["latency_ratio"] == pytest.approx(true, rel=0.03)
    assert row["speedup"] == pytest.approx(1 / row["latency_ratio"])
    assert row["latency_ms"] == pytest.approx(BASELINE_MS * row["latency_ratio"])
    assert row["latency_ms_before"] == BASELINE_MS
    assert row["latency_plans"] == 25
    assert 0 < row["latency_error_median"] <= row["latency_error_p95"] < 0.05
    assert row["latency_source"] == f"25 plans of {folder}, on cpu"


def test_plans_measured_now_foretell_latency(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune_estimate, "SECONDS_PER_PLAN", 0.2)  # what it says is not judged here
    row = answer(capsys, "--measure", str(FEWEST_PLANS))
    assert row.keys() >= LATENCY_KEYS
    assert None not in {row[name] for name in LATENCY_KEYS if name != "latency_ratio_ci95"}
    assert 0 < row["latency_ratio_ci95"][0] < row["latency_ratio"] < row["latency_ratio_ci95"][1]
    assert row["latency_plans"] == FEWEST_PLANS
    assert row["latency_source"] == f"{FEWEST_PLANS} plans measured now at {IMGSZ} px, on cpu"


def test_measured_plans_lie_about_the_wanted_one() -> None:
    plans = prune_estimate.scattered({"a": 0.5, "b": 0.25}, 60)
    strengths = [plan["a"] for plan in plans]
    assert all(0 <= ratio < 1 for plan in plans for ratio in plan.values())
    assert min(strengths) < 0.1
    assert max(strengths) > 0.5
    assert np.corrcoef(strengths, [plan["b"] for plan in plans])[0, 1] < 0.95  # not on one line
    assert all(plan.keys() == {"a", "b"} for plan in plans)


def test_a_run_that_cannot_serve_says_why(bench: Workbench, tmp_path: Path, capsys: Captured) -> None:
    def refused(folder: Path, *more: str) -> str:
        assert run([*PLAN, "--dry-run", "--run", str(folder), *more]) == 1
        return capsys.readouterr().err

    young = run_of(bench, tmp_path / "young", 3)
    assert "needs at least 6 measured plans, but" in (text := refused(young))
    assert text.endswith("has 3; let it go on, or use --measure 12\n")
    assert f"measured at {IMGSZ} px, but --imgsz is 320; give --imgsz {IMGSZ}" in refused(young, "--imgsz", "320")
    content = RunFolder(young).read_baseline()
    content["geometry"]["groups"][0]["channels"] = 64
    RunFolder(young).write_baseline(content)
    assert "searched another model" in refused(young)
    del content["geometry"]
    RunFolder(young).write_baseline(content)
    assert "holds no geometry" in refused(young)
    assert "it does not exist" in refused(tmp_path / "none")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "give -o OUT.pt, or --dry-run"),
        (["--dry-run", "-o", "x.pt"], "--dry-run writes nothing: leave -o out"),
        (["-o", "x.pt", "--measure", "12"], "--measure and --run belong to --dry-run or --speedup"),
        (["--dry-run", "--measure", "12", "--run", "r"], "give either --measure or --run"),
        (["--dry-run", "--strategy", "mask"], "--dry-run knows the structural strategy only, got --strategy mask"),
    ],
)
def test_wrong_usage_is_said(arguments: list[str], line: str, capsys: Captured) -> None:
    assert run(["prune", "m.pt", "--ratio", "0.5", *arguments]) == 2
    assert line in capsys.readouterr().err


def test_a_plan_that_cuts_nothing_is_an_error(capsys: Captured) -> None:
    assert run(["prune", MODEL, "--ratio", "0.001", "--dry-run"]) == 1
    assert "rounds to no removed channel" in capsys.readouterr().err
