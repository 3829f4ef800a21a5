"""The command line: exit codes, one-line errors, data on stdout, and help that loads nothing heavy."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.cli import cli, run
from paretoprune.search.commands.output import as_table
from paretoprune.search.config.run_config import RunConfig
from paretoprune.search.errors import SearchError
from paretoprune.search.storage.request import TrialRequest
from paretoprune.search.sweep.sweep import make_state
from paretoprune.search.trial.trial import TrialSettings, run_trial
from tests.search.fakes import FakeTools, NoGate, make_prepared

ROOT = Path(__file__).resolve().parents[2]
HEAVY = (
    "torch",
    "ultralytics",
    "ray",
    "optuna",
    "pandas",
    "matplotlib",
    "plotly",
    "pydantic",
    "scipy",
    "sklearn",
    "numpy",
)
COMMANDS = (
    "demo layers prune search resume status front finetune report latency export compare agent launch config doctor"
).split()

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def finished_run(tmp_path: Path) -> Path:
    """A run of six finished trials over pretended networks, made without Ray."""
    prepared = make_prepared(tmp_path / "run", **{"search.trials": 6})
    prepared.folder.trials_dir.mkdir(parents=True)
    prepared.config.save(prepared.folder.config)
    metrics = {
        "map50_95": 0.6,
        "latency_ms": 20.0,
        "latency_ratio": 1.0,
        "params_m": 3.0,
        "gflops": 8.0,
        "size_mb": 12.0,
    }
    prepared.folder.write_baseline({"model": "m.pt", "data": "d.yaml", "imgsz": 640, "metrics": metrics, "layers": []})
    state = make_state(prepared, [])
    while (request := state.next()) is not None:
        settings = TrialSettings(0, True, 20.0)
        state.finish(run_trial(request, settings, FakeTools(), NoGate(), prepared.folder.trial_dir(request.trial_id)))
    state.close()
    return prepared.folder.path


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['paretoprune', '--help']\n"
        "import paretoprune.search.cli\n"
        "assert paretoprune.search.cli.run(['--help']) == 0\n"
        f"heavy = sorted(set(sys.modules) & set({HEAVY!r}))\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)


def test_every_command_is_registered_and_has_help(capsys: Captured) -> None:
    assert sorted(cli.commands) == sorted(COMMANDS)
    for command in COMMANDS:
        assert run([command, "--help"]) == 0
        assert cli.commands[command].help
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["search", "only-one.pt"], "Missing argument 'DATA'"),
        (["prune", "m.pt", "-o", "o.pt"], "give exactly one of --ratio, --plan, --keep-macs"),
        (["prune", "m.pt", "--ratio", "0.5", "-o", "o.onnx"], "-o must name a .pt file, got o.onnx"),
        (
            ["prune", "m.pt", "--ratio", "0.5", "--recover", "refit", "-o", "o.pt"],
            "--recover refit looks at images: give --data",
        ),
        (["front", "run", "--format", "xml"], "'xml' is not one of"),
        (["finetune", "run", "--pick", "1", "--trial", "t1"], "give --pick or --trial, not both"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments: list[str], line: str, capsys: Captured) -> None:
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert line in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["layers", "none.pt"], "the model must exist, but there is no file none.pt"),
        (["prune", "none.pt", "--ratio", "0.5", "-o", "o.pt"], "the model must exist"),
        (["prune", "m.pt", "--ratio", "1.0", "-o", "o.pt"], "a ratio must lie in [0, 1)"),
        (["prune", "m.pt", "--plan", "none.json", "-o", "o.pt"], "the plan none.json cannot be read"),
        (["latency", "none.pt"], "the model must exist"),
        (["export", "none.pt"], "the model must exist"),
        (["search", "none.pt", "data.yaml"], "the model must exist"),
        (["search", "yolov8n.pt", "no/data.yaml"], "dataset not found"),
        (
            ["search", "m.pt", "d.yaml", "--set", "space.max_ratio=1.0"],
            "`space.max_ratio`: input should be less than 1, got 1.0",
        ),
        (
            ["search", "m.pt", "d.yaml", "--set", "round_to=8"],
            "unknown setting `round_to`; the nearest known one is `space.round_to`",
        ),
        (["search", "m.pt", "d.yaml", "--trials", "0"], "`search.trials`: input should be greater than or equal to 1"),
        (["search", "m.pt", "d.yaml", "--config", "none.yaml"], "configuration none.yaml cannot be read"),
        (["resume", "none"], "none must be a run folder, but it does not exist"),
        (["status", "none"], "none must be a run folder"),
        (["front", "none"], "none must be a run folder"),
        (["finetune", "none"], "none must be a run folder"),
        (["report", "none"], "none must be a run folder"),
    ],
)
def test_failure_is_one_line_and_exit_code_1(
    arguments: list[str], line: str, capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert line in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_debug_anywhere_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match="must be a run folder"):
        run(["status", "none", "--debug"])
    with pytest.raises(ValueError, match="must be a run folder"):
        run(["--debug", "status", "none"])


def test_front_json_has_the_promised_keys_and_paths(finished_run: Path, capsys: Captured) -> None:
    assert run(["front", str(finished_run), "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows
    for row in rows:
        promised = {"trial_id", "map50_95", "latency_ms", "latency_ratio", "params_m", "gflops", "plan", "checkpoint"}
        assert promised <= set(row)
        assert Path(row["plan"]).is_file()
        assert Path(row["checkpoint"]).is_file()
    latencies = [row["latency_ms"] for row in rows]
    assert latencies == sorted(latencies, reverse=True)  # the most accurate first, and on a front that is the slowest


def test_front_csv_bounds_and_picks(finished_run: Path, capsys: Captured) -> None:
    assert run(["front", str(finished_run), "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    limit = rows[1]["latency_ms"]
    assert run(["front", str(finished_run), "--format", "csv", "--max-latency-ms", str(limit)]) == 0
    bounded = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["trial_id"] for row in bounded] == [row["trial_id"] for row in rows[1:]]
    assert run(["front", str(finished_run), "--pick", "1"]) == 0
    table = capsys.readouterr().out
    assert table.count("\n") == 2
    assert "chosen_as" in table


def test_status_in_every_format(finished_run: Path, capsys: Captured) -> None:
    assert run(["status", str(finished_run)]) == 0
    assert "6/6 done, 0 running, 0 left" in capsys.readouterr().out
    assert run(["status", str(finished_run), "--format", "json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["done"], row["total"], row["alive"], row["left"]) == (6, 6, False, 0)


def test_names_that_are_not_utf8_are_printed_as_they_are(finished_run: Path) -> None:
    """Bytes in, the same bytes out, in the table and in commands; JSON stays JSON."""
    named = os.fsencode(finished_run.parent) + b"/caf\xe9 run"
    os.rename(finished_run, named)
    command = [sys.executable, "-m", "paretoprune", "front", named, "--format"]
    table = subprocess.run([*command, "table"], cwd=ROOT, capture_output=True, check=True)
    assert named in table.stdout
    rows = json.loads(subprocess.run([*command, "json"], cwd=ROOT, capture_output=True, check=True).stdout)
    assert os.fsencode(rows[0]["plan"]).startswith(named)
    command = [sys.executable, "-m", "paretoprune", "report", named]
    report = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    assert report.stdout.strip() == named + b"/report.html"
    assert "caf\N{REPLACEMENT CHARACTER} run" in Path(os.fsdecode(report.stdout.strip())).read_text(encoding="utf-8")


def test_status_shows_unfinished_trials(finished_run: Path, capsys: Captured) -> None:
    TrialRequest(trial_id="t0099", ratios={}, provenance="gp").save(RunFolder(finished_run))
    assert run(["status", str(finished_run)]) == 0
    assert "unfinished t0099: waiting" in capsys.readouterr().out


def test_layers_json_on_a_real_model(assets: Path, capsys: Captured) -> None:
    assert run(["layers", str(assets / "weights" / "bccd_yolov8n.pt"), "--format", "json"]) == 0
    captured = capsys.readouterr()
    rows = json.loads(captured.out)
    assert {"layer", "block", "group", "out_channels", "prunable", "reason"} <= set(rows[0])
    assert all(row["reason"] for row in rows if not row["prunable"])
    layers = [row for row in rows if row["kind"] == "layer"]
    assert any(not row["prunable"] for row in layers)
    assert f"{sum(row['prunable'] for row in layers)} of {len(layers)} layers can lose channels, in" in captured.err
    assert captured.err.endswith(
        "% of the convolution weights\n10 of 10 branches can be removed whole\n3 classes: RBC, WBC, Platelets\n"
    )
    assert [row["layer"] for row in rows if row["kind"] == "branch"][:2] == ["model.2.m.0", "model.4.m.0"]


def test_prune_writes_the_network_and_its_plan(assets: Path, tmp_path: Path, capsys: Captured) -> None:
    model, out = assets / "weights" / "bccd_yolov8n.pt", tmp_path / "b.pt"
    assert run(["prune", str(model), "--ratio", "0.25", "-o", str(out), "--imgsz", "320", "--format", "json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["params_m"] < row["params_m_before"]
    plan = json.loads((tmp_path / "b.plan.json").read_text())
    assert {"schema_version", "hash", "ratios", "kept"} <= set(plan)
    again = tmp_path / "again.pt"
    assert (
        run(["prune", str(model), "--plan", str(tmp_path / "b.plan.json"), "-o", str(again), "--format", "json"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["params_m"] == row["params_m"]
    assert json.loads((tmp_path / "again.plan.json").read_text())["hash"] == plan["hash"]


def test_latency_json_on_a_real_pair(assets: Path, capsys: Captured) -> None:
    model = str(assets / "weights" / "bccd_yolov8n.pt")
    arguments = [
        "latency",
        model,
        "--against",
        model,
        "--imgsz",
        "64",
        "--max-seconds",
        "1",
        "--threads",
        "1",
        "--format",
        "json",
    ]
    assert run(arguments) == 0
    row = json.loads(capsys.readouterr().out)
    assert {"median_ms", "p90_ms", "iterations", "baseline_median_ms", "speedup", "speedup_ci95"} <= set(row)
    assert row["iterations"] > 0


def test_latency_of_whole_predictions(tmp_path: Path, capsys: Captured) -> None:
    pytest.importorskip("onnxruntime")
    from paretoprune.pruning.builtin import BASELINE
    from paretoprune.pruning.builtin.dataset import build_dataset

    data = build_dataset(tmp_path / "digits", train=1, val=4)
    bounds = ["--imgsz", "64", "--max-seconds", "0.3", "--threads", "1", "--format", "json"]
    ways = ["--span", "predict", "--data", str(data), "--streams", "2", "--runtime", "torch", "--runtime", "onnx"]
    assert run(["latency", str(BASELINE), "--against-imgsz", "96", *ways, *bounds]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["runtime"], row["span"], row["streams"], row["precision"]) for row in rows] == [
        ("torch", "predict", 2, "fp32"),
        ("onnx", "predict", 2, "fp32"),
    ]
    for row in rows:
        assert row["images"] == f"4 validation images of {data}"
        assert row["median_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert min(row["images_per_s"], row["baseline_images_per_s"]) > 0
        assert row["peak_memory_mb"] is None
    assert run(["latency", str(BASELINE), "--span", "predict", *bounds]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["images"] == "16 of random pixels, 1280x720"
    assert "hardly anything is found; give --data" in captured.err


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--data", "d.yaml"], "the images of --data are those that --span predict looks at"),
        (["--span", "predict", "--latency-target", "http://pi:1"], "are measured on this machine, not on an agent's"),
        (["--streams", "2", "--latency-target", "http://pi:1"], "are measured on this machine, not on an agent's"),
        (["--memory", "--latency-target", "http://pi:1"], "are measured on this machine, not on an agent's"),
    ],
)
def test_what_an_agent_does_not_measure_is_refused(options: list[str], line: str, capsys: Captured) -> None:
    from paretoprune.pruning.builtin import BASELINE

    assert run(["latency", str(BASELINE), *options]) == 2
    assert line in capsys.readouterr().err


@pytest.mark.slow
def test_latency_with_the_memory_of_each(capsys: Captured) -> None:
    from paretoprune.pruning.builtin import BASELINE

    bounds = ["--imgsz", "64", "--max-seconds", "0.3", "--threads", "1", "--format", "json"]
    assert run(["latency", str(BASELINE), "--memory", *bounds]) == 0
    row = json.loads(capsys.readouterr().out)
    if row["peak_memory_mb"] is None:
        pytest.skip("the kernel does not tell it")
    assert row["peak_memory_mb"] == row["baseline_peak_memory_mb"] > 100
    assert row["peak_device_memory_mb"] is None


def test_latency_by_several_runtimes(capsys: Captured) -> None:
    pytest.importorskip("onnxruntime")
    from paretoprune.pruning.builtin import BASELINE

    bounds = ["--imgsz", "64", "--max-seconds", "0.3", "--threads", "1", "--target-halfwidth", "1e-6"]
    assert run(["latency", str(BASELINE), "--runtime", "torch", "--runtime", "onnx", *bounds, "--format", "json"]) == 0
    captured = capsys.readouterr()
    rows = json.loads(captured.out)
    found = [(row["runtime"], row["precision"], row["threads"]) for row in rows]
    assert found == [("torch", "fp32", 1), ("onnx", "fp32", 1)]
    assert rows[1]["runtime_version"].startswith("onnxruntime ")
    assert [row["converged"] for row in rows] == [False, False]
    assert captured.err.count("the time was up with the speed-up known to") == 2


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--runtime", "abacus"], "the runtime must be one of torch, torch-cuda-graph, onnx, openvino, tensorrt"),
        (["--runtime", "torch", "--runtime", "tensorrt"], "tensorrt runs on a CUDA device"),
        (["--runtime", "onnx", "--half"], "half precision is not computed natively"),
    ],
)
def test_a_runtime_that_cannot_is_said_before_measuring(options: list[str], line: str, capsys: Captured) -> None:
    from paretoprune.pruning.builtin import BASELINE

    assert run(["latency", str(BASELINE), "--device", "cpu", *options]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert line in captured.err
    assert captured.out == ""


def test_table_aligns_numbers_right_and_shows_gaps() -> None:
    text = as_table([{"name": "a", "n": 1.5, "ok": True}, {"name": "bcd", "n": None, "ok": False}])
    assert text.splitlines() == ["name    n  ok", "a     1.5  yes", "bcd     -  no"]
    assert as_table([]) == "(none)"
    assert as_table([], empty="no trials") == "no trials"


@pytest.mark.parametrize(
    ("arguments", "recover", "trial", "finetune"),
    [
        ([], "refit", True, False),
        (["--recover", "refit+bn", "--distill"], "refit+bn", True, True),
        (["--no-distill", "--set", "finetune.distill=true"], "refit", False, True),
    ],
)
def test_search_switches_reach_the_configuration(
    arguments: list[str], recover: str, trial: bool, finetune: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paretoprune.search.api import runs

    seen: list[RunConfig] = []

    def stop_here(config: RunConfig, run: Path) -> None:
        seen.append(config)
        raise SearchError("seen")

    monkeypatch.setattr(runs, "prepare", stop_here)
    assert run(["search", "m.pt", "d.yaml", *arguments]) == 1
    assert (seen[0].recover.method, seen[0].trial.distill, seen[0].finetune.distill) == (recover, trial, finetune)


def test_a_run_by_a_criterion_that_was_dropped_is_still_read(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    from paretoprune.pruning.builtin import BASELINE
    from paretoprune.search.finalists import finetune_picks

    config = yaml.safe_load((finished_run / "config.yaml").read_text())
    config["recover"]["importance"] = "separability"
    config["model"]["path"], config["data"]["path"] = str(BASELINE), "coco8.yaml"
    (finished_run / "config.yaml").write_text(yaml.safe_dump(config))
    trials = finished_run / "trials.jsonl"
    records = [json.loads(line) for line in trials.read_text().splitlines()]
    for record in records:
        record["metrics"]["importance"] = "separability"
    trials.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    for command in ("report", "front", "status"):
        assert run([command, str(finished_run)]) == 0

    def stop_here(*given: object, **more: object) -> None:
        raise SearchError("the picks would be trained now")

    monkeypatch.setattr(finetune_picks, "promote", stop_here)
    assert run(["finetune", str(finished_run)]) == 1
    assert "the picks would be trained now" in capsys.readouterr().err
    assert run(["resume", str(finished_run), "--trials", "7"]) == 1
    assert re.search(r"`importance` must be one of .*got 'separability'; choose one of these", capsys.readouterr().err)


def test_finetune_switches_reach_the_picks(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from paretoprune.search.finalists import finetune_picks

    seen: list[RunConfig] = []

    def stop_here(folder: RunFolder, config: RunConfig, picks: object, **others: object) -> None:
        seen.append(config)
        raise SearchError("seen")

    monkeypatch.setattr(finetune_picks, "promote", stop_here)
    monkeypatch.setattr(
        "paretoprune.search.api.runs.check_teachable", lambda config: None
    )  # this run's model is pretended
    assert run(["finetune", str(finished_run), "--distill", "--epochs", "7"]) == 1
    assert (seen[0].finetune.distill, seen[0].finetune.epochs) == (True, 7)
    assert run(["finetune", str(finished_run)]) == 1
    assert (seen[1].finetune.distill, seen[1].finetune.epochs) == (False, 50)
