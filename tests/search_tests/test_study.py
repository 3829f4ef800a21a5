"""The study: ladder first, no plan twice, nothing left running, NaN never told, replay."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from search.config_sections import SpaceSection
from search.errors import TrialError
from search.ladder import Start, ladder_plans, warm_start
from search.space import Levels, Space, build_space
from search.study import STUDY_NAME, SearchStudy
from tests.search_tests.fakes import accuracy_of, make_space, make_table

OBJECTIVES = {"map50_95": "max", "latency_ms": "min"}
SAMPLERS = ["gp", "tpe", "nsga2", "nsga3", "random"]


def metrics_of(space: Space, levels: Levels) -> dict[str, float]:
    ratios = space.ratios(levels)
    return {"map50_95": accuracy_of(ratios), "latency_ms": 20.0 / (1 + sum(ratios.values()))}


def explore(study: SearchStudy, space: Space, count: int) -> list[tuple[Levels, str]]:
    seen = []
    for _ in range(count):
        suggestion = study.ask()
        if suggestion is None:
            break
        study.tell(suggestion.number, metrics_of(space, suggestion.levels))
        seen.append((suggestion.levels, suggestion.provenance))
    return seen


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_ladder_first_then_the_sampler_and_no_plan_twice(sampler: str) -> None:
    space = make_space()
    ladder = ladder_plans(space, 16)
    seen = explore(
        SearchStudy(space, OBJECTIVES, sampler, seed=3, starts=[Start(levels, "ladder") for levels in ladder]),
        space,
        16,
    )
    assert [levels for levels, _ in seen[: len(ladder)]] == ladder
    assert {who for _, who in seen[: len(ladder)]} == {"ladder"}
    assert {who for _, who in seen[len(ladder) :]} <= {sampler, "random"}
    assert max(Counter(levels for levels, _ in seen).values()) == 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_equal_seeds_give_equal_plans_one_at_a_time(sampler: str) -> None:
    space = make_space()
    runs = [
        explore(SearchStudy(space, OBJECTIVES, sampler, seed=5, starts=warm_start(space, 12)), space, 12) for _ in "ab"
    ]
    other = explore(SearchStudy(space, OBJECTIVES, sampler, seed=6, starts=warm_start(space, 12)), space, 12)
    assert runs[0] == runs[1]
    assert runs[0] != other


@pytest.mark.parametrize("sampler", ["gp", "tpe", "random"])
def test_a_small_space_is_walked_completely_and_then_over(sampler: str) -> None:
    space = build_space(make_table(2), SpaceSection(round_to=16, max_ratio=0.5))
    assert space.count() == 9
    seen = explore(SearchStudy(space, OBJECTIVES, sampler), space, 50)
    assert len({levels for levels, _ in seen}) == len(seen) == 9


def test_running_trials_count_as_seen() -> None:
    space = make_space()
    study = SearchStudy(space, OBJECTIVES, "random", starts=warm_start(space, 12))
    levels = [study.ask() for _ in range(30)]
    assert len({suggestion.levels for suggestion in levels if suggestion}) == 30


def test_failed_and_unfinished_trials_end_as_fail(tmp_path: Path) -> None:
    space = make_space()
    study = SearchStudy(space, OBJECTIVES, "random", journal=tmp_path / "study.journal")
    first, second, third = (study.ask(f"t{i}") for i in range(3))
    assert first
    assert second
    assert third
    study.tell(first.number, metrics_of(space, first.levels))
    study.fail(second.number, "no luck")
    study.close()
    reopened = optuna.load_study(
        study_name=STUDY_NAME, storage=JournalStorage(JournalFileBackend(str(tmp_path / "study.journal")))
    )
    assert [trial.state for trial in reopened.trials] == [TrialState.COMPLETE, TrialState.FAIL, TrialState.FAIL]
    assert [trial.user_attrs["trial_id"] for trial in reopened.trials] == ["t0", "t1", "t2"]
    assert reopened.trials[1].user_attrs["reason"] == "no luck"
    assert [d.name for d in reopened.directions] == ["MAXIMIZE", "MINIMIZE"]


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "fast"])
def test_what_is_not_finite_is_never_told(value: object) -> None:
    space = make_space()
    study = SearchStudy(space, OBJECTIVES, "random")
    suggestion = study.ask()
    assert suggestion
    with pytest.raises(TrialError, match="the objective latency_ms must be a finite number"):
        study.tell(suggestion.number, {"map50_95": 0.5, "latency_ms": value})
    assert [trial.state for trial in study.study.trials] == [TrialState.FAIL]


def test_replayed_trials_are_known_to_the_sampler_and_not_asked_again() -> None:
    space = make_space()
    ladder = ladder_plans(space, 12)
    study = SearchStudy(space, OBJECTIVES, "gp", starts=[Start(levels, "ladder") for levels in ladder])
    study.replay(ladder[0], metrics_of(space, ladder[0]), "t0000")
    study.replay(ladder[1], None, "t0001")
    assert [trial.state for trial in study.study.trials] == [TrialState.COMPLETE, TrialState.FAIL]
    assert study.study.best_trials[0].values == pytest.approx(list(metrics_of(space, ladder[0]).values()))
    asked = explore(study, space, 5)
    assert asked[0][0] == ladder[2]
    assert not {levels for levels, _ in asked} & set(ladder[:2])


def test_gp_learns_where_random_does_not() -> None:
    """With equal trials the GP's front covers more than random search's: the study really tells it the values."""
    import numpy as np

    from results.pareto import hypervolume

    space = make_space()

    def volume(sampler: str) -> float:
        study = SearchStudy(space, OBJECTIVES, sampler, seed=1)
        explore(study, space, 24)
        losses = np.array([[-t.values[0], t.values[1]] for t in study.study.trials if t.state == TrialState.COMPLETE])
        return hypervolume(losses, np.array([0.0, 20.0]))

    assert volume("gp") > volume("random")
