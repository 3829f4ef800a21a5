"""Real Ray sweeps over pretended networks: counts, faults, reuse of workers, resume, promotion."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from paretoprune.cluster.resources import ClusterInfo
from paretoprune.pruning.plan import Plan
from paretoprune.results.errors import ResultsError
from paretoprune.results.report.report import write_report
from paretoprune.results.selection.selection import front
from paretoprune.results.store.objectives import DEFAULT_OBJECTIVES
from paretoprune.results.store.records import TrialState
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.cli import run
from paretoprune.search.errors import ConfigError, RunFolderError, SearchError
from paretoprune.search.finalists.finetune_picks import choose_picks, promote
from paretoprune.search.storage.driver_lock import DriverLock, alive_driver
from paretoprune.search.storage.request import WORKER_DIED
from paretoprune.search.sweep.sweep import SweepOutcome, run_sweep
from tests.search.fakes import (
    faulty_tools,
    hopeless_tools,
    make_prepared,
    no_tools,
    process_tools,
    profiled_tools,
    quick_tools,
)

pytestmark = pytest.mark.usefixtures("ray_session")


def study_states(run: Path) -> list[str]:
    """The states in the journal, read as a dashboard would."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    study = optuna.load_study(
        study_name="paretoprune", storage=JournalStorage(JournalFileBackend(str(run / "study.journal")))
    )
    return [trial.state.name for trial in study.trials]


def study_values(run: Path) -> dict[str, list[float]]:
    """Trial id -> what the study was told, by the journal."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    journal = JournalStorage(JournalFileBackend(str(run / "study.journal")))
    trials = optuna.load_study(study_name="paretoprune", storage=journal).trials
    return {trial.user_attrs["trial_id"]: trial.values for trial in trials if trial.values is not None}


def test_a_sweep_finishes_as_many_trials_as_asked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    outcome = run_sweep(make_prepared(tmp_path / "run", **{"search.trials": 7}), quick_tools)
    assert outcome == SweepOutcome(7, 0, 7, interrupted=False)
    folder = RunFolder(tmp_path / "run")
    records = folder.read_records()
    assert sorted(record.trial_id for record in records) == [f"t{i:04d}" for i in range(7)]
    assert len({record.plan_hash for record in records}) == 7
    assert folder.read_baseline()["metrics"]["latency_ratio"] == 1.0
    assert study_states(folder.path) == ["COMPLETE"] * 8  # the unpruned network is told, too
    assert not (folder.path / "ray").exists()
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "7/7 done, 0 running, 0 left" in captured.err
    assert "tune" not in captured.err.lower()


@pytest.mark.slow
def test_one_slot_and_one_seed_give_the_same_plans(tmp_path: Path) -> None:
    settings = {"search.trials": 6, "resources.max_concurrent_trials": 1, "search.sampler": "gp"}
    plans = []
    for name in "ab":
        run_sweep(make_prepared(tmp_path / name, **settings), quick_tools)
        plans.append([record.plan_hash for record in RunFolder(tmp_path / name).read_records()])
    assert plans[0] == plans[1]


@pytest.mark.slow
def test_a_finished_run_is_extended_and_nothing_is_repeated(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_sweep(make_prepared(run, **{"search.trials": 3}), quick_tools)
    before = RunFolder(run).read_records()
    assert run_sweep(make_prepared(run, **{"search.trials": 3}), quick_tools).finished == 3
    run_sweep(make_prepared(run, **{"search.trials": 5}), quick_tools)
    after = RunFolder(run).read_records()
    assert after[:3] == before
    assert len({record.plan_hash for record in after}) == len(after) == 5


@pytest.mark.slow
def test_exceptions_fail_their_trial_only_and_killed_workers_not_even_that(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = {"search.trials": 6, "resources.max_concurrent_trials": 1}
    outcome = run_sweep(make_prepared(run, **settings), faulty_tools)
    records = RunFolder(run).read_records()
    assert outcome.finished == len(records) == 6
    errors = [record.error for record in records if record.state is TrialState.FAILED]
    assert set(errors) == {"prune: RuntimeError: out of luck"}
    # the trial whose worker was killed is done by its successor, whose second trial raises again
    assert records[2].state is TrialState.COMPLETED
    assert records[2].retries == [WORKER_DIED]
    assert study_states(run).count("FAIL") == len(errors) == outcome.failed
    assert "RUNNING" not in study_states(run)


def test_a_systematic_fault_ends_the_sweep_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(SearchError, match=r"trials failed with the same error \(recover: OSError: the disk is full\)"):
        run_sweep(make_prepared(tmp_path / "run", **{"search.trials": 50}), hopeless_tools)
    assert len(RunFolder(tmp_path / "run").read_records()) < 20


def test_a_search_in_which_every_trial_failed_is_an_error_at_every_start(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    prepared = make_prepared(path, **{"search.trials": 3, "resources.max_concurrent_trials": 1})
    line = r"all 3 failed, 3 of them for one reason \(recover: OSError: the disk is full\)"
    with pytest.raises(SearchError, match=line):
        run_sweep(prepared, hopeless_tools)
    shown = capfd.readouterr().err.splitlines()
    where = [number for number, text in enumerate(shown) if text.startswith("2 of 2 trials failed for one reason: rec")]
    assert len(where) == 1
    assert "t0001" in shown[where[0] - 1]  # right behind the trial that made it half, not at the end
    assert any("t0002" in text for text in shown[where[0] + 1 :])
    monkeypatch.setattr("paretoprune.search.api.runs.prepare", lambda *_, **__: prepared)
    assert run(["resume", str(path)]) == 1
    printed = capfd.readouterr()
    assert re.search(line, printed.err)
    assert "finetune" not in printed.err
    assert printed.out == ""


def test_workers_are_reused(tmp_path: Path, ray_session: ClusterInfo) -> None:
    run_sweep(make_prepared(tmp_path / "run", **{"search.trials": 8}), process_tools)
    devices = [record.device for record in RunFolder(tmp_path / "run").read_records()]
    processes = {device.split(":")[0] for device in devices}
    assert len(processes) <= ray_session.cpus
    assert len(set(devices)) == len(processes)  # each process made its tools once


def test_a_baseline_that_cannot_be_measured_ends_with_the_workers_own_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^the model is gone; bring it back$"):
        run_sweep(make_prepared(tmp_path / "run"), no_tools)
    assert RunFolder(tmp_path / "run").read_records() == []
    assert alive_driver(tmp_path / "run") is None


def test_second_driver_is_refused(tmp_path: Path) -> None:
    prepared = make_prepared(tmp_path / "run")
    prepared.folder.path.mkdir()
    with DriverLock(prepared.folder.path), pytest.raises(RunFolderError, match="in use by another driver"):
        run_sweep(prepared, quick_tools)


def test_picks_are_finetuned_and_measured_beside_the_baseline(tmp_path: Path) -> None:
    prepared = make_prepared(tmp_path / "run", **{"search.trials": 6, "finetune.epochs": 2})
    run_sweep(prepared, quick_tools)
    folder = prepared.folder
    picks = choose_picks(folder, prepared.config.search.objectives, ["2"])
    outcome = promote(folder, prepared.config, picks, quick_tools)
    assert outcome.failed == {}
    assert [row["trial_id"] for row in outcome.rows] == [pick.trial_id for pick in picks]
    for pick in picks:
        content = json.loads((folder.selected_dir(pick.trial_id) / "metrics.json").read_text())
        assert content["chosen_as"] == pick.chosen_as
        assert content["before"] == pick.record.metrics
        assert content["baseline"]["latency_measured_ms"] == 20.0
        assert (content["epochs"], content["best_epoch"], content["fidelity"]) == (1, 1, "full")
        assert (folder.selected_dir(pick.trial_id) / "plan.json").is_file()
        assert content["session"]["networks"] == ["baseline", *sorted(pick.trial_id for pick in picks)]
    written = (folder.selected_dir(picks[0].trial_id) / "best.pt").stat().st_mtime_ns
    promote(folder, prepared.config, picks, quick_tools)
    assert (folder.selected_dir(picks[0].trial_id) / "best.pt").stat().st_mtime_ns == written  # not done twice


def test_picks_of_two_days_and_a_native_rival_share_one_session(tmp_path: Path) -> None:
    prepared = make_prepared(tmp_path / "run", **{"search.trials": 3})
    run_sweep(prepared, quick_tools)
    folder = prepared.folder
    small = tmp_path / "small.pt"
    small.write_text("a stock model")
    first, second = (choose_picks(folder, DEFAULT_OBJECTIVES, [name]) for name in ("t0000", "t0001"))
    promote(folder, prepared.config, first, quick_tools)
    tuned = folder.selected_dir("t0000") / "tuned.json"
    content = json.loads(tuned.read_text())
    for name in ("train", "teacher"):  # what an older version did not say
        del content["settings"][name]
    tuned.write_text(json.dumps(content))
    before = tuned.stat().st_mtime_ns
    outcome = promote(folder, prepared.config, second, quick_tools, natives=[str(small)])
    assert [row["trial_id"] for row in outcome.rows] == ["t0001", "native:small"]
    assert tuned.stat().st_mtime_ns == before  # not fine-tuned again
    session = json.loads(folder.session.read_text())
    assert session["networks"] == ["baseline", "t0000", "t0001", "native:small"]
    assert set(session["speedup_over"]["t0001"]) == {"baseline", "t0000", "native:small"}
    for selected in folder.read_selected():
        assert (
            json.loads((selected.directory / "metrics.json").read_text())["session"]["measured_at"]
            == (session["measured_at"])
        )
        assert selected.baseline["test_map50_95"] > 0
    (native,) = folder.read_natives()
    assert (native.name, native.model, native.recipe, native.epochs) == ("small", str(small), "as pretended", 2)
    assert native.after["speedup_ci95"]
    measured_at = session["measured_at"]
    promote(folder, prepared.config, [*first, *second], quick_tools, natives=[str(small)])
    assert json.loads(folder.session.read_text())["measured_at"] == measured_at  # nothing new: nothing done


def test_a_session_that_was_cut_off_is_made_up_without_fine_tuning_again(tmp_path: Path) -> None:
    prepared = make_prepared(tmp_path / "run", **{"search.trials": 2})
    run_sweep(prepared, quick_tools)
    folder = prepared.folder
    picks = choose_picks(folder, DEFAULT_OBJECTIVES, ["t0001"])
    promote(folder, prepared.config, picks, quick_tools)
    tuned = folder.selected_dir("t0001") / "tuned.json"
    before = tuned.stat().st_mtime_ns
    folder.session.unlink()
    (folder.selected_dir("t0001") / "metrics.json").unlink()
    assert folder.read_selected() == []
    promote(folder, prepared.config, picks, quick_tools)
    assert len(folder.read_selected()) == 1
    assert tuned.stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_pick_that_fails_does_not_hold_up_the_others(tmp_path: Path) -> None:
    prepared = make_prepared(tmp_path / "run", **{"search.trials": 4})
    run_sweep(prepared, quick_tools)
    folder = prepared.folder
    folder.trial_checkpoint("t0000").write_text("no network")
    picks = choose_picks(folder, DEFAULT_OBJECTIVES, ["t0000", "t0001"])
    outcome = promote(folder, prepared.config, picks, quick_tools)
    assert [row["trial_id"] for row in outcome.rows] == ["t0001"]
    assert list(outcome.failed) == ["t0000"]


def test_picks_that_cannot_be(tmp_path: Path) -> None:
    prepared = make_prepared(tmp_path / "run", **{"search.trials": 2})
    run_sweep(prepared, quick_tools)
    with pytest.raises(ResultsError, match=r"a finished trial's id of the run, but got 't0099'"):
        choose_picks(prepared.folder, DEFAULT_OBJECTIVES, ["t0099"])
    prepared.folder.trial_checkpoint("t0001").unlink()
    with pytest.raises(SearchError, match="trial t0001 needs its network"):
        choose_picks(prepared.folder, DEFAULT_OBJECTIVES, ["t0001"])


def test_hopeless_trials_are_stopped_and_told_as_what_they_would_have_been(tmp_path: Path) -> None:
    settings = {"search.trials": 30, "trial.epochs": 1, "resources.max_concurrent_trials": 1}
    outcome = run_sweep(make_prepared(tmp_path / "run", **settings), quick_tools)
    folder = RunFolder(tmp_path / "run")
    records = folder.read_records()
    stopped = [record for record in records if record.state is TrialState.STOPPED]
    assert outcome.stopped == len(stopped) > 0
    assert all((record.epochs, record.fidelity) == (0, "refit") for record in stopped)
    assert all(folder.trial_checkpoint(record.trial_id).is_file() for record in stopped)
    assert {record.fidelity_label for record in front(records)} == {"1 epoch"}  # stopped ones do not compete
    told = study_values(folder.path)
    for record in records:
        gain = 0.05 if record in stopped else 0.0  # what the pretended epoch brings to every other trial
        assert told[record.trial_id][0] == pytest.approx(record.metrics["map50_95"] + gain, abs=1e-6)

    again = run_sweep(make_prepared(folder.path, **{**settings, "search.trials": 32}), quick_tools)
    assert again.finished == 32
    assert folder.read_records()[:30] == records


def test_a_budget_ends_the_sweep_and_a_greater_one_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome = run_sweep(make_prepared(run, **{"search.trials": 6, "search.max_hours": 1e-9}), quick_tools)
    assert (outcome.finished, outcome.used_up) == (0, "the time budget of 1e-09 h")
    outcome = run_sweep(make_prepared(run, **{"search.trials": 6, "search.max_gpu_hours": 1e-9}), quick_tools)
    assert 0 < outcome.finished < 6
    assert outcome.used_up == "the budget of 1e-09 GPU h"
    assert run_sweep(make_prepared(run, **{"search.trials": 6}), quick_tools).finished == 6


def test_the_sensitivity_profile_is_made_once_and_then_read_from_the_run(tmp_path: Path) -> None:
    run, model = tmp_path / "run", {"model.path": str(tmp_path / "model.pt")}
    run_sweep(make_prepared(run, **model, **{"search.trials": 3}), profiled_tools)
    folder = RunFolder(run)
    (found,) = [record for record in folder.read_records() if record.provenance == "sensitivity"]
    assert found.ratios == {"model.0.c0": 0.25, "model.0.d0": 0.25}
    stored = dict.fromkeys(("model.2.c1", "model.2.d1"), 0.5)
    folder.write_baseline({**folder.read_baseline(), "sensitivity": [{"keep": 0.8, "ratios": stored}]})

    run_sweep(make_prepared(run, **model, **{"search.trials": 4}), profiled_tools)
    assert (tmp_path / "profiles").read_text() == "profiled\n"
    last = folder.read_records()[-1]
    assert (last.provenance, last.ratios) == ("sensitivity", stored)


def test_three_objectives_are_told_in_their_order_and_all_reported(tmp_path: Path) -> None:
    own = ["map50_95", "latency_ms", "size_mb"]
    run_sweep(make_prepared(tmp_path / "run", **{"search.trials": 4, "search.objectives": own}), quick_tools)
    folder = RunFolder(tmp_path / "run")
    told, records = study_values(folder.path), folder.read_records()
    for record in records:
        assert told[record.trial_id] == pytest.approx([record.metrics[name] for name in own])
    smallest = min(records, key=lambda record: record.metrics["size_mb"])
    assert smallest in front(records, own)
    write_report(folder.path)
    text = folder.report_markdown.read_text()
    assert "size, MB" in text
    assert f"{smallest.metrics['size_mb']:.3f}" in text


def test_a_plan_outside_the_space_is_announced_before_the_search_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Plan({"model.0.c0": 0.875}).save(tmp_path / "mine.json")
    prepared = make_prepared(
        tmp_path / "run", **{"search.trials": 1, "search.initial_plans": [str(tmp_path / "mine.json")]}
    )
    run_sweep(prepared, quick_tools)
    told = capsys.readouterr().err
    assert "mine.json lies outside the search space and is tried with model.0.c0 0.875 -> 0.625;" in told
    assert told.index("lies outside") < told.index("starting Ray")
    (record,) = prepared.folder.read_records()
    assert (record.provenance, record.ratios) == ("plan", {"model.0.c0": 0.625, "model.0.d0": 0.625})


def test_another_runs_trials_are_told_and_not_repeated(tmp_path: Path) -> None:
    first = make_prepared(tmp_path / "first", **{"search.trials": 5})
    run_sweep(first, quick_tools)
    lost, *rest = first.folder.read_records()  # the warm start's first plan, which the second run would begin with
    first.folder.trials_file.unlink()
    for record in (lost.changed(state=TrialState.FAILED, error="no", metrics={}), *rest):
        first.folder.store.append(record)
    settings = {"search.trials": 4, "search.warm_start_run": str(first.folder.path)}
    run_sweep(make_prepared(tmp_path / "second", **settings), quick_tools)
    before, after = first.folder.read_records(), RunFolder(tmp_path / "second").read_records()
    assert not {record.plan_hash for record in before} & {record.plan_hash for record in after}
    told = study_values(tmp_path / "second")
    assert {f"from-run/{record.trial_id}" for record in rest} <= set(told)

    other = {**settings, "trial.epochs": 1}  # other figures: the front's plans are tried again
    run_sweep(make_prepared(tmp_path / "third", **other), quick_tools)
    third = RunFolder(tmp_path / "third").read_records()
    again = [record for record in third if record.provenance == "from-run"]
    assert {record.plan_hash for record in again} <= {record.plan_hash for record in front(before)}
    assert again
