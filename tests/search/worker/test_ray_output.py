"""Nothing of Ray's reaches stdout, and a command ends only the connection that it made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from paretoprune.cluster.resources import ClusterInfo
from paretoprune.search.worker.ray_output import DRIVER_LOG, quiet_ray


def test_a_connection_from_before_stays(
    ray_session: ClusterInfo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    with quiet_ray(tmp_path):
        print("(raylet) a node died")
    assert ray.is_initialized()
    print("data")
    assert capsys.readouterr().out == "data\n"
    assert (tmp_path / DRIVER_LOG).read_text() == "(raylet) a node died\n"


def test_nothing_is_imported_where_ray_is_not_needed(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom paretoprune.search.worker.ray_output import quiet_ray\n"
        "with quiet_ray(Path(sys.argv[1])): pass\nprint('ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.slow
def test_what_ray_says_late_is_not_among_the_data(ray_session: ClusterInfo, tmp_path: Path) -> None:
    """A driver of its own, to which Ray's core sends a message: it goes to the log, and the driver leaves Ray."""
    import ray

    code = """
import sys
from pathlib import Path
from paretoprune.search.worker.ray_output import quiet_ray
with quiet_ray(Path(sys.argv[1])):
    from paretoprune.cluster.ray_connection import connect
    connect(sys.argv[2])
    import time, ray
    from ray._private.worker import global_worker
    job = global_worker.current_job_id
    ray._private.utils.publish_error_to_driver("x", "a node died", global_worker.gcs_client, job_id=job)
    log = Path(sys.argv[1]) / "driver.log"
    end = time.monotonic() + 60
    while "a node died" not in log.read_text() and time.monotonic() < end:
        time.sleep(0.1)
        sys.stdout.flush()
print("data", ray.is_initialized())
"""
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", code, str(tmp_path), address]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.stdout == "data False\n", done.stderr
    assert "a node died" in (tmp_path / DRIVER_LOG).read_text()
