"""What is asked for against a search over all trials."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from paretoprune.results.errors import ResultsError
from paretoprune.results.selection.picks import BY_HAND, pick_trials
from paretoprune.results.selection.selection import comparable, knee, spread
from paretoprune.results.store.bounds import Bounds
from paretoprune.results.store.records import TrialRecord
from tests.results.conftest import synthetic_baseline, synthetic_records

Build = Callable[..., TrialRecord]
ALL_BOUNDS = [
    Bounds(),
    Bounds(max_latency_ms=8.0),
    Bounds(max_latency_ratio=0.6),
    Bounds(min_speedup=1.5),
    Bounds(max_latency_ratio=0.9, min_speedup=1.6),
    Bounds(max_params_m=1.5),
    Bounds(max_gflops=1.2),
    Bounds(min_map=0.45),
    Bounds(max_drop=0.2),
    Bounds(max_latency_ms=9.0, max_params_m=2.0, max_gflops=1.6, min_map=0.3, max_drop=0.25),
]


def keeps(bounds: Bounds, record: TrialRecord) -> bool:
    metrics, floor = record.metrics, 0.612 - (1 if bounds.max_drop is None else bounds.max_drop)
    return (
        metrics["latency_ms"] <= (bounds.max_latency_ms or 1e9)
        and metrics["latency_ms"] <= 12.4 * (bounds.max_latency_ratio or 1e9)
        and 12.4 / metrics["latency_ms"] >= (bounds.min_speedup or 0)
        and metrics["params_m"] <= (bounds.max_params_m or 1e9)
        and metrics["gflops"] <= (bounds.max_gflops or 1e9)
        and metrics["map50_95"] >= max(bounds.min_map or 0, floor)
    )


@pytest.mark.parametrize("bounds", ALL_BOUNDS, ids=str)
def test_single_wishes_within_bounds(bounds: Bounds) -> None:
    records, baseline = synthetic_records(46), synthetic_baseline()
    within = [item for item in comparable(records) if keeps(bounds, item)]
    assert bounds.within(comparable(records), baseline) == within
    wanted = {
        "best": max(within, key=lambda item: item.metrics["map50_95"]),
        "fastest": min(within, key=lambda item: item.metrics["latency_ms"]),
        "smallest": min(within, key=lambda item: (item.metrics["params_m"], -item.metrics["map50_95"])),
        "knee": knee(within),
    }
    for wish, record in wanted.items():
        (pick,) = pick_trials(records, baseline, [wish], bounds)
        assert pick.record == record
        assert str(bounds) in pick.chosen_as or wish == "knee"
    assert [pick.record for pick in pick_trials(records, baseline, ["spread:3"], bounds)] == spread(within, 3)


@pytest.mark.parametrize("number", ["0.02", "0.1", "0.3", "1", "1.5", "2.2"])
@pytest.mark.parametrize("bounds", [Bounds(), Bounds(max_params_m=2.0)], ids=str)
def test_the_fastest_within_a_drop_and_the_most_accurate_at_a_speed(number: str, bounds: Bounds) -> None:
    records, baseline, limit = synthetic_records(46), synthetic_baseline(), float(number)
    within = [item for item in comparable(records) if keeps(bounds, item)]
    close = [item for item in within if item.metrics["map50_95"] >= 0.612 - limit]
    fast = [item for item in within if item.metrics["latency_ms"] <= 12.4 / limit]
    wanted = {
        "within": min(close, key=lambda item: item.metrics["latency_ms"], default=None),
        "speedup": max(fast, key=lambda item: item.metrics["map50_95"], default=None),
    }
    assert any(wanted.values())
    for word, record in wanted.items():
        wish = f"{word}:{number}"
        if record is None:
            with pytest.raises(ResultsError, match=f"--pick {wish} finds no trial .* the nearest is t0"):
                pick_trials(records, baseline, [wish], bounds)
        else:
            (pick,) = pick_trials(records, baseline, [wish], bounds)
            assert pick.record == record


def test_a_number_takes_what_the_bounds_ask_for_first() -> None:
    records, baseline = synthetic_records(46), synthetic_baseline()
    bounds = Bounds(max_latency_ms=9.0, max_drop=0.2)
    picks = pick_trials(records, baseline, ["3"], bounds)
    assert len(picks) == 3
    (best,), (fastest,) = (pick_trials(records, baseline, [wish], bounds) for wish in ("best", "fastest"))
    assert [pick.record for pick in picks[:2]] == [best.record, fastest.record]
    assert picks[0].chosen_as == "most accurate with at most 9 ms, an accuracy at most 0.2 below the baseline's"


def test_several_wishes_give_each_trial_once_and_ids_need_no_bounds(record: Build, baseline: dict[str, Any]) -> None:
    records = [record("slow", 0.6, 12.0), record("fast", 0.4, 5.0), record("stopped", 0.5, 4.0, state="stopped")]
    picks = pick_trials(records, baseline, ["best", "slow", "stopped", "fastest", "2"], Bounds(min_map=0.39))
    assert [(pick.trial_id, pick.chosen_as) for pick in picks] == [
        ("slow", "most accurate with an accuracy of at least 0.39"),
        ("stopped", BY_HAND),
        ("fast", "fastest with an accuracy of at least 0.39"),
    ]
    assert pick_trials(records, baseline, ["slow"], Bounds(max_latency_ms=1.0))[0].trial_id == "slow"


@pytest.mark.parametrize(
    ("wishes", "bounds", "line"),
    [
        (["best"], Bounds(max_latency_ms=0.1), "--pick best finds no completed trial with at most 0.1 ms; loosen"),
        (
            ["kneee"],
            Bounds(),
            "a pick must be K, knee, best, fastest, smallest, within:DROP, speedup:FACTOR, spread:K or a finished",
        ),
        (["within:"], Bounds(), "but got 'within:'"),
        (["within:nan"], Bounds(), "but got 'within:nan'"),
        (["speedup:0"], Bounds(), "but got 'speedup:0'"),
        (["speedup:x"], Bounds(), "but got 'speedup:x'"),
        (["within:0.1"], Bounds(), "mAP50-95 0.612; the nearest is only, 0.1120 below it"),
        (["speedup:3"], Bounds(), "3 times as fast as the unpruned model; the nearest is only, 2.48 times as fast"),
        (["within:0.2"], Bounds(max_latency_ms=4), "--pick within:0.2 finds no completed trial with at most 4 ms;"),
        (["spread:x"], Bounds(), "but got 'spread:x'"),
        (["smallest"], Bounds(), "--pick smallest finds no completed trial with the metric"),
    ],
)
def test_what_cannot_be_granted(
    wishes: list[str], bounds: Bounds, line: str, record: Build, baseline: dict[str, Any]
) -> None:
    with pytest.raises(ResultsError) as caught:
        pick_trials([record("only", 0.5, 5.0)], baseline, wishes, bounds)
    assert line in str(caught.value)


def test_bounds_refuse_nonsense_and_need_the_metric(record: Build, baseline: dict[str, Any]) -> None:
    with pytest.raises(ResultsError, match="max_params_m must be at least 0, but got -1"):
        Bounds(max_params_m=-1)
    assert not Bounds(max_params_m=5).admit(record("a"), baseline)
    assert Bounds(max_drop=-0.1).admit(record("a", 0.713), baseline)
    assert not Bounds(max_drop=-0.1).admit(record("a", 0.70), baseline)
    assert not Bounds().given
    assert pick_trials([], baseline, ["3"]) == []
