"""Folders that go with their process, however it ends."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from paretoprune.cluster.scratch import process_folder, remove_folder

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from paretoprune.cluster.scratch import process_folder
folder = process_folder("work-", [Path(sys.argv[2])])
(folder / "a").mkdir()
print(folder, flush=True)
sys.stdin.readline()
"""


def test_it_goes_with_a_killed_process_and_stays_with_a_living_one(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(ROOT), str(tmp_path)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    theirs = Path(holder.stdout.readline().strip())
    ours = process_folder("work-", [tmp_path])
    assert theirs.is_dir(), "its process lives"
    assert ours.stat().st_mode & 0o77 == 0
    holder.kill()
    holder.communicate()
    end = time.monotonic() + 20
    while theirs.exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    remove_folder(ours)
    assert not list(tmp_path.iterdir())


def test_the_next_one_clears_what_a_dead_one_left_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "work-dead" / "a").mkdir(parents=True)  # nobody holds it
    (tmp_path / "workshop").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").touch()
    (tmp_path / "work-link").symlink_to(tmp_path / "elsewhere")
    folder = process_folder("work-", [tmp_path / "missing", tmp_path])
    assert {path.name for path in tmp_path.iterdir()} == {folder.name, "workshop", "elsewhere", "work-link"}
    assert (tmp_path / "elsewhere" / "file").exists()
    remove_folder(folder)
