"""Commands that are driven inside a real cluster through Ray's client port."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from paretoprune.results.store.run_folder import RunFolder
from tests.cluster.joining import ROOT, Nodes, drive, environment, nodes, start_driver

pytestmark = pytest.mark.slow

DRIVE = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it, and hands that on
from pathlib import Path
from paretoprune.cluster.launch.ray_client import drive
address, files, *command = sys.argv[1:]
def to(stream):
    return lambda text: (stream.write(text), stream.flush())
try:
    sys.exit(drive(address, tuple(command), Path(files), to(sys.stdout), to(sys.stderr)))
except ValueError as error:
    print("LINE", error)
"""
COUNTING = """
import signal, sys, time
from pathlib import Path
def stop(number, frame):
    print("stopped", file=sys.stderr)
    sys.exit(7)
signal.signal(signal.SIGINT, stop)
print(Path("note.txt").read_text())
end = Path(sys.argv[1])
Path(sys.argv[2]).touch()
while not end.exists():
    time.sleep(0.1)
print("x" * 2_500_000)
print("the end")
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    with nodes(2, 0, "client") as found:
        yield found


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "note.txt").write_text("it's here")
    (folder / "counting.py").write_text(COUNTING)
    return folder


def paretoprune(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "paretoprune", *map(str, arguments)],
        cwd=folder, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True, check=False, timeout=800,
    )  # fmt: skip


def wait_for(path: Path) -> None:
    end = time.monotonic() + 200
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_search_runs_inside_and_goes_on_there(cluster: Nodes, tmp_path: Path) -> None:
    from paretoprune.pruning.builtin import BASELINE
    from paretoprune.pruning.builtin.dataset import build_dataset

    data = build_dataset(tmp_path / "data", train=16, val=8)
    here = tmp_path / "here"
    here.mkdir()
    shutil.copyfile(BASELINE, here / "my.pt")
    entry, run = f"ray://127.0.0.1:{cluster.entry}", tmp_path / "runs" / "my"
    quick = ["--epochs", 0, "--imgsz", 96, "--set", "latency.max_seconds=0.5", "--set", "recover.calibration_images=4",
             "--set", "recover.importance=l2", "--set", "search.warm_start=false"]  # fmt: skip
    done = paretoprune(here, "search", "my.pt", data, "--run", run, "--trials", 1, *quick, "--address", entry)
    assert done.returncode == 0, done.stderr
    assert "t0000" in done.stdout
    assert "1/1 trials" in done.stderr
    assert "1 nodes are ready" in done.stderr
    more = paretoprune(here, "resume", run, "--trials", 2, "--address", entry)
    assert more.returncode == 0, more.stderr
    assert [record.state.value for record in RunFolder(run).read_records()] == ["completed"] * 2
    wrong = paretoprune(here, "resume", tmp_path / "none", "--address", entry)
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: ")
    assert len(wrong.stderr.splitlines()) == 1


def test_the_work_goes_on_without_its_onlooker_who_may_come_back(cluster: Nodes, files: Path, tmp_path: Path) -> None:
    end, begun = tmp_path / "end", tmp_path / "begun"
    given = (f"ray://127.0.0.1:{cluster.entry}", files, "counting.py", end, begun)
    gone = start_driver(DRIVE, *given)
    wait_for(begun)
    gone.kill()
    gone.communicate()
    begun.unlink()  # a second start would make it anew
    back = start_driver(DRIVE, *given)
    end.touch()
    out, err = back.communicate(timeout=300)
    assert back.returncode == 0, err
    assert out.splitlines() == ["it's here", "x" * 2_500_000, "the end"]
    assert "this command is under way on the cluster" in err
    assert not begun.exists()


def test_an_interrupt_is_handed_on(cluster: Nodes, files: Path, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    address = f"ray://127.0.0.1:{cluster.entry}"
    process = start_driver(DRIVE, address, files, "counting.py", tmp_path / "never", begun)
    wait_for(begun)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 7, (out, err)
    assert err.splitlines()[-1] == "stopped"


def test_a_token_that_does_not_fit_is_one_line(cluster: Nodes, files: Path) -> None:
    done = drive(DRIVE, f"ray://127.0.0.1:{cluster.entry}", files, "counting.py", RAY_AUTH_TOKEN="6" * 32)
    (line,) = done.stdout.splitlines()
    assert line.startswith("LINE Ray must be reachable at ray://")
    assert "`ray get-auth-token` on its head node" in line
    assert "6" * 32 not in line
