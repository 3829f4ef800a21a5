from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from paretoprune.cluster import doctor
from paretoprune.cluster.lock_directory import DIRECTORY_VARIABLE
from paretoprune.cluster.resources import ClusterInfo

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_this_machine_is_fit(ray_session: ClusterInfo, tmp_path: Path) -> None:
    checks = list(doctor.examine(tmp_path / "runs" / "new"))
    assert [check for check in checks if not check.ok] == []
    assert len({check.name for check in checks}) == len(checks) == 11
    assert all(check.detail and not check.remedy for check in checks)
    (ray,) = (check for check in checks if check.name == "ray")
    assert ray.detail.endswith(f"{ray_session.cpus} CPUs, {ray_session.gpus} GPUs")


def test_a_stranger_under_our_name_is_named(tmp_path: Path) -> None:
    (tmp_path / "paretoprune.py").write_text("")
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}]; from paretoprune.cluster.doctor import *; "
        f"sys.path[:0] = [{str(tmp_path)!r}]; del sys.modules['paretoprune']; "
        "c = check_own_package(); print(c.ok, c.detail)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"False not this project's: paretoprune: {tmp_path / 'paretoprune.py'}\n"


def test_a_wrong_and_a_missing_version_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "thing-1.0.dist-info"
    folder.mkdir()
    needs = ["numpy>=900", "no-such-distribution", "click", "not-asked; extra == 'dev'", "old; python_version < '3'"]
    lines = ["Metadata-Version: 2.1", "Name: thing", "Version: 1.0", *(f"Requires-Dist: {need}" for need in needs)]
    (folder / "METADATA").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    check = doctor.check_packages("thing")
    numpy = doctor.metadata.version("numpy")
    assert (check.ok, check.detail) == (False, f"numpy {numpy} is not >=900; no-such-distribution is missing")
    assert check.remedy
    assert doctor.check_packages("no-such-distribution").detail == "no-such-distribution is not installed"


def test_too_little_space_is_said(tmp_path: Path) -> None:
    check = doctor.check_disk("disk", tmp_path / "not" / "there", 1e9)
    assert not check.ok
    assert check.detail.endswith(f"GB free at {tmp_path}, at least 1e+09 GB are needed")
    assert check.remedy == "free some space, or use another disk"


def test_an_unusable_lock_directory_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path / "file"))
    check = doctor.check_lock()
    assert not check.ok
    assert str(tmp_path / "file") in check.detail


def test_a_torchvision_that_does_not_fit_is_said() -> None:
    """What a processor-only torch beside the registry's torchvision says."""

    def broken(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        stderr = "Traceback ...\nRuntimeError: operator torchvision::nms does not exist\n"
        raise subprocess.CalledProcessError(1, command, "", stderr)

    (check,) = doctor.check_torch(broken)
    assert (check.ok, check.detail) == (False, "RuntimeError: operator torchvision::nms does not exist")
    assert "together" in check.remedy


def test_an_unreachable_ray_is_said(ray_session: ClusterInfo) -> None:
    (check,) = doctor.check_ray("nowhere")
    assert not check.ok
    assert check.remedy == "disconnect first"
