"""A driver killed with SIGKILL: the next one loses nothing, repeats nothing, leaves no zombie; Ctrl-C ends cleanly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from paretoprune.results.store.records import TrialRecord
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.storage.driver_lock import alive_driver
from paretoprune.search.sweep.sweep import run_sweep
from tests.search.fakes import make_prepared, quick_tools
from tests.search.sweep.test_sweep import study_states

ROOT = Path(__file__).resolve().parents[3]
TRIALS = 8
DRIVER = f"""
import sys
from pathlib import Path
from paretoprune.search.sweep.sweep import run_sweep
from tests.search.fakes import make_prepared, slow_tools
outcome = run_sweep(make_prepared(Path(sys.argv[1]), **{{"search.trials": {TRIALS}}}), slow_tools)
print("interrupted" if outcome.interrupted else "finished")
"""

pytestmark = pytest.mark.slow


def start_driver(run: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(run)], cwd=ROOT, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def wait_for(condition: Callable[[], bool], driver: subprocess.Popen[str], timeout_s: float = 240) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert driver.poll() is None, f"the driver ended: {driver.communicate()}"
        assert time.monotonic() < end, "the driver did not get there"
        time.sleep(0.02)


def records_of(run: Path) -> list[TrialRecord]:
    return RunFolder(run).read_records()


def test_resume_after_sigkill_of_the_driver(tmp_path: Path) -> None:
    run = tmp_path / "run"
    driver = start_driver(run)
    wait_for(lambda: len(records_of(run)) >= 3, driver)
    driver.kill()
    driver.communicate()
    left = records_of(run)
    assert 3 <= len(left) < TRIALS
    assert alive_driver(run) is None

    outcome = run_sweep(make_prepared(run, **{"search.trials": TRIALS}), quick_tools)
    records = records_of(run)
    assert records[: len(left)] == left
    assert outcome.finished == len(records) == TRIALS
    assert len({record.trial_id for record in records}) == TRIALS
    assert len({record.plan_hash for record in records}) == TRIALS
    assert sorted(record.trial_id for record in records) == [f"t{i:04d}" for i in range(TRIALS)]
    assert study_states(run) == ["COMPLETE"] * (TRIALS + 1)


def test_ctrl_c_ends_cleanly_and_keeps_what_finished(tmp_path: Path) -> None:
    run = tmp_path / "run"
    driver = start_driver(run)
    wait_for(lambda: len(records_of(run)) >= 2, driver)
    driver.send_signal(signal.SIGINT)
    out, err = driver.communicate(timeout=120)
    assert driver.returncode == 0, err
    assert out.strip() == "interrupted"
    assert "finished trials are kept" in err
    assert "Traceback" not in err
    assert 2 <= len(records_of(run)) < TRIALS
    assert "RUNNING" not in study_states(run)


@pytest.fixture(autouse=True)
def _ray(request: pytest.FixtureRequest) -> None:
    """This process's own Ray, for the drivers that run in it."""
    request.getfixturevalue("ray_session")
