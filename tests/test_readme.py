"""Every command of the README, docs/results.md and docs/commands.md runs on small stand-ins, or its test is named."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import yaml

from paretoprune.results.store.run_folder import RunFolder

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = (README, ROOT / "docs" / "results.md", ROOT / "docs" / "commands.md")  # the last uses runs of the first
MOST_WORDS = 900  # of the README, so that it is read; all else has a page in docs/

# Command -> the tests of what it does, or why there is none.
ELSEWHERE = {
    "make demo": "tests/test_readme.py",  # the last test
    "make test": "tests/test_conventions.py",  # this very run
    "pip install .": "tests/test_packaging.py",
    "tensorboard --logdir runs/my/tensorboard": "tests/search/sweep/test_real_sweep.py",
    "optuna-dashboard runs/my/study.journal": "tests/search/sweep/test_real_sweep.py",
    "paretoprune search my.pt my/data.yaml --config run.yaml --run /shared/runs/my --address auto": (
        "tests/cluster/test_joined.py"
    ),
    "paretoprune latency small.pt --against yolov8n.pt --runtime onnx --latency-target http://127.0.0.1:8765": (
        "tests/search/trial/test_agent_latency.py"
    ),
    "paretoprune launch run.yaml --on ray --run /shared/runs/my --address http://127.0.0.1:8265": (
        "tests/cluster/test_launch.py"
    ),
}
# What a command line is shortened to, so that minutes become seconds.
SMALLER = {
    "--epochs 1": "--epochs 0", "--epochs 3": "--epochs 0", "--epochs 20": "--epochs 1", "--epochs 30": "--epochs 1",
    "--epochs 50": "--epochs 1", "--trials 6": "--trials 2", "--trials 12": "--trials 2", "--trials 30": "--trials 2",
    "--trials 60": "--trials 2", "--trials 100": "--trials 3",
    "--imgsz 320": "--imgsz 160", "--imgsz 640": "--imgsz 160",
    "--classes person,car": "--classes 0,1", "--measure 12": "--measure 6", " --set resources.gpus_per_trial=0.5": "",
}  # fmt: skip
# What is added for the same reason; the settings of a search hold for what follows on its run.
ADDED = {
    "search": "--set recover.calibration_images=8 --set latency.max_seconds=0.5 --set space.granularity=block "
    "--set recover.importance=l2 --set search.warm_start=false --set resources.max_concurrent_trials=1",
    "prune": "--imgsz 96",
    "latency": "--imgsz 96 --max-seconds 1",
    "export": "--seconds 1",
    "launch": "--dry-run",
}


def commands(text: str) -> list[str]:
    """Lines of the shell blocks of a Markdown text in order, without the comments, each once."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", "".join(blocks)).splitlines()
    return list(dict.fromkeys(found for line in lines if (found := re.sub(r"(^|\s+)#.*", "", line).strip())))


def all_commands() -> list[str]:
    return commands("\n".join(page.read_text(encoding="utf-8") for page in PAGES))


def test_comments_and_continued_lines_are_understood() -> None:
    text = "```sh\na b  # c\n\n# d\ne \\\n  f\n```\n```python\ng\n```\n```sh\na b\n```\n"
    assert commands(text) == ["a b", "e f"]


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").split()) <= MOST_WORDS


def test_no_command_is_left_out() -> None:
    found = all_commands()
    assert len(found) > 15
    assert [line for line in found if not line.startswith("paretoprune ") and line not in ELSEWHERE] == []
    assert set(ELSEWHERE) <= set(found), "the table names what the pages no longer have"
    assert [path for path in ELSEWHERE.values() if not (ROOT / path).is_file()] == []


def test_the_make_targets_are_there() -> None:
    for line in (line for line in all_commands() if line.startswith("make ")):
        done = subprocess.run([*line.split(), "-n"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with small files under the names that the pages use."""
    from paretoprune.pruning.builtin import BASELINE
    from paretoprune.pruning.builtin.dataset import build_dataset

    data = build_dataset(tmp_path / "my", train=32, val=16)
    described = {**yaml.safe_load(data.read_text()), "path": str(data.parent)}
    for name in ("bccd/data.yaml", "voc/data.yaml", "coco8.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(yaml.safe_dump(described))
    for name in ("my.pt", "my-larger.pt", "yolov8n.pt", "bccd_yolov8n.pt", "voc_yolov8n.pt"):
        shutil.copyfile(BASELINE, tmp_path / name)
    settings = {"model": {"path": str(tmp_path / "my.pt")}, "data": {"path": str(data)}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shortened(line: str, folder: Path) -> list[str]:
    """The arguments to run `line` with; a trial or pick that a page names becomes one that there is."""
    for given, smaller in SMALLER.items():
        line = re.sub(rf"{given}(?!\d)", smaller, line)
    line = line.replace("/shared/runs/my", str(folder / "runs" / "my"))
    words = [*shlex.split(line)[1:], *ADDED.get(line.split()[1], "").split()]
    named = re.search(r"runs/\w+", line)
    run = RunFolder(folder / named.group(0)) if named else None
    there = [record.trial_id for record in run.read_records()] if run and run.config.is_file() else []
    picks = [path.name for path in run.selected_root.glob("*")] if run else []
    replaced = (picks or there)[:1]
    return [re.sub(r"\bt\d{4}\b", replaced[0], word) if replaced else word for word in words]


@pytest.mark.slow
def test_every_command_runs(stand_ins: Path, ray_session: object, capsys: pytest.CaptureFixture[str]) -> None:
    from paretoprune.search.cli import run

    for line in all_commands():
        if line in ELSEWHERE:
            continue
        code = run(shortened(line, stand_ins))
        shown = capsys.readouterr()
        assert code == 0, f"{line}\n{shown.out}\n{shown.err}"
        assert shown.out.strip(), f"{line} printed nothing"


@pytest.mark.slow
def test_the_demo_does_the_whole_job(
    tmp_path: Path, ray_session: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from paretoprune.pruning.builtin.dataset import build_dataset
    from paretoprune.search.cli import run

    # Twenty epochs, all of its images and long timings take minutes; all else is the command as it stands
    monkeypatch.setattr("paretoprune.search.commands.demo.FULL_EPOCHS", 1)
    monkeypatch.setattr("paretoprune.search.commands.demo.LATENCY_SECONDS", 0.5)
    monkeypatch.setattr("paretoprune.pruning.builtin.dataset.build_dataset", partial(build_dataset, train=64, val=32))
    folder = RunFolder(tmp_path / "runs" / "demo")
    assert run(["demo", "--run", str(folder.path), "--trials", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = lines[next(number for number, line in enumerate(lines) if line.startswith("unpruned ")) :]
    finalists = [item.trial_id for item in folder.read_selected()]
    assert sorted(line.split()[0] for line in table[1 : 1 + len(finalists)]) == finalists  # the headline's pick first
    assert all(" times as fast, mAP50-95 " in line for line in table[1 : 1 + len(finalists)])
    assert f"report: {folder.report_html}" in table
    assert table[-3:] == [
        "  paretoprune search my.pt my/data.yaml --run runs/my",
        "  paretoprune finetune runs/my",
        "  paretoprune report runs/my",
    ]
    assert folder.report_html.is_file()
    assert len(folder.read_records()) == 2
