"""What `pip install .` puts on a machine: the package with everything it needs, and the command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

from paretoprune.pruning.builtin import BASELINE
from paretoprune.pruning.builtin.dataset import build_dataset

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("search", "pruning", "cluster", "results")


def files_below(folder: Path) -> set[str]:
    """Relative paths, those behind links to folders too; `Path.rglob` passes over them."""
    found = (Path(place, name) for place, _, names in os.walk(folder, followlinks=True) for name in names)
    return {path.relative_to(folder).as_posix() for path in found if "__pycache__" not in path.parts}


@pytest.mark.slow
def test_the_wheel_of_the_source_archive_holds_every_file_once_and_the_command(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in ("paretoprune", *PARTS):
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=True)
    (archived,) = tmp_path.glob("paretoprune-*.tar.gz")
    with tarfile.open(archived) as archive:
        assert [member.name for member in archive.getmembers() if member.issym()] == []
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "-w", str(tmp_path), str(archived)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("paretoprune-*.whl")
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
        (entry,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "paretoprune = paretoprune.search.cli:main" in packed.read(entry).decode()
    ours = {f"paretoprune/{name}" for name in files_below(ROOT / "paretoprune")}
    assert "paretoprune/py.typed" in ours  # whoever imports us has our types checked
    assert sorted(name for name in names if ".dist-info/" not in name) == sorted(ours)


def test_the_links_are_relative() -> None:
    """They hold wherever the checkout lies, and a wheel has folders in their place."""
    assert {part: str((ROOT / "paretoprune" / part).readlink()) for part in PARTS} == {
        part: f"../{part}" for part in PARTS
    }


@pytest.mark.slow
def test_a_search_runs_beside_files_that_are_called_as_our_folders_are(tmp_path: Path) -> None:
    """A script of the user's named `search.py` is what a driver and its workers would import before anything else."""
    data = build_dataset(tmp_path / "digits", train=24, val=12)
    stranger = "raise SystemExit('this file of the user must not be imported')\n"
    for name in ("search.py", "cluster.py"):
        (tmp_path / name).write_text(stranger)
    for name in ("results", "pruning", "base"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(stranger)
    settings = textwrap.dedent(
        """
        model: {imgsz: 160, device: cpu}
        search: {trials: 1, warm_start: false}
        trial: {epochs: 1}
        recover: {calibration_images: 8, importance: l2}
        latency: {max_seconds: 0.5}
        resources: {cpus_per_trial: 1}
        """
    )
    (tmp_path / "mine.yaml").write_text(settings)
    command = [sys.executable, "-m", "paretoprune", "search", BASELINE, data, "--config", "mine.yaml", "--run", "run"]
    given = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*map(str, command)], cwd=tmp_path, env=given, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert '"completed"' in (tmp_path / "run" / "trials.jsonl").read_text()
