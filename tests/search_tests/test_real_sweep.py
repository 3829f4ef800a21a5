"""A real sweep: Ray, real pruning, refit, fine-tuning, validation and latency, on the built-in model and dataset."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from results.records import TrialState
from results.run_folder import RunFolder
from search.cli import run
from search.config import build_config, nest
from search.demo import closing_lines
from search.preflight import prepare
from search.promote import choose_picks, promote
from search.sweep import run_sweep

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pruning.builtin.dataset import build_dataset

    return build_dataset(tmp_path_factory.mktemp("data") / "digits", train=48, val=24)


@pytest.fixture(scope="module")
def real_run(dataset: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: object) -> RunFolder:
    """Three trials of one epoch, two blocks' worth of layers chosen by pattern, and one pick fine-tuned."""
    from pruning.builtin import BASELINE, IMGSZ

    settings = {
        "model.path": str(BASELINE), "model.imgsz": IMGSZ, "data.path": str(dataset), "search.trials": 3,
        "trial.epochs": 1, "recover.calibration_images": 16, "latency.max_seconds": 1.0, "finetune.epochs": 2,
        "space.exclude": ["model.0"], "space.max_ratio": 0.5,
    }  # fmt: skip
    prepared = prepare(build_config(nest(settings)), tmp_path_factory.mktemp("runs") / "real")
    outcome = run_sweep(prepared)
    assert (outcome.finished, outcome.failed) == (3, 0), [record.error for record in prepared.folder.read_records()]
    picks = choose_picks(prepared.folder, prepared.config.search.objectives, ["1"])
    assert promote(prepared.folder, prepared.config, picks, natives=[str(BASELINE)]).failed == {}
    return prepared.folder


def test_every_trial_is_complete_with_all_figures(real_run: RunFolder) -> None:
    for record in real_run.read_records():
        assert record.state is TrialState.COMPLETED
        assert (record.epochs, record.fidelity) == (1, "epochs")
        assert 0 <= record.metrics["map50_95_refit"] <= record.metrics["map50_95"] <= 1
        assert record.metrics["params_m"] < real_run.read_baseline()["metrics"]["params_m"]
        assert record.metrics["latency_ratio"] * record.metrics["speedup"] == pytest.approx(1)
        assert "model.0" not in record.ratios
        assert all(ratio <= 0.5 for ratio in record.ratios.values())
        assert len({layer.split(".")[1] for layer in record.ratios}) > 5  # several blocks lose channels


def test_checkpoints_have_the_planned_widths(real_run: RunFolder) -> None:
    from pruning.models import load_model

    layers = {row["layer"]: row["out_channels"] for row in real_run.read_baseline()["layers"]}
    for record in real_run.read_records():
        model = load_model(real_run.trial_checkpoint(record.trial_id))
        for name, ratio in record.ratios.items():
            module = model.get_submodule(name)
            conv = getattr(module, "conv", module)
            assert conv.out_channels == round(layers[name] * (1 - ratio)), name


def test_plans_say_what_was_kept(real_run: RunFolder) -> None:
    for record in real_run.read_records():
        plan = json.loads(real_run.trial_plan(record.trial_id).read_text())
        assert plan["hash"] == record.plan_hash
        assert plan["kept"]


def test_baseline_is_described_for_a_report(real_run: RunFolder) -> None:
    baseline = real_run.read_baseline()
    assert baseline["metrics"]["latency_ratio"] == 1.0
    assert baseline["environment"]["torch"]
    assert {group["name"] for group in baseline["groups"]} <= {row["layer"] for row in baseline["layers"]}


def test_pick_is_never_worse_than_its_trial_and_measured_beside_the_baseline(real_run: RunFolder) -> None:
    (selected,) = real_run.read_selected()
    assert selected.after["map50_95"] >= selected.before["map50_95"] - 1e-3
    assert selected.baseline["latency_measured_ms"] > 0
    lines = closing_lines(real_run, [selected], real_run.report_html)
    assert len(lines) == 3
    assert "speed-up" in lines[1]


def test_picks_native_and_baseline_are_judged_in_one_session(real_run: RunFolder) -> None:
    (selected,), (native,) = real_run.read_selected(), real_run.read_natives()
    session = json.loads(real_run.session.read_text())
    assert session["networks"] == ["baseline", selected.trial_id, f"native:{native.name}"]
    for after in (selected.after, native.after):
        low, high = after["map50_95_change_ci95"]
        assert low <= after["map50_95_change"] <= high
        assert after["map50_95_change"] == pytest.approx(after["map50_95"] - selected.baseline["map50_95"])
        assert after["speedup_ci95"][0] <= after["speedup"] <= after["speedup_ci95"][1]
    assert native.after["params_m"] == pytest.approx(selected.baseline["params_m"])
    assert real_run.read_baseline()["noise"]["map50_95_std"] > 0


def test_report_front_and_status_of_a_real_run(real_run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", str(real_run.path)]) == 0
    assert Path(capsys.readouterr().out.strip()).is_file()
    assert run(["front", str(real_run.path), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert run(["status", str(real_run.path)]) == 0
    assert "3/3 done" in capsys.readouterr().out


def test_trials_say_nothing_on_the_terminal_but_keep_a_log(real_run: RunFolder) -> None:
    for record in real_run.read_records():
        assert (real_run.trial_dir(record.trial_id) / "train.log").stat().st_size > 0
