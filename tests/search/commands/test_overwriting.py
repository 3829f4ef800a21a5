"""`-o` replaces nothing that is read, no file of a run and no folder: said as wrong usage, before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paretoprune.pruning.yolo.saving import save_checkpoint
from paretoprune.search.cli import run
from tests.pruning.tiny import tiny_model


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model, a plan, a run and what leads to them."""
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tiny_model(), tmp_path / "m.pt")
    (tmp_path / "m.plan.json").write_text('{"ratios": {"model.0": 0.5}}')
    (tmp_path / "soft.pt").symlink_to("m.pt")
    (tmp_path / "hard.pt").hardlink_to("m.pt")
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "other.sessions").mkdir()
    (tmp_path / "other.sessions" / "thesis.txt").touch()
    (tmp_path / "mine.sessions").mkdir()
    (tmp_path / "mine.sessions" / "session-1.pt").hardlink_to("m.pt")
    for name in ("config.yaml", "baseline.json", "trials.jsonl", "mine.pt", "trials/t0001/pruned.pt"):
        file = tmp_path / "run" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    for name in ("result.json", "best.pt"):
        file = tmp_path / "compared" / "strategies" / "mask" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (tmp_path / "compared" / "comparison.json").touch()
    (tmp_path / "job.yaml").write_text("model: {path: m.pt}\ndata: {path: /data.yaml}\n")
    return tmp_path


PRUNE = ["prune", "m.pt", "--plan", "m.plan.json"]
SEQUENTIAL = ["prune", "mine.sessions/session-1.pt", "--plan", "m.plan.json", "--strategy", "sequential"]
SLURM = ["launch", "job.yaml", "--on", "slurm", "--run", "/runs/my"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([*PRUNE, "-o", "m.pt"], "must not replace what is read, but m.pt is m.pt"),
        ([*PRUNE, "-o", "./folder.pt/../m.pt"], "must not replace what is read"),
        ([*PRUNE, "-o", "soft.pt"], "must not replace what is read, but soft.pt is m.pt"),
        ([*PRUNE, "-o", "hard.pt"], "must not replace what is read, but hard.pt is m.pt"),
        (["prune", "soft.pt", "--plan", "m.plan.json", "-o", "m.pt"], "must not replace what is read"),
        (["prune", "hard.pt", "--ratio", "0.5", "-o", "soft.pt"], "must not replace what is read"),
        (["prune", "soft.pt", "--plan", "m.plan.json", "-o", "run/../m.pt"], "must not replace what is read"),
        (
            ["prune", "soft.pt", "--plan", "m.plan.json", "-o", "m.pt"],
            "must not replace what is read, but m.pt is soft",
        ),
        (["prune", "yolov8n.pt", "--plan", "m.plan.json", "-o", "m.pt"], "m.plan.json is m.plan.json"),
        ([*PRUNE, "-o", "folder.pt"], "must name a file, but folder.pt is a folder"),
        ([*PRUNE, "-o", "job.yaml/out.pt"], "must name a file in a folder, but"),
        ([*PRUNE, "-o", "run/trials/t0001/pruned.pt"], "a run's own file, but run/trials/t0001/pruned.pt is of the"),
        ([*PRUNE, "-o", "run/trials/t0002/pruned.pt"], "a run's own file"),
        ([*PRUNE, "-o", "run/selected/t0001/best.pt"], "a run's own file"),
        ([*PRUNE, "-o", "run/mine.pt"], "a run's own file"),
        ([*PRUNE, "-o", "compared/strategies/mask/best.pt"], "a run's own file"),
        (
            [*PRUNE, "-o", "other.pt", "--strategy", "sequential"],
            "makes the folder other.sessions anew, but it holds th",
        ),
        ([*SEQUENTIAL, "-o", "mine.pt"], "makes the folder mine.sessions anew, but mine.sessions/session-1.pt is read"),
        ([*SLURM, "-o", "job.yaml"], "must not replace what is read, but job.yaml is job.yaml"),
        ([*SLURM, "-o", "m.pt"], "must not replace what is read, but m.pt is m.pt"),
        ([*SLURM, "-o", "folder.pt"], "must name a file, but folder.pt is a folder"),
        ([*SLURM, "-o", "run/config.yaml"], "a run's own file"),
        (["launch", "run.resolved.yaml", *SLURM[2:], "-o", "run.sh"], "what is read, but"),
    ],
)
def test_what_must_stay_is_not_replaced(
    words: list[str], line: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "run.resolved.yaml").write_bytes((place / "job.yaml").read_bytes())
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    assert run(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: -o ")
    assert line in printed.err
    assert printed.err.count("\n") == 1
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


def test_everything_else_may_be_written(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A new file, one that an earlier call left, and one beside a run's."""
    for name in ("out.pt", "out.pt", "new/out.pt", "run/trials/t0001/smaller.pt"):
        assert run([*PRUNE, "--imgsz", "64", "--round-to", "1", "-o", name, "--format", "json"]) == 0
        assert json.loads(capsys.readouterr().out)["checkpoint"] == name
