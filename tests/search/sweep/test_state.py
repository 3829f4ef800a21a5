"""What was asked and what came back: nothing lost, nothing twice, whatever died in between."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from optuna.trial import TrialState as StudyState

from paretoprune.pruning.plan import Plan
from paretoprune.results.store.records import TrialRecord, TrialState
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.config.sections import SpaceSection
from paretoprune.search.errors import RunFolderError
from paretoprune.search.space.prediction import NoPredictor, Prediction
from paretoprune.search.space.space import build_space
from paretoprune.search.storage.driver_lock import DriverLock, alive_driver
from paretoprune.search.storage.request import (
    TrialRequest,
    adopt_records,
    plan_of,
    trial_name,
    trial_number,
    unfinished,
)
from paretoprune.search.sweep.state import SAME_FAULT, SweepState
from paretoprune.search.sweep.sweep import make_state
from paretoprune.search.trial.trial import TrialSettings, failed_record, run_trial
from tests.search.fakes import FakeTools, NoGate, make_prepared, make_table

SETTINGS = TrialSettings(0, False, 10.0)


def start(run: Path, trials: int = 8) -> SweepState:
    prepared = make_prepared(run, **{"search.trials": trials})
    prepared.folder.trials_dir.mkdir(parents=True, exist_ok=True)
    return make_state(prepared, adopt_records(prepared.folder))


def work(state: SweepState, request: TrialRequest) -> TrialRecord:
    return run_trial(request, SETTINGS, FakeTools(), NoGate(), state.folder.trial_dir(request.trial_id))


def states(state: SweepState) -> list[StudyState]:
    return [trial.state for trial in state._study.study.trials]


def test_a_request_is_on_disk_before_it_is_handed_out(tmp_path: Path) -> None:
    state = start(tmp_path)
    request = state.next()
    assert request is not None
    assert request.trial_id == "t0000"
    assert unfinished(state.folder, set()) == [request]


def test_a_request_carries_a_latency_that_is_foretold_precisely(tmp_path: Path) -> None:
    class Halves(NoPredictor):
        def __init__(self) -> None:
            self.halfwidths = iter((0.02, 0.2))

        def predict(self, plan: Plan) -> Prediction | None:
            halfwidth = next(self.halfwidths, None)
            return None if halfwidth is None else Prediction(0.5, 0.3, 0.7, halfwidth)

    state = start(tmp_path)
    state._predictor = Halves()
    requests = [state.next() for _ in range(3)]
    assert [request and request.foretold for request in requests] == [
        {"ratio": 0.5, "low": 0.49, "high": 0.51},
        None,
        None,
    ]
    assert unfinished(state.folder, set()) == requests


def test_total_is_never_exceeded_by_trials_under_way(tmp_path: Path) -> None:
    state = start(tmp_path, trials=3)
    requests = [state.next() for _ in range(5)]
    assert [request is not None for request in requests] == [True, True, True, False, False]
    assert requests[0] is not None
    state.finish(work(state, requests[0]))
    assert state.next() is None
    assert state.remaining == 2


def test_a_record_counts_once(tmp_path: Path) -> None:
    state = start(tmp_path)
    request = state.next()
    assert request is not None
    record = work(state, request)
    state.finish(record)
    state.finish(record)
    assert [known.trial_id for known in state.folder.read_records()] == ["t0000"]


def test_driver_death_between_record_and_append_loses_nothing(tmp_path: Path) -> None:
    state = start(tmp_path)
    first, second, third = state.next(), state.next(), state.next()
    assert first
    assert second
    assert third
    state.finish(work(state, first))
    work(state, second)  # the worker wrote its record, the driver died before it appended; the third never ended
    again = start(tmp_path)
    assert [record.trial_id for record in again.records] == ["t0000", "t0001"]
    assert again.folder.read_records() == again.records
    assert again.next() == third  # under its id, with its plan
    fourth = again.next()
    assert fourth is not None
    assert fourth.trial_id == "t0003"
    assert fourth.ratios not in (first.ratios, second.ratios, third.ratios)
    assert states(again) == [StudyState.COMPLETE, StudyState.COMPLETE, StudyState.RUNNING, StudyState.RUNNING]
    again.close()
    assert StudyState.RUNNING not in states(again)


def test_a_torn_request_is_ignored_and_its_id_not_reused(tmp_path: Path) -> None:
    state = start(tmp_path)
    request = state.next()
    assert request is not None
    (tmp_path / "trials" / "t0000" / "request.json").write_text('{"trial_id": "t00')
    again = start(tmp_path)
    assert unfinished(again.folder, set()) == []


def test_a_dead_worker_leaves_a_failed_record_with_the_plan(tmp_path: Path) -> None:
    state = start(tmp_path)
    request = state.next()
    assert request is not None
    record = state.lose(request.trial_id, "worker: its process died")
    assert record is not None
    assert record.state is TrialState.FAILED
    assert record.error == "worker: its process died"
    assert record.plan_hash == plan_of(request).hash
    assert states(state) == [StudyState.FAIL]
    assert state.lose(request.trial_id, "again") is None


def test_a_worker_that_died_after_its_record_is_not_failed(tmp_path: Path) -> None:
    state = start(tmp_path)
    request = state.next()
    assert request is not None
    done = work(state, request)
    assert state.lose(request.trial_id, "worker: its process died") == done
    assert states(state) == [StudyState.COMPLETE]


def test_baseline_is_the_first_thing_the_study_knows(tmp_path: Path) -> None:
    RunFolder(tmp_path).write_baseline({"metrics": {"map50_95": 0.6, "latency_ms": 20.0}})
    state = start(tmp_path)
    trial = state._study.study.trials[0]
    assert trial.values == [0.6, 20.0]
    assert set(trial.params.values()) == {0}


def test_systematic_fault_is_seen_early_and_only_if_systematic(tmp_path: Path) -> None:
    state = start(tmp_path)
    for _ in range(SAME_FAULT):
        assert state.systematic_fault() is None
        request = state.next()
        assert request is not None
        state.finish(failed_record(request, "recover: OSError: full", "0" * 16))
    assert state.systematic_fault() == "recover: OSError: full"
    state.records[-1] = state.records[-1].changed(error="something else")
    assert state.systematic_fault() is None


def test_trial_names_sort_and_lead_back() -> None:
    names = [trial_name(number) for number in (0, 9, 10, 999)]
    assert names == sorted(names)
    assert [trial_number(name) for name in names] == [0, 9, 10, 999]
    assert trial_number("mine") == -1


def test_second_driver_is_refused_with_the_first_ones_host_and_pid(tmp_path: Path) -> None:
    import os
    import platform

    with DriverLock(tmp_path) as lock:
        lock.describe(slots=3)
        driver = alive_driver(tmp_path)
        assert driver is not None
        assert (driver.pid, driver.slots) == (os.getpid(), 3)
        with (
            pytest.raises(RunFolderError, match=f"host {platform.node()}, pid {os.getpid()}") as caught,
            DriverLock(tmp_path),
        ):
            pass
        assert caught.value.pid == os.getpid()
    assert alive_driver(tmp_path) is None
    with DriverLock(tmp_path):
        pass


def test_records_are_json_lines_that_name_their_trial(tmp_path: Path) -> None:
    state = start(tmp_path)
    request = state.next()
    assert request is not None
    state.finish(work(state, request))
    lines = (tmp_path / "trials.jsonl").read_text().splitlines()
    assert [json.loads(line)["trial_id"] for line in lines] == ["t0000"]


def test_free_moves_are_observations_and_no_trials(tmp_path: Path) -> None:
    """The unpruned model at a smaller input is measured by others; the sampler learns it, whenever it comes."""
    space = build_space(make_table(1), SpaceSection(), sizes=(320, 256))
    prepared = replace(make_prepared(tmp_path, **{"search.trials": 40, "search.warm_start": False}), space=space)
    folder = prepared.folder
    folder.trials_dir.mkdir(parents=True)
    state = make_state(prepared, [])
    assert state.next() is not None
    folder.write_free_move(256, {"map50_95": 0.5, "latency_ms": 6.4, "latency_ratio": 0.64, "speedup": 1.56})
    requests = [state.next() for _ in range(space.count())]
    asked = [plan_of(request) for request in requests if request is not None]
    assert len(asked) == space.count() - 3  # but for the first one, and the unpruned model at both sizes
    assert all(plan.ratios for plan in asked)
    told = [trial for trial in state._study.study.trials if trial.user_attrs.get("trial_id") == "unpruned@256"]
    assert [trial.values for trial in told] == [[0.5, 6.4]]
    assert [trial.params["imgsz"] for trial in told] == [1]
