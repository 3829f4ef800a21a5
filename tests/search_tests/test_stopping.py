"""The stopping rule's promises, over many random situations, and who reads what for it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from search.events import PhaseClock
from search.judge import FolderJudge, rung_reports
from search.rungs import Course, RungReport
from search.stopping import StoppingRule, rungs_of

RULE = StoppingRule()


def report(name: str, accuracy: float, latency: float, epochs: int = 0) -> RungReport:
    return RungReport(name, epochs, accuracy, {"latency_ms": latency, "gflops": 8.0})


def crowd(seed: int, count: int = 30) -> list[RungReport]:
    """Trials scattered below a front on which accuracy grows with latency."""
    generator = random.Random(seed)
    latencies = [generator.uniform(5.0, 20.0) for _ in range(count)]
    return [
        report(f"t{i:02d}", 0.6 * latency / 20.0 * generator.uniform(0.3, 1.0), latency)
        for i, latency in enumerate(latencies)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_who_dominates_all_goes_on(seed: int) -> None:
    others = crowd(seed)
    best = report("new", max(o.accuracy for o in others) + 0.01, min(o.costs["latency_ms"] for o in others) - 0.1)
    assert not RULE.stops(best, others)


@pytest.mark.parametrize("seed", range(20))
def test_who_is_dominated_by_nearly_all_is_stopped(seed: int) -> None:
    others = crowd(seed)
    accuracies = sorted(o.accuracy for o in others)
    latencies = sorted(o.costs["latency_ms"] for o in others)
    # one trial may be slower, another less accurate
    worst = report("new", (accuracies[0] + accuracies[1]) / 2, (latencies[-1] + latencies[-2]) / 2)
    assert RULE.stops(worst, others)


@pytest.mark.parametrize("seed", range(20))
def test_the_front_goes_on_its_fast_and_inaccurate_end_too(seed: int) -> None:
    others = crowd(seed)
    for one in others:
        rest = [other for other in others if other is not one]
        dominated = any(
            other.accuracy >= one.accuracy and other.costs["latency_ms"] <= one.costs["latency_ms"] for other in rest
        )
        if not dominated:
            assert not RULE.stops(one, rest)
    fastest = report("new", 0.001, min(o.costs["latency_ms"] for o in others) - 0.1)
    assert not RULE.stops(fastest, others)


@pytest.mark.parametrize("seed", range(20))
def test_among_the_fast_some_of_the_dominated_go_on_and_among_the_slow_some_are_stopped(seed: int) -> None:
    others = crowd(seed, 60)
    by_latency = sorted(others, key=lambda one: one.costs["latency_ms"])
    for third in (by_latency[:20], by_latency[20:40], by_latency[40:]):
        kept = [one for one in third if not RULE.stops(one, [other for other in others if other is not one])]
        assert 3 <= len(kept) <= 14


@pytest.mark.parametrize("seed", range(10))
def test_order_plays_no_part_and_a_second_question_has_the_same_answer(seed: int) -> None:
    others = crowd(seed)
    shuffled = list(others)
    random.Random(seed + 1).shuffle(shuffled)
    for new in crowd(seed + 100, 10):
        one = report("new", new.accuracy, new.costs["latency_ms"])
        assert RULE.stops(one, others) == RULE.stops(one, shuffled) == RULE.stops(one, [*shuffled, one])


@pytest.mark.parametrize("seed", range(10))
def test_more_accuracy_at_equal_latency_never_hurts(seed: int) -> None:
    others = crowd(seed)
    for latency in (6.0, 12.0, 18.0):
        decisions = [RULE.stops(report("new", accuracy / 50, latency), others) for accuracy in range(35)]
        assert decisions == sorted(decisions, reverse=True)


def test_few_others_stop_nobody() -> None:
    others = crowd(0, RULE.neighbours - 1)
    assert not RULE.stops(report("new", 0.0, 99.0), others)
    assert RULE.stops(report("new", 0.0, 99.0), crowd(0, RULE.neighbours))


def test_other_rungs_do_not_count() -> None:
    assert not RULE.stops(report("new", 0.0, 99.0, epochs=3), crowd(0))


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
    Course(one.trial_id, (one.epochs,), FolderJudge(folder.parent, StoppingRule(neighbours=999)), "map50_95", one.costs,
           clock).reached(one.epochs, {"map50_95": one.accuracy})  # fmt: skip
    if finished:
        (folder / "record.json").write_text("{}")


def test_the_judge_decides_by_what_trials_wrote_whether_they_run_or_have_ended(tmp_path: Path) -> None:
    others = crowd(3)
    for index, one in enumerate(others):
        write(tmp_path / one.trial_id, one, finished=index % 2 == 0)
    judge = FolderJudge(tmp_path, RULE)
    assert sorted(judge.reports(), key=lambda r: r.trial_id) == others
    for new in crowd(4):
        one = report("new", new.accuracy, new.costs["latency_ms"])
        assert judge.stops(one) == RULE.stops(one, others) == FolderJudge(tmp_path, RULE).stops(one)


def test_a_running_trials_next_rung_is_seen(tmp_path: Path) -> None:
    judge = FolderJudge(tmp_path, RULE)
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
    assert not FolderJudge(tmp_path / "gone", RULE).stops(report("new", 0.0, 99.0))
