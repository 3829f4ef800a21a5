"""A real sweep: Ray, real pruning, refit, fine-tuning, validation and latency, on the built-in model and dataset."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml

from paretoprune.results.store.accuracy import trade_off_text
from paretoprune.results.store.records import TrialState
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.cli import run
from paretoprune.search.commands.demo import closing_lines
from paretoprune.search.config.run_config import build_config, nest
from paretoprune.search.finalists.finetune_picks import choose_picks, promote
from paretoprune.search.sweep.preflight import prepare
from paretoprune.search.sweep.sweep import run_sweep

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a test split: what neither training nor the choice of picks has looked at; here, the first images again."""
    from paretoprune.pruning.builtin.dataset import build_dataset

    data = build_dataset(tmp_path_factory.mktemp("data") / "digits", train=48, val=24)
    described = yaml.safe_load(data.read_text())
    listed = sorted((data.parent / "images" / "train").glob("*.jpg"))[:20]
    (data.parent / "test.txt").write_text("".join(f"{path}\n" for path in listed))
    path = data.with_name("with_test.yaml")
    path.write_text(yaml.safe_dump({**described, "path": str(data.parent), "test": "test.txt"}))
    return path


@pytest.fixture(scope="module")
def real_run(dataset: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: object) -> RunFolder:
    """Three trials of one epoch, two blocks' worth of layers chosen by pattern, and one pick fine-tuned."""
    from paretoprune.pruning.builtin import BASELINE, IMGSZ

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
    blocks = [{layer.split(".")[1] for layer in record.ratios} for record in real_run.read_records()]
    assert max(map(len, blocks)) > 3  # the input's size takes most of a cut, so the widths of a few blocks are enough


def test_checkpoints_have_the_planned_widths(real_run: RunFolder) -> None:
    from paretoprune.pruning.yolo.loading import load_model

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
    assert {name: split["images"] for name, split in baseline["identity"]["dataset"]["splits"].items()} == {
        "train": 48, "val": 24, "test": 20,
    }  # fmt: skip
    assert {group["name"] for group in baseline["groups"]} <= {row["layer"] for row in baseline["layers"]}
    for group in baseline["groups"]:  # the sampler's estimate: nothing at the full width, more and more below
        losses = [loss for _, loss in sorted(group["losses"].items(), key=lambda item: -int(item[0]))]
        assert (losses[0], losses) == (0.0, sorted(losses))
    assert {row["name"] for row in baseline["branches"]} == set(baseline["geometry"]["branches"])
    assert all(row["loss"] >= 0 for row in baseline["branches"])


def test_pick_is_never_worse_than_its_trial_and_measured_beside_the_baseline(real_run: RunFolder) -> None:
    (selected,) = real_run.read_selected()
    assert selected.after["map50_95"] >= selected.before["map50_95"] - 1e-3
    assert selected.baseline["latency_measured_ms"] > 0
    lines = closing_lines(real_run, [selected], real_run.report_html)
    assert lines[0].split()[0] == "network"
    assert lines[1].startswith("unpruned")
    assert lines[2].startswith(selected.trial_id)
    assert trade_off_text(selected.after, selected.baseline) in lines[2]
    assert "  paretoprune finetune runs/my" in lines


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


def test_finished_networks_are_also_judged_on_the_test_split(real_run: RunFolder, dataset: Path) -> None:
    from paretoprune.pruning.builtin import IMGSZ
    from paretoprune.pruning.evaluation.evaluator import evaluate
    from paretoprune.pruning.yolo.loading import load_model
    from paretoprune.results.report.report import write_report

    (selected,), (native,) = real_run.read_selected(), real_run.read_natives()
    sizes = {record.trial_id: record.imgsz for record in real_run.read_records()}
    for figures, checkpoint, imgsz in (
        (selected.after, real_run.selected_checkpoint(selected.trial_id), sizes[selected.trial_id] or IMGSZ),
        (native.after, real_run.native_dir(native.name) / "best.pt", IMGSZ),
    ):
        alone = evaluate(load_model(checkpoint), str(dataset), imgsz, "cpu", split="test")
        assert figures["test_map50_95"] == pytest.approx(alone["map50_95"], abs=1e-6)
        assert figures["test_map50_95"] != figures["map50_95"]
        low, high = figures["test_map50_95_change_ci95"]
        assert low <= figures["test_map50_95"] - selected.baseline["test_map50_95"] <= high
    page = write_report(real_run.path).read_text(encoding="utf-8")
    assert "test split</th>" in page
    for figures in (selected.baseline, selected.after, native.after):
        assert f'<td class="n">{figures["test_map50_95"]:.3f}</td>' in page


def test_tensorboard_reads_what_a_run_wrote(real_run: RunFolder) -> None:
    reading = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed: only tensorboardX's own reading of its files is tested (test_loggers.py)",
    )
    for record in real_run.read_records():
        events = reading.EventAccumulator(str(real_run.path / "tensorboard" / record.trial_id))
        events.Reload()
        (shown,) = events.Scalars("trial/map50_95")
        assert shown.value == pytest.approx(record.metrics["map50_95"])


def test_the_study_opens_as_optuna_dashboard_opens_it(real_run: RunFolder) -> None:
    import optuna
    from optuna.storages.journal import JournalFileBackend

    storage = optuna.storages.JournalStorage(JournalFileBackend(str(real_run.study)))
    (summary,) = optuna.get_all_study_summaries(storage)
    study = optuna.load_study(study_name=summary.study_name, storage=storage)
    ended = [trial for trial in study.trials if trial.state is optuna.trial.TrialState.COMPLETE]
    others = (*real_run.read_records(), *real_run.read_free_moves())
    known = [real_run.read_baseline()["metrics"], *(record.metrics for record in others)]
    figures = sorted((metrics["map50_95"], metrics["latency_ms"]) for metrics in known)
    assert sorted(tuple(trial.values) for trial in ended) == [pytest.approx(pair) for pair in figures]


def test_optuna_dashboard_serves_the_study(real_run: RunFolder) -> None:
    pytest.importorskip("optuna_dashboard", reason="optuna-dashboard is not installed: its server was not started")
    port = free_port()
    command = [str(Path(sys.executable).with_name("optuna-dashboard")), str(real_run.study), "--port", str(port)]
    with subprocess.Popen(command) as server:
        try:
            answer = asked_until_it_answers(f"http://127.0.0.1:{port}/api/studies")
        finally:
            server.terminate()
    assert len(json.loads(answer)["study_summaries"]) == 1


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def asked_until_it_answers(url: str, seconds: float = 60.0) -> bytes:
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                content: bytes = answer.read()
                return content
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


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


@pytest.fixture(scope="module")
def wide_run(dataset: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: object) -> RunFolder:
    """A run at 96 x 160 with one smaller rectangle: two trials without an epoch, their faster one and a free move
    fine-tuned, and then a third trial by another driver."""
    from paretoprune.pruning.builtin import BASELINE

    path = tmp_path_factory.mktemp("runs") / "wide"
    settings = ("recover.calibration_images=16", "latency.max_seconds=0.3", "space.imgsz=[[64, 128]]")
    words = ["search", str(BASELINE), str(dataset), "--imgsz", "96,160", "--trials", "2", "--epochs", "0"]
    assert run([*words, *(word for setting in settings for word in ("--set", setting)), "--run", str(path)]) == 0
    assert run(["finetune", str(path), "--pick", "fastest", "--free-moves", "--epochs", "1"]) == 0
    assert run(["resume", str(path), "--trials", "3"]) == 0
    return RunFolder(path)


def test_a_rectangle_is_the_size_of_everything_in_a_run(wide_run: RunFolder, dataset: Path) -> None:
    import torch
    from ultralytics import YOLO

    from paretoprune.pruning.evaluation.evaluator import evaluate
    from paretoprune.pruning.yolo.loading import load_model, model_stats

    sizes = {(96, 160), (64, 128)}
    assert wide_run.read_baseline()["imgsz"] == (96, 160)
    assert yaml.safe_load(wide_run.config.read_text())["space"]["imgsz"] == [[96, 160], [64, 128]]
    records = wide_run.read_records()
    assert len(records) == 3
    assert {record.imgsz or (96, 160) for record in records} <= sizes
    for record in records:
        size = record.imgsz or (96, 160)
        network = load_model(wide_run.trial_checkpoint(record.trial_id))
        assert network.args["imgsz"] == list(size)
        assert record.metrics["latency_conditions"]["imgsz"] == list(size)
        assert record.metrics["gflops"] == pytest.approx(model_stats(network, size).gflops)
        again = evaluate(network, str(dataset), size, "cpu")
        assert record.metrics["map50_95"] == pytest.approx(again["map50_95"], abs=5e-3)
    (move,), (tuned,), (pick,) = wide_run.read_free_moves(), wide_run.read_tuned_moves(), wide_run.read_selected()
    assert (move.trial_id, move.imgsz, tuned.name) == ("unpruned@64,128", (64, 128), "unpruned@64,128")
    size = next(record.imgsz for record in records if record.trial_id == pick.trial_id) or (96, 160)
    best = YOLO(wide_run.selected_checkpoint(pick.trial_id))
    seen = []
    best.model.model[0].register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape[2:])))
    best.predict(torch.zeros(1, 3, *size), verbose=False, device="cpu")
    best.predict([str(next((dataset.parent / "images").rglob("*.jpg")))], rect=False, verbose=False, device="cpu")
    assert set(seen) == {size}


def test_front_and_report_show_a_rectangle_as_height_and_width(
    wide_run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["front", str(wide_run.path), "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["imgsz"] for row in rows if row["kind"] == "free move"] == [[64, 128]]
    for form, cell in (("csv", '"64,128"'), ("table", " 64,128 ")):
        assert run(["front", str(wide_run.path), "--format", form]) == 0
        assert cell in capsys.readouterr().out
    assert run(["report", str(wide_run.path)]) == 0
    assert "96,160 px" in wide_run.report_html.read_text(encoding="utf-8")
    capsys.readouterr()
    assert run(["search", "m.pt", "d.yaml", "--imgsz", "100,160"]) == 2
    assert "the image size must be a multiple of 32, but got 100,160: use 128,160" in capsys.readouterr().err
