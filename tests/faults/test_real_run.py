"""One real run by the command line, interrupted in every phase: it ends in one line, or dies, and always goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from paretoprune.base.file_names import FINETUNE_STATE
from paretoprune.pruning.builtin import BASELINE
from paretoprune.pruning.builtin.dataset import build_dataset
from paretoprune.results.store.records import TrialState
from paretoprune.results.store.run_folder import RunFolder
from tests.faults.drivers import ROOT

pytestmark = pytest.mark.slow

SETTINGS = [
    "model.imgsz=64", "search.trials=1", "trial.epochs=4", "recover.calibration_images=8", "latency.max_seconds=0.5",
    "resources.max_concurrent_trials=1", "finetune.epochs=4",
]  # fmt: skip


def command(*arguments: object) -> subprocess.Popen[str]:
    """In a process group of its own, as a shell starts it, with Ctrl-C switched on whatever this process inherited."""
    return subprocess.Popen(
        [sys.executable, "-m", "paretoprune", *map(str, arguments)], cwd=ROOT, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def ctrl_c(process: subprocess.Popen[str]) -> str:
    """As a terminal does: to the whole group. What it said; one line of error and no traceback."""
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1, out + err
    assert "Traceback" not in err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert err.splitlines()[-1] == errors[0]
    return errors[0]


def finished(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, out + err
    return err


def test_a_real_run_goes_on_whatever_interrupts_it(tmp_path: Path) -> None:
    data, run = build_dataset(tmp_path / "digits", train=24, val=8), tmp_path / "run"
    folder, trial = RunFolder(run), run / "trials" / "t0000"
    changes = [word for setting in SETTINGS for word in ("--set", setting)]

    search = command("search", BASELINE, data, "--run", run, *changes)
    wait_until((run / "baseline.log").exists, search)  # the worker has begun with it
    assert ctrl_c(search) == (
        f"error: interrupted while measuring the unpruned model; resume with `paretoprune resume {run}`"
    )
    assert not folder.baseline.exists()

    resumed = command("resume", run)
    wait_until((trial / FINETUNE_STATE).exists, resumed)  # one epoch is done
    worker = psutil.Process(json.loads((trial / "worker.lock").read_text())["pid"])
    resumed.kill()
    worker.kill()
    resumed.communicate()
    assert not folder.read_records()
    resumed = command("resume", run)
    wait_until(lambda: "going on after epoch" in (trial / "train.log").read_text(), resumed)
    resumed.kill()  # alone, and the next one starts at once: its worker may still be at it for a while
    again = command("resume", run)
    resumed.communicate()
    assert "1/1 trials" in finished(again)
    (record,) = folder.read_records()
    assert (record.state, record.epochs) == (TrialState.COMPLETED, 4)
    assert [row["epochs"] for row in record.history] == list(range(5))
    assert not (trial / FINETUNE_STATE).exists()

    pick = run / "selected" / "t0000"
    finetune = command("finetune", run, "--pick", 1)
    wait_until((pick / FINETUNE_STATE).exists, finetune)
    assert ctrl_c(finetune).startswith("error: interrupted while fine-tuning the picks; what is done is kept")
    finished(command("finetune", run, "--pick", 1))
    assert "going on after epoch" in (pick / "train.log").read_text()
    (selected,) = folder.read_selected()
    assert selected.epochs == 4
