"""The public functions, run as a person would from a script; the search itself in the tests of docs/python.md."""

from __future__ import annotations

import inspect
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ray import cloudpickle
from ultralytics import YOLO

import paretoprune as pp
from paretoprune.pruning.builtin import BASELINE, IMGSZ
from paretoprune.pruning.builtin.dataset import build_dataset
from paretoprune.search.cli import COMMANDS, run
from paretoprune.search.config.run_config import known_keys
from paretoprune.search.errors import InterruptedRunError
from paretoprune.search.sweep.sweep import SweepOutcome
from tests.search.fakes import make_prepared

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "ray", "ultralytics", "pandas", "optuna", "plotly", "matplotlib", "numpy", "pydantic"}


def test_an_import_loads_nothing_heavy() -> None:
    code = "import json, sys, paretoprune as pp; dir(pp); print(json.dumps([callable(pp.search), *sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    can_search, *modules = json.loads(done.stdout)
    assert can_search
    assert {name.partition(".")[0] for name in modules} & HEAVY == set()


def test_the_package_search_is_a_function_too() -> None:
    import paretoprune.search.errors
    from paretoprune.search.api.runs import search

    shown, own = (list(inspect.signature(each).parameters) for each in (pp.search, search))
    assert shown == own
    assert pickle.loads(cloudpickle.dumps(pp.search)) is pp.search
    assert issubclass(paretoprune.search.errors.SearchError, ValueError)
    with pytest.raises(ValueError, match=r"there is no file nothing.pt"):
        pp.search("nothing.pt", "data.yaml")


def options_of(name: str) -> set[str]:
    """What the command takes: the parameters' names."""
    (command,) = (each for each in COMMANDS if each.name == name)
    return {str(parameter.name) for parameter in command.params} - {"form"}


def test_functions_take_what_the_commands_take() -> None:
    from paretoprune.search.api.models import PruneJob
    from paretoprune.search.api.runs import OPTIONS

    assert options_of("search") - {"file", "settings", "run", "model", "data"} == set(OPTIONS)
    assert {key for keys in OPTIONS.values() for key in keys} <= set(known_keys())
    assert options_of("prune") - {"output", "dry_run"} == set(PruneJob.__dataclass_fields__)
    assert options_of("latency") - {"runtimes"} == set(inspect.signature(pp.latency).parameters) - {"runtime"}
    assert options_of("export") - {"target"} == set(inspect.signature(pp.export).parameters) - {"format"}


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, "give exactly one of `ratio`"),
        ({"ratio": 0.3, "keep_macs": 0.5}, "give exactly one of `ratio`"),
        ({"ratio": 1.5}, r"must lie in \[0, 1\).*got 1.5"),
        ({"ratio": 0.3, "recover": "refit"}, "looks at images: give `data`"),
        ({"ratio": 0.3, "measure": 12}, "`measure` and `run` are for `speedup`"),
        ({"keep_macs": 2.0, "data": "d"}, r"`keep_macs` is the share that stays, in \(0, 1\], got 2"),
        ({"ratio": 0.3, "rounding": 8}, "but got `rounding`"),
        ({"ratio": 0.3, "strategy": "magic"}, "magic"),
    ],
)
def test_what_cannot_work_is_a_value_error_of_one_line(options: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line) as caught:
        pp.prune(BASELINE, **options)
    assert isinstance(caught.value, pp.UserError)
    assert "\n" not in str(caught.value)


def test_arguments_of_runs_are_checked_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a search takes classes, trials, .*but got `trail`"):
        pp.search(BASELINE, tmp_path, trail=3)
    with pytest.raises(ValueError, match=r"unknown setting `trial.epoch`; the nearest known one is `trial.epochs`"):
        pp.search(BASELINE, tmp_path, settings={"trial.epoch": 3})
    with pytest.raises(ValueError, match=r"must be a run folder, but it holds no config.yaml"):
        pp.Run(tmp_path)


def test_a_script_does_not_go_on_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = make_prepared(tmp_path / "run", **{"search.trials": 3})
    prepared.folder.path.mkdir()
    prepared.config.save(prepared.folder.config)
    ended = SweepOutcome(finished=1, failed=0, total=3, interrupted=True)
    monkeypatch.setattr("paretoprune.search.api.runs.prepare", lambda *_, **__: prepared)
    monkeypatch.setattr("paretoprune.search.sweep.sweep.run_sweep", lambda given: ended)
    with pytest.raises(InterruptedRunError, match=r"after 1 of 3 trials, .* resume with Run\('.*run'\).resume\(\)"):
        pp.search(BASELINE, tmp_path / "data.yaml", run=tmp_path / "run")


def test_pruned_and_saved_it_is_what_the_command_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In stock Ultralytics the file computes what the network in memory does, and the command's file the same."""
    pruned = pp.prune(BASELINE, ratio=0.5, imgsz=IMGSZ)
    path = pruned.save(tmp_path / "new" / "small.pt")
    assert run(["prune", str(BASELINE), "--ratio", "0.5", "--imgsz", str(IMGSZ), "-o", str(tmp_path / "c.pt")]) == 0
    images = torch.rand(2, 3, IMGSZ, IMGSZ)
    answers = [YOLO(file).model.float().eval()(images)[0] for file in (path, tmp_path / "c.pt")]
    with torch.no_grad():
        own = pruned.model(images)[0]
    assert torch.allclose(answers[0], own, atol=1e-5)
    assert torch.equal(answers[0], answers[1])
    assert json.loads((tmp_path / "new" / "small.plan.json").read_text()) == json.loads(
        (tmp_path / "c.plan.json").read_text()
    )
    weights = sum(parameter.numel() for parameter in pruned.model.parameters())
    assert pruned.summary()["params_m"] == pytest.approx(weights / 1e6, rel=1e-2)
    again = pp.prune(BASELINE, plan=pruned.plan, imgsz=IMGSZ)
    assert again.plan.kept == pruned.plan.kept
    with pytest.raises(ValueError, match=r"must name a .pt file"):
        pruned.save(tmp_path / "small.onnx")


def test_progress_goes_to_the_function(capsys: pytest.CaptureFixture[str]) -> None:
    from paretoprune.base.messages import heard_by, note

    heard: list[str] = []
    with heard_by(heard.append):
        note("done")
    note("afterwards")
    assert heard == ["done"]
    assert capsys.readouterr().err.endswith("afterwards\n")


def test_layers_and_latency(tmp_path: Path) -> None:
    frame = pp.layers(BASELINE)
    assert list(frame.columns) == ["layer", "block", "group", "out_channels", "prunable", "reason"]
    convolutions = [each for each in YOLO(BASELINE).model.modules() if isinstance(each, torch.nn.Conv2d)]
    assert len(frame) == len(convolutions)
    found = pp.latency(BASELINE, imgsz=IMGSZ, max_seconds=1.0)
    low, high = found.speedup_ci95
    assert low <= found.speedup <= high
    assert 0.5 < found.speedup < 2  # beside itself; a 95 % interval may leave 1 out


# ---- every line of docs/python.md, and the notebook

SMALLER = {
    "imgsz=320": f"imgsz={IMGSZ}", "trials=30": "trials=2, epochs=0", "trials=40": "trials=3", "epochs=50": "epochs=1",
    'settings={"space.round_to": 16': 'settings={"space.round_to": 16, "recover.calibration_images": 8, '
    '"latency.max_seconds": 0.5, "recover.importance": "l2", '
    '"search.warm_start": False, "resources.max_concurrent_trials": 1',
    "max_drop=0.02": "max_drop=1.0", 'data="data.yaml"': 'data="data.yaml", calibration_images=8',
    f'against="my.pt", imgsz={IMGSZ}': f'against="my.pt", imgsz={IMGSZ}, max_seconds=1.0',
    "pp.report(": 'shutil.copytree("runs/my", "runs/other"); pp.report(',
    f'"onnx", imgsz={IMGSZ}': f'"onnx", imgsz={IMGSZ}, seconds=1.0',
}  # fmt: skip


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    data = build_dataset(tmp_path / "digits", train=32, val=16)
    described = {**yaml.safe_load(data.read_text()), "path": str(data.parent)}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(described))
    shutil.copyfile(BASELINE, tmp_path / "my.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_every_line_of_the_page_runs(stand_ins: Path, ray_session: object, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    code = "".join(re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE))
    for given, smaller in SMALLER.items():
        assert given in code, given
        code = code.replace(given, smaller)
    variables: dict[str, Any] = {"shutil": shutil}
    exec(compile(code, "docs/python.md", "exec"), variables)
    assert len(variables["run"].trials()) == 3
    assert variables["frame"]["on_front"].any()
    assert "must lie in [0, 1)" in capsys.readouterr().out
    assert Path("runs/my/report.html").is_file()
    assert len(list(Path("runs/my/selected").iterdir())) == 1


@pytest.mark.slow
def test_the_notebook_runs(
    tmp_path: Path, ray_session: object, small_builtin: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cells in order, as a kernel would; what a kernel shows of a cell's last line is not looked at."""
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in notebook["cells"] if cell["cell_type"] == "code")
    monkeypatch.chdir(tmp_path)
    variables: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        exec(compile(cell, f"cell {number}", "exec"), variables)
    assert Path(variables["report"]).is_file()
    assert len(variables["figure"].axes[0].collections) >= 2
