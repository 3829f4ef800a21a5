"""What people see while a sweep runs."""

from __future__ import annotations

import json
import os
import pty
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from paretoprune.base.messages import heard_by, speaking
from paretoprune.results.store.records import TrialRecord, TrialState
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.cli import run
from paretoprune.search.config.stored import save_run_config
from paretoprune.search.monitoring import progress as progress_module
from paretoprune.search.monitoring.progress import (
    Reporter,
    duration,
    front_lines,
    progress_of,
    summary_line,
    trial_line,
)
from paretoprune.search.monitoring.status import run_status, status_lines
from paretoprune.search.storage.driver_lock import DriverLock
from paretoprune.search.storage.event_log import PhaseClock
from paretoprune.search.storage.request import TrialRequest
from paretoprune.search.sweep.sweep import make_state
from paretoprune.search.trial.trial import failed_record
from tests.search.fakes import make_prepared

OBJECTIVES = ("map50_95", "latency_ms")
BASELINE = {"map50_95": 0.51, "latency_ms": 20.0}


def record(trial_id: str, accuracy: float, latency_ms: float, seconds: float = 10.0) -> TrialRecord:
    return TrialRecord(
        trial_id=trial_id, state=TrialState.COMPLETED, plan_hash="0" * 16, ratios={"a": 0.5},
        metrics={"map50_95": accuracy, "latency_ms": latency_ms, "speedup": 20 / latency_ms, "params_m": 2.5},
        epochs=0, fidelity="refit", finished_at=1.0, seconds={"all": seconds}, provenance="gp",
    )  # fmt: skip


RECORDS = [record("t0000", 0.5, 10.0), record("t0001", 0.4, 12.0, 30.0), record("t0002", 0.3, 5.0, 20.0)]


def test_counts_front_and_time_left() -> None:
    failed = failed_record(TrialRequest(trial_id="t0003", ratios={}, provenance="gp"), "prune: no", "0" * 16)
    progress = progress_of([*RECORDS, failed], total=10, running=2, slots=2, objectives=OBJECTIVES)
    assert (progress.done, progress.left, progress.failed, progress.front_size) == (4, 6, 1, 2)
    assert progress.eta_seconds == pytest.approx(20.0 * 6 / 2)
    line = summary_line(progress)
    assert line == (
        "4/10 done, 2 running, 6 left, 1 failed; about 60 s left; front of 2: best mAP50-95 0.500, 2.00 times as fast"
    )


def test_a_trial_that_the_bounds_kept_from_training_counts_once() -> None:
    beyond = RECORDS[1].changed(trial_id="t0003", state=TrialState.STOPPED, violations={"max_latency_ms": 0.5})
    line = summary_line(progress_of([*RECORDS, beyond], 10, 0, 1, OBJECTIVES))
    assert "6 left, 1 beyond the bounds;" in line
    assert "beyond max_latency_ms" in trial_line(beyond)
    assert "stopped" not in trial_line(beyond)


def test_before_the_first_trial_nothing_is_promised() -> None:
    assert summary_line(progress_of([], 10, 2, 2, OBJECTIVES)) == "0/10 done, 2 running, 10 left"


def test_trial_lines_are_aligned() -> None:
    lines = [trial_line(item) for item in RECORDS]
    assert len({len(line) for line in lines}) == 1
    assert "mAP50-95 0.500" in lines[0]
    assert "(2.00x)" in lines[0]
    failed = failed_record(TrialRequest(trial_id="t0003", ratios={}, provenance="gp"), "prune: no", "0" * 16)
    assert "failed: prune: no" in trial_line(failed)
    assert "M  at 256 px  in int8 " in trial_line(RECORDS[0].changed(imgsz=256, precision="int8"))


def folder_with_baseline(path: Path) -> RunFolder:
    folder = RunFolder(path)
    folder.trial_dir("t0001").mkdir(parents=True)
    folder.write_baseline({"metrics": BASELINE})
    clock = PhaseClock(folder.trial_dir("t0001") / "events.jsonl")
    clock.event("phase_started", phase="finetune", epochs=3)
    clock.event("epoch", epoch=1)
    return folder


def test_the_front_in_short_is_the_best_and_the_fastest_close_to_the_unpruned() -> None:
    progress = progress_of(RECORDS, 10, 0, 1, OBJECTIVES, {"metrics": BASELINE})
    assert front_lines(progress) == [
        "front of 2: best mAP50-95 0.500, 2.00 times as fast",
        "fastest within 0.02 of the unpruned: t0000, 2.00 times as fast, mAP50-95 0.010 lower",
    ]
    far = progress_of(RECORDS[1:], 10, 0, 1, OBJECTIVES, {"metrics": BASELINE})
    assert front_lines(far) == ["front of 2: best mAP50-95 0.400, 1.67 times as fast"]
    slower = progress_of(RECORDS, 10, 0, 1, OBJECTIVES, {"metrics": {**BASELINE, "latency_ms": 1.0}})
    assert front_lines(slower) == front_lines(progress)[:1]


def test_in_a_pipe_it_is_a_line_a_trial_and_a_line_where_it_is_silent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_module, "HEARTBEAT_S", 0.05)
    reporter = Reporter(folder_with_baseline(tmp_path), [], 3, 2, OBJECTIVES)
    reporter.started("t0000")
    reporter.started("t0001")
    reporter.finished(RECORDS[0])
    time.sleep(0.3)
    reporter.close()
    lines = capsys.readouterr().err.splitlines()
    told = [line for line in lines if line.startswith("t0000")]
    assert len(told) == 1
    assert "1/3 done, 1 running, 2 left" in told[0]
    beats = lines[lines.index(told[0]) + 1 :]
    assert beats
    assert "1/3 done, 1 running, 2 left; about 10 s left; front of 1:" in beats[0]
    assert beats[0].endswith("t0001 fine-tuning, epoch 2 of 3 (0 s)")


def test_lines_of_a_listener_hold_no_control_codes(tmp_path: Path) -> None:
    heard: list[str] = []
    with heard_by(heard.append):
        reporter = Reporter(folder_with_baseline(tmp_path), [], 3, 2, OBJECTIVES)
        reporter.finished(RECORDS[0])
        reporter.close()
    assert len(heard) == 1
    assert heard[0].startswith("t0000")


@contextmanager
def stderr_is_a_terminal(monkeypatch: pytest.MonkeyPatch, kind: str) -> Iterator[list[bytes]]:
    """Gives what is written there, complete after the body."""
    master, slave = pty.openpty()
    found: list[bytes] = []

    def read() -> None:
        with suppress(OSError):  # Linux: at the end of a terminal
            while chunk := os.read(master, 65536):
                found.append(chunk)

    thread = threading.Thread(target=read)
    thread.start()
    with monkeypatch.context() as patch, os.fdopen(slave, "w", encoding="utf-8") as stream:
        patch.setattr(sys, "stderr", stream)
        for name, value in {"TERM": kind, "COLUMNS": "200", "NO_COLOR": "1"}.items():
            patch.setenv(name, value)
        yield found
    thread.join()
    os.close(master)


def test_on_a_terminal_it_stands_below_the_lines_that_scroll_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stderr_is_a_terminal(monkeypatch, "xterm") as written:
        reporter = Reporter(folder_with_baseline(tmp_path), [RECORDS[0]], 4, 2, OBJECTIVES)
        reporter.started("t0001")
        with speaking() as say:
            say("sending files")
            print("a library's line", file=sys.stderr)
        reporter.finished(RECORDS[1])
        reporter.note("stopping [soon]")
        reporter.close()
    seen = b"".join(written).decode()
    assert "━━━━━─────────────── 1/4 done, 1 running, 3 left; about 15 s left" in seen
    assert "t0001 fine-tuning, epoch 2 of 3 (0 s)" in seen
    assert "sending files: 0 s so far" in seen
    # What is left on the screen: the lines that scrolled by, and the last summary; brackets are text, not markup.
    stays = [line for line in re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "\r", seen).split("\n") if line.strip()]
    last = [line.split("\r")[-2 if line.endswith("\r") else -1] for line in stays]
    assert [line for line in last if line in ("a library's line", trial_line(RECORDS[1]), "stopping [soon]")] == [
        "a library's line", trial_line(RECORDS[1]), "stopping [soon]",
    ]  # fmt: skip
    assert last[-1].startswith("2/4 done, 0 running, 2 left")
    assert not re.search(r"\x1b\[[\d;]*m", seen)  # NO_COLOR


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stderr_is_a_terminal(monkeypatch, "dumb") as written:
        reporter = Reporter(folder_with_baseline(tmp_path), [], 4, 2, OBJECTIVES)
        reporter.finished(RECORDS[0])
        reporter.close()
    seen = b"".join(written).decode()
    assert "\x1b" not in seen
    assert seen.count("\n") == 1


@pytest.mark.parametrize(("seconds", "text"), [(None, "unknown"), (45, "45 s"), (600, "10 min"), (11100, "3 h 05 min")])
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_status_of_a_run_without_a_driver(tmp_path: Path) -> None:
    prepared = make_prepared(tmp_path, **{"search.trials": 4})
    prepared.folder.trials_dir.mkdir()
    state = make_state(prepared, [])
    assert state.next() is not None
    status = run_status(prepared.folder, 4, OBJECTIVES)
    lines = status_lines(status)
    assert "no driver is running; resume with `paretoprune resume" in lines[0]
    assert lines[-1] == "unfinished t0000: waiting"
    row = status.to_row()
    assert (row["alive"], row["done"], row["running"], row["left"]) == (False, 0, 0, 4)


def test_watching_is_a_line_for_each_change_until_the_run_has_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = make_prepared(tmp_path, **{"search.trials": 2, "search.objectives": list(OBJECTIVES)})
    prepared.folder.trials_dir.mkdir()
    save_run_config(prepared.folder, prepared.config)
    state = make_state(prepared, [])
    assert state.next() is not None
    with ExitStack() as stack:
        driver = stack.enter_context(DriverLock(tmp_path))
        driver.describe(slots=1)
        events = PhaseClock(tmp_path / "events.jsonl")
        steps: list[Callable[[], object]] = [
            lambda: None,
            lambda: events.step("validating it"),
            lambda: prepared.folder.store.append(RECORDS[0]),
            stack.close,
        ]
        monkeypatch.setattr("time.sleep", lambda seconds: steps.pop(0)())
        assert run(["status", str(tmp_path), "--watch", "--format", "json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["done"] for row in rows] == [0, 0, 1, 1]
    assert [row["alive"] for row in rows] == [True, True, True, False]
    assert rows[1]["phases"] == {"t0000": "", "run": "validating it"}

    monkeypatch.setattr("time.sleep", interrupted)
    with DriverLock(tmp_path):
        assert run(["status", str(tmp_path), "--watch"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "1/2 done, 0 running, 1 left" in line
    assert run(["status", str(tmp_path), "--watch", "--format", "csv"]) == 2


def interrupted(seconds: float) -> None:
    raise KeyboardInterrupt
