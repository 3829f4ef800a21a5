"""What a run begins with: the user's plans before all else, another run only where it is of the same network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paretoprune.pruning.plan import Plan
from paretoprune.results.store.records import TrialRecord, TrialState, as_record
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.config.inputs import weights_hash
from paretoprune.search.config.run_config import RunConfig
from paretoprune.search.config.sections import SpaceSection
from paretoprune.search.errors import ConfigError
from paretoprune.search.samplers import initial_plans
from paretoprune.search.samplers.initial_plans import (
    PLAN,
    changed_plans,
    check_other_run,
    check_plans,
    initial_plans_of,
    read_other_run,
)
from paretoprune.search.space.space import build_space
from tests.search.fakes import make_config, make_space, make_table

METRICS = {"map50_95": 0.6, "latency_ms": 10.0}


def saved(path: Path, ratios: dict[str, float]) -> str:
    Plan(ratios).save(path)
    return str(path)


def test_the_users_plans_come_first_and_every_start_once(tmp_path: Path) -> None:
    space = make_space()
    ladder = initial_plans_of(make_config(**{"search.trials": 12}), space, {})
    mine = space.plan((space.axes[0].size - 1, *[0] * (len(space.axes) - 1))).ratios
    also_uniform = space.plan(ladder[1].levels).ratios
    files = [saved(tmp_path / "a.json", mine), saved(tmp_path / "b.json", also_uniform)]
    starts = initial_plans_of(make_config(**{"search.trials": 12, "search.initial_plans": files}), space, {})
    assert [start.provenance for start in starts[:3]] == [PLAN, PLAN, ladder[0].provenance]
    assert [space.plan(start.levels).ratios for start in starts[:2]] == [mine, also_uniform]
    assert len({start.levels for start in starts}) == len(starts) == len(ladder) + 1


def test_without_the_warm_start_only_the_users_plans_are_left(tmp_path: Path) -> None:
    space = make_space()
    file = saved(tmp_path / "a.json", space.plan(space.uniform(0.5)).ratios)
    config = make_config(**{"search.initial_plans": [file], "search.warm_start": False})
    assert [start.provenance for start in initial_plans_of(config, space, {})] == [PLAN]


def test_plans_by_sensitivity_that_were_handed_out_are_not_handed_out_again() -> None:
    """What was known then decided on their sizes, so that their levels do not tell."""
    space = build_space(make_table(channels=512), SpaceSection(), sizes=(320, 256))
    baseline = {"sensitivity": [{"keep": 1 - k / 40, "ratios": {"model.0.c0": k / 40}} for k in range(1, 33)]}
    config = make_config(**{"search.trials": 12})
    every = initial_plans_of(config, space, baseline)
    assert len(every) == 6
    assert initial_plans_of(config, space, baseline, begun=2) == every[2:]


def test_a_plan_of_another_model_is_refused_by_its_layer(tmp_path: Path) -> None:
    file = saved(tmp_path / "a.json", {"model.99.conv": 0.5})
    with pytest.raises(ConfigError, match=r"a\.json must be of this model, but it prunes model\.99\.conv"):
        check_plans([file], ["model.0.conv"])
    check_plans([file], ["model.99.conv"])


def test_a_plan_outside_the_space_is_said_to_be_changed_and_into_what(tmp_path: Path) -> None:
    space = make_space()  # ratios up to 0.7, in steps of 8 of 64 channels
    inside = saved(tmp_path / "in.json", space.plan(space.uniform(0.5)).ratios)
    alone = saved(tmp_path / "alone.json", {"model.0.d0": 0.5})  # its twin c0 moves with it
    beyond = saved(tmp_path / "out.json", {"model.0.c0": 0.875, "model.1.c0": 0.3, "model.1.c1": 0.5})
    fixed = saved(tmp_path / "fixed.json", {"model.9.head": 0.5})
    assert changed_plans([inside, alone], space, 640) == []
    lines = changed_plans([inside, beyond, fixed], space, 640)
    assert len(lines) == 2
    assert "out.json lies outside the search space and is tried with model.0.c0 0.875 -> 0.625, " in lines[0]
    assert "model.1.c0 0.3 -> 0.25; to try it as it is, widen space.imgsz, space.precision, space.max_ratio" in lines[0]
    assert "is tried with model.9.head 0.5 -> 0;" in lines[1]
    Plan({"model.0.c0": 0.5}, precision="int8").save(tmp_path / "int8.json")
    (line,) = changed_plans([str(tmp_path / "int8.json")], space, 640)
    assert "is tried with precision int8 -> fp32;" in line
    tried = initial_plans_of(make_config(**{"search.initial_plans": [beyond], "search.warm_start": False}), space, {})[
        0
    ]
    assert space.plan(tried.levels).ratios["model.0.d0"] == 0.625


def other_run(tmp_path: Path, imgsz: int, baseline: dict[str, Any] | None) -> tuple[RunConfig, Path]:
    """A configuration that starts from a run on `old.pt`, and that checkpoint."""
    theirs, ours = tmp_path / "old.pt", tmp_path / "new.pt"
    for file in (theirs, ours):
        file.write_bytes(b"weights")
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    make_config(**{"model.path": str(theirs), "model.imgsz": imgsz}).save(folder.config)
    if baseline is not None:
        folder.write_baseline({"metrics": METRICS, **baseline})
    settings = {"model.path": str(ours), "model.imgsz": 320, "search.warm_start_run": str(folder.path)}
    return make_config(**settings), theirs


def test_a_run_on_the_same_weights_is_taken_whatever_the_file_is_called(tmp_path: Path) -> None:
    config, theirs = other_run(tmp_path, 320, {"weights_hash": weights_hash(Path(__file__))})
    with pytest.raises(ConfigError, match="must be of the same weights"):
        check_other_run(config)
    RunFolder(tmp_path / "run").write_baseline({"metrics": METRICS, "weights_hash": weights_hash(theirs)})
    check_other_run(config)


def test_a_run_of_before_hashes_were_kept_is_judged_by_its_checkpoint(tmp_path: Path) -> None:
    config, theirs = other_run(tmp_path, 320, {})
    check_other_run(config)
    theirs.write_bytes(b"other weights")
    with pytest.raises(ConfigError, match="must be of the same weights"):
        check_other_run(config)
    theirs.unlink()
    with pytest.raises(ConfigError, match="its model has the hash unknown"):
        check_other_run(config)


def plan_ids(config: RunConfig) -> list[str]:
    """Of the other run's trials those whose plans are settled for ours."""
    other = read_other_run(config, {"metrics": METRICS})
    assert other is not None
    assert other.retried == ()
    return [record.trial_id for record in other.told]


def test_stopped_and_failed_trials_count_unless_ours_would_let_them_go_on(tmp_path: Path) -> None:
    config, _ = other_run(tmp_path, 320, {})
    folder = RunFolder(tmp_path / "run")
    slow: dict[str, Any] = {"metrics": {"map50_95": 0.1, "latency_ms": 9.0, "latency_ratio": 0.9}}
    for trial_id, state, more in (
        ("done", TrialState.COMPLETED, {}),
        ("stopped", TrialState.STOPPED, {}),
        ("failed", TrialState.FAILED, {"metrics": {}, "error": "out of memory"}),
        ("slow", TrialState.STOPPED, {**slow, "violations": {"max_latency_ms": 0.5}}),
    ):
        values: dict[str, Any] = {"ratios": {"model.0.c0": 0.5}, "metrics": METRICS, "plan_hash": trial_id, **more}
        folder.store.append(
            TrialRecord(trial_id=trial_id, state=state, epochs=0, fidelity="refit", finished_at=1.0, **values)
        )
    assert plan_ids(config) == ["done", "stopped", "failed"]

    def ours(**settings: Any) -> RunConfig:
        return config.model_copy(update={"search": config.search.model_copy(update=settings)})

    assert plan_ids(ours(max_latency_ms=8.0)) == ["done", "stopped", "failed", "slow"]
    assert plan_ids(ours(max_latency_ms=9.5)) == ["done", "stopped", "failed"]
    assert plan_ids(ours(objectives=["map50_95", "params_m"])) == ["done", "failed"]
    assert plan_ids(ours(early_stopping=False)) == ["done", "failed"]


def test_a_run_at_another_size_and_what_is_no_run_are_refused(tmp_path: Path) -> None:
    config, _ = other_run(tmp_path, 640, {})
    with pytest.raises(ConfigError, match="must be at 320 px, but it is at 640 px"):
        check_other_run(config)
    with pytest.raises(ConfigError, match="must be a run folder with its baseline"):
        check_other_run(make_config(**{"search.warm_start_run": str(tmp_path)}))


def test_another_run_s_latencies_are_those_of_its_ratios_here() -> None:
    """On every kind of device: this run's unpruned network may be timed at another clock."""
    metrics = {"map50_95": 0.5, "latency_ms": 6.0, "latency_ratio": 0.6, "latency_ms_pi": 90.0, "latency_ratio_pi": 0.9}
    ours = {"map50_95": 0.6, "latency_ms": 11.0, "latency_ms_pi": 80.0}
    found = initial_plans._rebased(as_record("t0001", metrics), ours).metrics
    assert (found["latency_ms"], found["latency_ms_pi"]) == pytest.approx((6.6, 72.0))
