"""Shared by all rooms' tests: the assets, one Ray for the whole run, and a Python that cannot see this project."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from paretoprune.cluster.resources import ClusterInfo

ROOT = Path(__file__).resolve().parent.parent

# Before anything imports ultralytics or torch, here and in every process that a test starts.
for _name, _value in {
    "YOLO_AUTOINSTALL": "false",
    "YOLO_OFFLINE": "true",
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # as they come, workers give way to everything else: beside other tests for minutes
}.items():
    os.environ.setdefault(_name, _value)
# A real run on this machine, whose trials may hold a device for long, neither waits for tests nor makes them wait; the
# same holds between test processes that run side by side, each of which gets here with the first one's environment.
os.environ["PARETOPRUNE_LOCK_DIR"] = tempfile.mkdtemp(prefix="paretoprune-test-locks-")

StockPython = Callable[..., "subprocess.CompletedProcess[str]"]

# `-I` keeps the working directory and PYTHONPATH out, but an editable installation hooks itself into every interpreter
# of the environment; so the name is refused before any other finder is asked, and that is checked.
_PRELUDE = """
import sys
class _Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "paretoprune":
            raise ModuleNotFoundError(f"No module named {name!r} on a stock machine", name=name)
sys.meta_path.insert(0, _Refuse())
try:
    import paretoprune
except ModuleNotFoundError:
    pass
else:
    sys.exit("the project is visible to the stock interpreter")
"""


# Minutes each, the longest first.
LONGEST = (
    "test_readme.py", "test_faults.py", "test_joined.py", "test_strategies.py", "test_families.py", "test_real_run.py",
    "test_ray_connection.py", "test_other_tasks.py", "test_portability.py", "test_outputs.py", "test_prune_budget.py",
    "test_printed_commands.py", "test_sweep.py", "test_api.py", "test_ddp.py", "test_real_sweep.py",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs Ray. Side by side, long files come first: no process waits long for the last one."""
    for item in items:
        if "ray_session" in getattr(item, "fixturenames", ()):
            item.add_marker("ray")
    if "PYTEST_XDIST_WORKER" in os.environ:
        places = {name: place for place, name in enumerate(LONGEST)}
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: (places.get(item.path.name, len(LONGEST)), item.path not in slow))


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real models and datasets that are too big for the repository."""
    folder = Path(os.environ.get("PARETOPRUNE_ASSETS") or ROOT.parent / "shared" / "assets")
    if not folder.is_dir():
        pytest.skip(f"no real models and datasets: {folder} is no folder; set PARETOPRUNE_ASSETS to theirs")
    return folder


@pytest.fixture(scope="session")
def ray_session() -> Iterator[ClusterInfo]:
    """One local Ray for the whole test run: starting it takes ten seconds."""
    from paretoprune.cluster import ray_connection

    yield ray_connection.connect(num_cpus=max(2, len(os.sched_getaffinity(0))))
    ray_connection.shutdown()


@pytest.fixture
def small_builtin(monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in dataset has 16 images, looked at in 96 pixels, whatever is asked for: to see that lines run."""
    from paretoprune.pruning.builtin.dataset import build_dataset

    monkeypatch.setattr("paretoprune.pruning.builtin.IMGSZ", 96)
    monkeypatch.setattr(
        "paretoprune.pruning.builtin.dataset.build_dataset",
        lambda folder, **_: build_dataset(folder, train=8, val=8),
    )


@pytest.fixture
def stock_python(tmp_path: Path) -> StockPython:
    """Run a snippet as on a machine with the libraries but without this project: stock_python(code, *args).

    The snippet's arguments are sys.argv[1:]. Returns the finished process; a failure fails the test unless check=False.
    """

    def run(code: str, *args: object, check: bool = True, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        folder = tmp_path / "stock"
        folder.mkdir(exist_ok=True)
        script = folder / "snippet.py"
        script.write_text(_PRELUDE + textwrap.dedent(code), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-I", str(script), *map(str, args)],
            cwd=folder, capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip
        if check and done.returncode:
            pytest.fail(f"stock python ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return done

    return run
