"""A real local Ray: what it listens on, what its workers run with, and the one line where there is none."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from paretoprune.cluster import ray_connection
from paretoprune.cluster.errors import ClusterError
from paretoprune.cluster.ray_patience import PATIENCE
from paretoprune.cluster.ray_place import TOKEN_VARIABLES
from paretoprune.cluster.resources import ClusterInfo

ROOT = Path(__file__).resolve().parents[2]
CONNECT = "from paretoprune.cluster.ray_connection import connect"


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh driver: a process talks to one Ray only, and the test run's own is taken."""
    paths = {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=os.environ | paths | environment
    )


def test_what_is_there(ray_session: ClusterInfo) -> None:
    assert [node.name for node in ray_session.nodes] == [socket.gethostname()]
    assert ray_session.cpus == max(2, len(os.sched_getaffinity(0)))
    assert ray_session.address == "local"


def test_a_second_call_answers_from_the_same_ray(ray_session: ClusterInfo) -> None:
    assert ray_connection.connect() == ray_session
    with pytest.raises(ClusterError, match="connected to local and was asked for auto; disconnect first"):
        ray_connection.connect("auto")


def test_a_command_line_of_any_bytes_names_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray puts it into a message of UTF-8, and fails where a path of it is not."""
    import ray._private.utils

    monkeypatch.setattr(ray._private.utils, "get_entrypoint_name", lambda: os.fsdecode(b"search caf\xe9.pt"))
    with ray_connection._named_in_utf8():
        assert ray._private.utils.get_entrypoint_name() == "search caf\N{REPLACEMENT CHARACTER}.pt"
    assert ray._private.utils.get_entrypoint_name() == os.fsdecode(b"search caf\xe9.pt")


def test_nothing_listens_outside_the_loopback_interface(ray_session: ClusterInfo) -> None:
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening = set()
    for process in family:
        try:
            found = process.net_connections(kind="inet")
        except psutil.NoSuchProcess:
            continue
        listening |= {each.laddr.ip.removeprefix("::ffff:") for each in found if each.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}


def test_a_worker_runs_as_told_and_finds_the_package(ray_session: ClusterInfo) -> None:
    import ray

    def look() -> dict[str, str | None]:
        import os

        import paretoprune

        names = ("YOLO_AUTOINSTALL", "YOLO_OFFLINE", "RAY_AUTH_MODE")
        return {name: os.environ.get(name) for name in names} | {"paretoprune": paretoprune.__file__}

    seen = ray.get(ray.remote(look).remote())
    assert seen == {
        "YOLO_AUTOINSTALL": "false",
        "YOLO_OFFLINE": "true",
        "RAY_AUTH_MODE": "token",
        "paretoprune": str(ROOT / "paretoprune" / "__init__.py"),
    }


def test_nobody_answers() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # bound, not listening: refuses
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
        code = f"{CONNECT}\ntry: connect({address!r})\nexcept ValueError as e: print(e)"
        done = run_python(code)
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"Ray must be reachable at {address}, but ")
    assert "refused" in line
    assert line.endswith("`ray start --head`, correct the address, or leave it out to use this machine alone")
    assert done.stderr == ""


@pytest.mark.parametrize("address", ["head", "http://head:8265", "head:99999x", "::1:6379 "])
def test_no_address_at_all(address: str) -> None:
    done = run_python(f"{CONNECT}\ntry: connect({address!r})\nexcept ValueError as e: print(e)")
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"a Ray address must be local, auto or host:port, but got {address!r};")


def test_ray_knows_the_variables_that_make_it_patient() -> None:
    """An unknown one would be ignored in silence."""
    import ray

    folder = Path(ray.__file__).parent
    core = (folder / "_raylet.so").read_bytes() + (folder / "_private" / "node.py").read_bytes()
    assert [name for name in PATIENCE if name.encode() not in core] == []


@pytest.mark.slow
def test_a_ray_that_cannot_start_is_one_line() -> None:
    """Its folder cannot be made: a file is in the way."""
    code = "from paretoprune.cluster.ray_connection import connect\ntry: connect()\nexcept ValueError as e: print(e)"
    done = run_python(code, RAY_TMPDIR="/dev/null")
    (line,) = done.stdout.splitlines()
    assert line.startswith("Ray must be reachable at local, but ")
    assert line.endswith("check free memory and the disk space below the temporary directory")


STILLBORN = """
import sys, threading, time
import psutil
from paretoprune.cluster.ray_connection import connect
killed = []
def kill():
    while not killed:
        for child in psutil.Process().children():
            if child.name() == sys.argv[1]:
                child.kill()
                killed.append(time.monotonic())
        time.sleep(0.02)
threading.Thread(target=kill, daemon=True).start()
try:
    connect()
except ValueError as error:
    print(round(time.monotonic() - killed[0]), error)
"""


@pytest.mark.parametrize("process", ["gcs_server", "raylet"])
def test_a_ray_whose_process_ends_while_it_starts_is_not_waited_for(process: str) -> None:
    """Ray itself waits as long for a dead one as for a slow one."""
    (line,) = run_python(STILLBORN, process).stdout.splitlines()
    seconds, _, said = line.partition(" ")
    assert said.startswith(f"Ray must be reachable at local, but its process {process} ended while it started")
    # A GCS that dies while Ray's core connects to it for the first time costs that connection's own 40 s.
    assert int(seconds) < 60


# Started where Ray's sockets have no room and its token no home; then one of its processes is killed.
LAST_HOURS = """
import os, signal, sys, time
from pathlib import Path
from paretoprune.cluster import ray_connection
from paretoprune.search.errors import SearchError
from paretoprune.search.monitoring.interrupts import end_where_stuck, interruptible, leave
if __name__ == "__main__":
    ray_connection.connect(num_cpus=1, stuck=end_where_stuck)
    import ray
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "Ray's own handler"
    place = ray.get(ray.remote(lambda: os.environ["TMPDIR"]).remote())
    print(place, flush=True)
    assert (Path(place) / "auth_token").stat().st_mode & 0o77 == 0
    os.kill(ray._private.worker._global_node.all_processes[sys.argv[1]][0].process.pid, signal.SIGKILL)
    try:
        with interruptible("waiting", "go on"):
            while True:
                if sys.argv[1] == "gcs_server":
                    ray.nodes()  # never returns
                time.sleep(0.1)
    except SearchError as error:
        print(f"error: {error}", file=sys.stderr)
    ray_connection.shutdown()
    leave(1)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("process", "said"),
    [
        ("raylet", "its raylet on this machine died"),
        ("gcs_server", "its control process (GCS) died or is out of reach"),
    ],
)
def test_a_short_folder_of_its_own_and_one_line_when_ray_dies(tmp_path: Path, process: str, said: str) -> None:
    long = tmp_path / ("a_batch_job_s_directory_" * 4)
    long.mkdir()
    (tmp_path / "script.py").write_text(LAST_HOURS)
    given = {**os.environ, "TMPDIR": str(long), "HOME": "/proc/nohome", "PYTHONPATH": str(ROOT)}
    environment = {name: value for name, value in given.items() if name not in ("RAY_TMPDIR", *TOKEN_VARIABLES)}
    command = [sys.executable, str(tmp_path / "script.py"), process]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)
    assert done.returncode == 1, done.stderr
    assert [line for line in done.stderr.splitlines() if not line.startswith("[20")] == [
        f"error: Ray ended ({said}) while waiting; go on"
    ]
    place = done.stdout.splitlines()[0]  # what Ray says of its end follows
    end = time.monotonic() + 20
    while Path(place).exists():
        assert time.monotonic() < end, "its folder stays"
        time.sleep(0.1)
    assert not list(long.iterdir())


@pytest.mark.slow
def test_a_driver_joins_a_running_ray(ray_session: ClusterInfo) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    code = f"""
from paretoprune.cluster.ray_connection import connect, shutdown
info = connect({address!r}, worker_environment={{"COLOUR": "blue"}})
import os, ray
print(info.cpus, info.address, ray.get(ray.remote(lambda: (os.environ["COLOUR"], os.environ["YOLO_OFFLINE"])).remote()))
shutdown(); shutdown()
"""
    done = run_python(code)
    assert done.stdout.splitlines() == [f"{ray_session.cpus} {address} ('blue', 'true')"], done.stderr
