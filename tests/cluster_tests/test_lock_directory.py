from __future__ import annotations

import stat
import tempfile
from pathlib import Path

import pytest

from cluster.errors import LockDirectoryError
from cluster.lock_directory import DIRECTORY_VARIABLE, key_directory


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(DIRECTORY_VARIABLE, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_default_is_private_to_the_user(temporary: Path) -> None:
    folder = key_directory("cpu")
    assert folder.parent.parent == temporary
    assert [mode(folder), mode(folder.parent)] == [0o700, 0o700]
    folder.parent.chmod(0o777)
    assert key_directory("cpu") == folder
    assert mode(folder.parent) == 0o700


def test_the_variable_names_another_place(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = temporary / "mine"
    chosen.mkdir(mode=0o755)
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(chosen))
    assert key_directory("cpu") == chosen / "cpu"
    assert mode(chosen) == 0o755, "a directory the user named may serve other ends: its mode is the user's"


def test_a_planted_link_is_refused(temporary: Path) -> None:
    ours = key_directory("cpu").parent
    for folder in (ours / "cpu", ours):
        folder.rmdir()
    (temporary / "elsewhere").mkdir()
    ours.symlink_to(temporary / "elsewhere")
    with pytest.raises(LockDirectoryError, match=rf"must be your own directory, but .* is l.*set {DIRECTORY_VARIABLE}"):
        key_directory("cpu")


def test_a_file_in_the_way_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LockDirectoryError) as caught:
        key_directory("cpu", tmp_path / "file")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "file") in str(caught.value)


@pytest.mark.parametrize("key", ["../../up", "a/b", "..", "", "x" * 500, "GPU-0f\n"])
def test_no_key_climbs_out(tmp_path: Path, key: str) -> None:
    assert key_directory(key, tmp_path).parent == tmp_path
