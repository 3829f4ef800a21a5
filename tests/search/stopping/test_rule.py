"""The stopping rule's promises, over many random situations, and who reads what for it."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from paretoprune.search.stopping.early_stopper import LocalEarlyStopper, rung_reports
from paretoprune.search.stopping.rule import StoppingRule, rungs_of
from paretoprune.search.stopping.rungs import Course, RungReport
from paretoprune.search.storage.event_log import PhaseClock
from paretoprune.search.worker.worker import stopping_rule
from tests.search.fakes import make_config

RULE = StoppingRule()


COSTS = ("latency_ms", "params_m", "gflops", "size_mb", "energy_j")


@pytest.fixture(params=COSTS)
def cost(request: pytest.FixtureRequest) -> str:
    """The run's objective of economy: every promise holds by it, whatever the other figures say."""
    return str(request.param)


def report(name: str, accuracy: float, value: float, epochs: int = 0, cost: str = "latency_ms") -> RungReport:
    """A trial of which ``cost`` has the value; its other costs are in the opposite order."""
    return RungReport(name, epochs, accuracy, {other: value if other == cost else 1000.0 - value for other in COSTS})


def crowd(seed: int, count: int = 30, cost: str = "latency_ms") -> list[RungReport]:
    """Trials scattered below a front on which accuracy grows with cost."""
    generator = random.Random(seed)
    values = [generator.uniform(5.0, 20.0) for _ in range(count)]
    return [
        report(f"t{i:02d}", 0.6 * value / 20.0 * generator.uniform(0.3, 1.0), value, cost=cost)
        for i, value in enumerate(values)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_who_dominates_all_goes_on(seed: int, cost: str) -> None:
    others = crowd(seed, cost=cost)
    best = report("new", max(o.accuracy for o in others) + 0.01, min(o.costs[cost] for o in others) - 0.1, cost=cost)
    assert not StoppingRule(costs=(cost,)).stops(best, others)


@pytest.mark.parametrize("seed", range(20))
def test_who_is_dominated_by_nearly_all_is_stopped(seed: int, cost: str) -> None:
    others = crowd(seed, cost=cost)
    accuracies = sorted(o.accuracy for o in others)
    values = sorted(o.costs[cost] for o in others)
    # one trial may be costlier, another less accurate
    worst = report("new", (accuracies[0] + accuracies[1]) / 2, (values[-1] + values[-2]) / 2, cost=cost)
    assert StoppingRule(costs=(cost,)).stops(worst, others)


@pytest.mark.parametrize("seed", range(20))
def test_the_front_goes_on_its_cheap_and_inaccurate_end_too(seed: int, cost: str) -> None:
    rule, others = StoppingRule(costs=(cost,)), crowd(seed, cost=cost)
    for one in others:
        rest = [other for other in others if other is not one]
        dominated = any(other.accuracy >= one.accuracy and other.costs[cost] <= one.costs[cost] for other in rest)
        if not dominated:
            assert not rule.stops(one, rest)
    cheapest = report("new", 0.001, min(o.costs[cost] for o in others) - 0.1, cost=cost)
    assert not rule.stops(cheapest, others)


@pytest.mark.parametrize("seed", range(20))
def test_among_the_cheap_some_of_the_dominated_go_on_and_among_the_costly_some_are_stopped(
    seed: int, cost: str
) -> None:
    rule, others = StoppingRule(costs=(cost,)), crowd(seed, 60, cost)
    by_cost = sorted(others, key=lambda one: one.costs[cost])
    for third in (by_cost[:20], by_cost[20:40], by_cost[40:]):
        kept = [one for one in third if not rule.stops(one, [other for other in others if other is not one])]
        assert 3 <= len(kept) <= 14


@pytest.mark.parametrize("costs", [("latency_ms",), ("params_m",), ("latency_ms", "params_m"), ()])
@pytest.mark.parametrize("seed", range(10))
def test_order_plays_no_part_and_a_second_question_has_the_same_answer(seed: int, costs: tuple[str, ...]) -> None:
    rule, others = StoppingRule(costs=costs), crowd(seed)
    shuffled = list(others)
    random.Random(seed + 1).shuffle(shuffled)
    for new in crowd(seed + 100, 10):
        one = report("new", new.accuracy, new.costs["latency_ms"])
        assert rule.stops(one, others) == rule.stops(one, shuffled) == rule.stops(one, [*shuffled, one])


@pytest.mark.parametrize("seed", range(10))
def test_more_accuracy_at_equal_cost_never_hurts(seed: int, cost: str) -> None:
    rule, others = StoppingRule(costs=(cost,)), crowd(seed, cost=cost)
    for value in (6.0, 12.0, 18.0):
        decisions = [rule.stops(report("new", accuracy / 50, value, cost=cost), others) for accuracy in range(35)]
        assert decisions == sorted(decisions, reverse=True)


@pytest.mark.parametrize("seed", range(10))
def test_over_two_costs_the_front_of_all_three_goes_on_and_who_is_worst_in_all_is_stopped(seed: int) -> None:
    generator = random.Random(seed)
    rule = StoppingRule(costs=("latency_ms", "params_m"))
    others = [
        RungReport(
            f"t{i}", 0, generator.random(), {"latency_ms": 5 + generator.random(), "params_m": generator.random()}
        )
        for i in range(30)
    ]
    for one in others:
        rest = [other for other in others if other is not one]
        dominated = any(
            other.accuracy >= one.accuracy and all(other.costs[name] <= one.costs[name] for name in rule.costs)
            for other in rest
        )
        if not dominated:
            assert not rule.stops(one, rest)
    assert rule.stops(RungReport("new", 0, -1.0, {"latency_ms": 9.0, "params_m": 9.0}), others)
    small = RungReport("new", 0, -1.0, {"latency_ms": 9.0, "params_m": -1.0})
    assert not rule.stops(small, others)
    assert StoppingRule(costs=("latency_ms",)).stops(small, others)


@pytest.mark.parametrize("seed", range(10))
def test_a_cost_that_all_share_changes_no_decision(seed: int) -> None:
    others = [RungReport(o.trial_id, 0, o.accuracy, {**o.costs, "params_m": 3.0}) for o in crowd(seed)]
    for one in others:
        rest = [other for other in others if other is not one]
        assert StoppingRule(costs=("latency_ms", "params_m")).stops(one, rest) == RULE.stops(one, rest)


def test_without_a_cost_the_most_accurate_third_goes_on() -> None:
    rule, others = StoppingRule(costs=()), [report(f"t{i}", i / 30, 10.0) for i in range(30)]
    kept = [one.accuracy for one in others if not rule.stops(one, [other for other in others if other is not one])]
    assert kept == [i / 30 for i in range(20, 30)]


def test_a_run_compares_by_its_own_objectives() -> None:
    def rule(*objectives: str) -> StoppingRule:
        return stopping_rule(make_config(**{"search.objectives": list(objectives), "search.reduction_factor": 4.0}))

    assert rule("map50_95", "latency_ms") == StoppingRule(4.0, ("latency_ms",))
    assert rule("map50_95", "size_mb") == StoppingRule(4.0, ("size_mb",))
    assert rule("gflops", "map50_95", "params_m") == StoppingRule(4.0, ("gflops", "params_m"))
    assert rule("map50_95", "map50") == StoppingRule(4.0, ())


def test_few_others_stop_nobody() -> None:
    others = crowd(0, RULE.neighbours - 1)
    assert not RULE.stops(report("new", 0.0, 99.0), others)
    assert RULE.stops(report("new", 0.0, 99.0), crowd(0, RULE.neighbours))


def test_other_rungs_do_not_count() -> None:
    assert not RULE.stops(report("new", 0.0, 99.0, epochs=3), crowd(0))


def test_trials_of_another_precision_do_not_count() -> None:
    """What they lose when they are quantised is not in their accuracy on the way."""
    worst = report("new", 0.0, 99.0)
    assert RULE.stops(worst, crowd(0))
    assert not RULE.stops(replace(worst, precision="int8"), crowd(0))
    assert RULE.stops(replace(worst, precision="int8"), [replace(other, precision="int8") for other in crowd(0)])


def test_equal_trials_all_go_on() -> None:
    others = [report(f"t{i}", 0.5, 10.0) for i in range(20)]
    assert not RULE.stops(report("new", 0.5, 10.0), others)


def test_work_is_compared_where_latency_is_not_known_yet() -> None:
    others = [RungReport(f"t{i}", 0, 0.5, {"gflops": float(i)}) for i in range(20)]
    assert RULE.stops(RungReport("new", 0, 0.1, {"gflops": 30.0}), others)
    assert not RULE.stops(RungReport("new", 0, 0.1, {"gflops": -1.0}), others)


@pytest.mark.parametrize(
    ("epochs", "rungs"), [(0, ()), (1, (0,)), (3, (0, 1)), (5, (0, 1)), (9, (0, 1, 3)), (30, (0, 1, 3, 10))]
)
def test_rungs(epochs: int, rungs: tuple[int, ...]) -> None:
    assert rungs_of(epochs, 3.0) == rungs


def write(folder: Path, one: RungReport, finished: bool = True) -> None:
    clock = PhaseClock(folder / "events.jsonl")
    folder.mkdir(parents=True, exist_ok=True)
    stopper = LocalEarlyStopper(folder.parent, StoppingRule(neighbours=999))
    course = Course(one.trial_id, (one.epochs,), stopper, "map50_95", one.costs, clock)
    course.reached(one.epochs, {"map50_95": one.accuracy})
    if finished:
        (folder / "record.json").write_text("{}")


def test_the_judge_decides_by_what_trials_wrote_whether_they_run_or_have_ended(tmp_path: Path) -> None:
    others = crowd(3)
    for index, one in enumerate(others):
        write(tmp_path / one.trial_id, one, finished=index % 2 == 0)
    judge = LocalEarlyStopper(tmp_path, RULE)
    assert sorted(judge.reports(), key=lambda r: r.trial_id) == others
    for new in crowd(4):
        one = report("new", new.accuracy, new.costs["latency_ms"])
        assert judge.stops(one) == RULE.stops(one, others) == LocalEarlyStopper(tmp_path, RULE).stops(one)


def test_a_running_trials_next_rung_is_seen(tmp_path: Path) -> None:
    judge = LocalEarlyStopper(tmp_path, RULE)
    write(tmp_path / "t00", report("t00", 0.3, 9.0), finished=False)
    assert [one.epochs for one in judge.reports()] == [0]
    write(tmp_path / "t00", report("t00", 0.4, 9.0, epochs=1))
    assert [one.epochs for one in judge.reports()] == [0, 1]
    assert [one.epochs for one in judge.reports()] == [0, 1]


def test_a_trial_begun_again_counts_once_and_a_torn_line_not_at_all(tmp_path: Path) -> None:
    write(tmp_path / "t00", report("t00", 0.3, 9.0), finished=False)
    write(tmp_path / "t00", report("t00", 0.35, 9.0), finished=False)
    events = tmp_path / "t00" / "events.jsonl"
    with events.open("a") as stream:
        stream.write('{"time": 1.0, "event": "rung", "epochs": 1, "accu')
    assert rung_reports(events, "t00") == [report("t00", 0.35, 9.0)]
    assert json.loads(events.read_text().splitlines()[0])["event"] == "rung"


def test_a_folder_that_is_gone_stops_nobody(tmp_path: Path) -> None:
    assert not LocalEarlyStopper(tmp_path / "gone", RULE).stops(report("new", 0.0, 99.0))
