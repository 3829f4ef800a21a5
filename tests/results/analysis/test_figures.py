"""The values that the figures show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from paretoprune.results.analysis.figures import front_figure, hypervolume_curve, point, time_figure
from paretoprune.results.analysis.widths import widths_figure
from paretoprune.results.report.axes import label_levels, plane_axes
from paretoprune.results.selection.pareto import hypervolume
from paretoprune.results.selection.selection import choose, comparable, front
from paretoprune.results.store.objectives import to_losses
from paretoprune.results.store.records import TrialRecord
from paretoprune.results.store.run_folder import RunFolder

Build = Callable[..., TrialRecord]


def test_every_measured_trial_is_on_the_plane_once(records: list[TrialRecord], baseline: dict[str, Any]) -> None:
    figure = front_figure(records, baseline, choose(records, baseline), [])
    names = [item.name for group in (figure.front, figure.dominated, figure.apart) for item in group]
    assert sorted(names) == sorted(record.trial_id for record in records if record.state.value != "failed")
    assert {item.name for item in figure.front} == {record.trial_id for record in front(records)}
    assert {item.ending for item in figure.apart} == {"stopped"}
    assert figure.fidelity == "3 epochs"
    assert figure.knee is not None
    assert figure.knee in figure.front


def test_the_line_is_a_rising_staircase_that_no_trial_beats(
    records: list[TrialRecord], baseline: dict[str, Any]
) -> None:
    figure = front_figure(records, baseline, [], [])
    latencies, accuracies = zip(*figure.line, strict=True)
    assert list(latencies) == sorted(latencies)
    assert list(accuracies) == sorted(accuracies)
    for item in figure.dominated:
        assert any(s <= item.latency_ms and a >= item.accuracy for s, a in figure.line)


def test_latency_follows_the_ratio_not_the_clock() -> None:
    drifted = {"map50_95": 0.5, "latency_ms": 99.0, "latency_ratio": 0.5, "speedup_ci95": [1.6, 2.5]}
    found = point("a", drifted, base_ms=10.0, fidelity="full")
    assert found is not None
    assert (found.latency_ms, found.speedup) == (5.0, 2.0)
    assert found.latency_interval_ms == (4.0, 6.25)
    plain = point("a", {"map50_95": 0.5, "latency_ms": 8.0}, base_ms=10.0, fidelity="full")
    assert plain is not None
    assert (plain.latency_ms, plain.latency_interval_ms) == (8.0, None)
    assert point("a", {"map50_95": 0.5}, base_ms=10.0, fidelity="full") is None


def test_a_pick_measured_without_a_ratio_is_paired_with_its_session(
    record: Build, baseline: dict[str, Any], make_run: Callable[..., RunFolder]
) -> None:
    records = [record("a", 0.5, 8.0)]
    folder = make_run(records)
    after = {"map50_95": 0.6, "latency_ms": 10.0}
    folder.write_selected("a", {"after": after, "baseline": {"map50_95": 0.6, "latency_ms": 20.0}, "chosen_as": "knee"})
    figure = front_figure(records, baseline, [], folder.read_selected())
    (move,) = figure.picks
    assert move.after is not None
    assert move.after.latency_ms == pytest.approx(6.2)  # half of the run's 12.4 ms


def test_picks_are_the_finished_ones_and_the_suggested_ones_before(
    records: list[TrialRecord], baseline: dict[str, Any], make_run: Callable[..., RunFolder]
) -> None:
    picks = choose(records, baseline, 3)
    before = front_figure(records, baseline, picks, [])
    assert {move.trial_id for move in before.picks} == {pick.trial_id for pick in picks}
    assert all(move.after is None for move in before.picks)
    folder = make_run(records, {picks[1].trial_id: "by id"})
    (move,) = front_figure(records, baseline, picks, folder.read_selected()).picks
    assert (move.trial_id, move.chosen_as, move.epochs) == (picks[1].trial_id, "by id", 30)


def test_the_axes_hold_everything_and_their_marks_stay_apart(
    records: list[TrialRecord], baseline: dict[str, Any]
) -> None:
    figure = front_figure(records, baseline, choose(records, baseline), [])
    axes = plane_axes(figure)
    for item in (figure.baseline, *figure.front, *figure.dominated, *figure.apart):
        assert axes.latency_ms[0] < item.latency_ms < axes.latency_ms[1]
        assert axes.accuracy[0] < item.accuracy < axes.accuracy[1]
    assert (figure.baseline.latency_ms, "1×") in axes.speedups
    for position, label in axes.speedups:
        assert figure.baseline.latency_ms / position == pytest.approx(float(label[:-1]))
    positions = [position for position, _ in axes.speedups]
    assert min(np.diff(positions)) > 0.05 * (axes.latency_ms[1] - axes.latency_ms[0])


def test_labels_of_picks_in_one_place_are_lifted(record: Build, baseline: dict[str, Any]) -> None:
    records = [record("a", 0.5, 8.0), record("b", 0.5, 8.0), record("c", 0.2, 3.0)]
    picks = choose(records, baseline, 2)
    same = [type(picks[0])(item, "test") for item in records]
    figure = front_figure(records, baseline, same, [])
    levels = dict(zip([move.trial_id for move in figure.picks], label_levels(figure, plane_axes(figure)), strict=True))
    assert {levels["a"], levels["b"]} == {0, 1}
    assert levels["c"] == 0


@pytest.mark.parametrize("objectives", [("map50_95", "latency_ms"), ("map50_95", "latency_ms", "params_m")])
def test_the_curve_is_the_hypervolume_after_each_trial(
    records: list[TrialRecord], baseline: dict[str, Any], objectives: tuple[str, ...]
) -> None:
    curve = hypervolume_curve(records, baseline, objectives)
    ordered = sorted(comparable(records), key=lambda item: item.finished_at)
    metrics = baseline["metrics"]
    corner = [0.0, *(metrics[name] for name in objectives[1:])]
    box = float(np.prod([metrics[name] for name in objectives]))
    expected = [hypervolume(to_losses(ordered[: n + 1], objectives), corner) / box for n in range(len(ordered))]
    assert curve.shares == pytest.approx(expected)
    assert curve.trials == tuple(range(1, len(ordered) + 1))
    assert curve.ladder_trials == 6


def test_a_curve_without_trials_is_empty(baseline: dict[str, Any]) -> None:
    assert hypervolume_curve([], baseline).trials == ()


def test_time_adds_up_over_all_states(record: Build) -> None:
    records = [
        record("a", seconds={"recover": 10.0, "finetune": 60.0}),
        record("b", seconds={"recover": 20.0}),
        record("c", state="failed", error="why", seconds={"recover": 20.0}),
    ]
    figure = time_figure(records)
    assert [(phase.name, phase.seconds, phase.median_seconds) for phase in figure.phases] == [
        ("short fine-tuning", 60.0, 60.0),
        ("recovery without epochs", 50.0, 20.0),
    ]
    assert [phase.share for phase in figure.phases] == [60 / 110, 50 / 110]
    assert (figure.total_seconds, figure.trials) == (110.0, 3)
    assert time_figure([]).phases == ()


def test_widths_by_layer_and_block() -> None:
    def row(layer: str, block: int, group: int, channels: int, prunable: bool = True) -> dict[str, Any]:
        reason = "" if prunable else "head output"
        shared = {"block": block, "group": group, "out_channels": channels}
        return {"layer": layer, "prunable": prunable, "reason": reason, **shared}

    layers = [row("a", 0, 0, 16), row("b", 1, 1, 64), row("c", 1, 1, 64), row("d", 1, 2, 32), row("e", 2, 2, 10, False)]
    figure = widths_figure("t", "knee", {"b": 0.25, "d": 0.5}, layers)
    assert [(item.layer, item.after) for item in figure.layers] == [
        ("a", 16),
        ("b", 48),
        ("c", 48),
        ("d", 16),
        ("e", 10),
    ]
    assert [(item.block, item.prunable) for item in figure.blocks] == [(0, True), (1, True), (2, False)]
    assert figure.blocks[1].before == pytest.approx((64 + 64 + 32) / 3)
    assert figure.blocks[1].after == pytest.approx((48 + 48 + 16) / 3)
    assert figure.blocks[1].kept == pytest.approx(112 / 160)
    assert figure.kept == pytest.approx((16 + 112 + 10) / 186)
    assert figure.layers[4].reason == "head output"
