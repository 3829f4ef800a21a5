"""What people see while a sweep runs."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from paretoprune.results.store.records import TrialRecord, TrialState
from paretoprune.search.monitoring.progress import (
    PlainReporter,
    RichReporter,
    duration,
    progress_of,
    summary_line,
    trial_line,
)
from paretoprune.search.monitoring.status import run_status, status_lines
from paretoprune.search.storage.request import TrialRequest
from paretoprune.search.sweep.sweep import make_state
from paretoprune.search.trial.trial import failed_record
from tests.search.fakes import make_prepared

OBJECTIVES = ("map50_95", "latency_ms")


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
        "4/10 done, 2 running, 6 left, 1 failed; front 2: mAP50-95 0.500 at 2.00x ... mAP50-95 0.300 at 4.00x; "
        "about 60 s left"
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


def test_plain_reporter_prints_one_line_a_trial() -> None:
    stream = io.StringIO()
    reporter = PlainReporter([], 3, 2, OBJECTIVES, stream)
    reporter.started("t0000")
    reporter.started("t0001")
    reporter.finished(RECORDS[0])
    assert stream.getvalue().count("\n") == 1
    assert "1/3 done, 1 running, 2 left" in stream.getvalue()


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


def test_live_reporter_scrolls_trials_above_one_summary() -> None:
    stream = io.StringIO()
    reporter = RichReporter([], 3, 2, OBJECTIVES, stream)
    reporter.started("t0000")
    reporter.finished(RECORDS[0])
    reporter.note("stopping [soon]")
    reporter.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == trial_line(RECORDS[0])
    assert lines[1] == "stopping [soon]"  # brackets are text here, not markup
    assert lines[-1].startswith("1/3 done, 0 running, 2 left")
