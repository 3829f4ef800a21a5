"""Finished networks, rivals and sensitivity as values; the Markdown and the tables beside the report."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd
import pytest

from paretoprune.results.analysis.figures import MOST_DOMINATED, Point, thinned
from paretoprune.results.analysis.finalists import PairwiseComparison, rivalries
from paretoprune.results.analysis.sensitivity import sensitivity_figure
from paretoprune.results.analysis.summary import summarise
from paretoprune.results.report.model_card import CARD
from paretoprune.results.store.run_folder import RunFolder


def test_baseline_picks_and_natives_stand_side_by_side(finished_run: RunFolder) -> None:
    summary = summarise(finished_run)
    kinds = [row.kind for row in summary.finished]
    assert kinds == ["baseline", "pick", "pick", "pick", "native", "free move"]
    native, tuned = summary.finished[-2:]
    assert (tuned.name, tuned.epochs) == ("unpruned@224", 33)
    for row in summary.finished[1:4]:  # slower and less accurate than that free move after the same fine-tuning
        worse = row.at is not None and row.at.latency_ms > 0.56 * 12.4
        assert row.beaten_by_free_move == ("unpruned@224" if worse else "")
    assert (native.name, native.chosen_as, native.epochs) == ("small", "fresh head", 33)
    assert native.change_ci95 == (-0.08, -0.02)
    assert summary.has_test
    assert summary.finished[0].test == 0.6
    assert summary.front.natives[0].fidelity == "fresh head, 33 epochs"


@pytest.mark.parametrize(
    ("accuracy", "speed", "words"),
    [
        ((0.01, 0.03), (1.1, 1.2), "more accurate, faster"),
        ((-0.01, 0.03), (1.1, 1.2), "as accurate, faster"),
        ((-0.03, -0.01), (0.9, 1.2), "less accurate, as fast"),
        ((-0.03, -0.01), (0.8, 0.9), "less accurate, slower"),
    ],
)
def test_the_verdict_follows_the_intervals(
    accuracy: tuple[float, float], speed: tuple[float, float], words: str
) -> None:
    assert PairwiseComparison("t", "n", 0.0, accuracy, 1.0, speed).verdict == words


def test_rivalries_need_both_comparisons() -> None:
    session: dict[str, Any] = {"map50_95_over": {"t1": {"native:n": [0.1, 0.0, 0.2]}}, "speedup_over": {}}
    assert rivalries(session) == ()
    session["speedup_over"] = {"t1": {"native:n": [1.5, 1.4, 1.6]}}
    assert rivalries(session) == (PairwiseComparison("t1", "n", 0.1, (0.0, 0.2), 1.5, (1.4, 1.6)),)
    assert rivalries({}) == ()


def test_sensitivity_is_the_share_of_channels_that_stays() -> None:
    rows = [("model.0", 0, True), ("model.1.a", 1, True), ("model.1.b", 1, True), ("model.2", 2, False)]
    layers = [
        {"layer": name, "block": block, "group": index, "out_channels": 16, "prunable": prunable, "reason": ""}
        for index, (name, block, prunable) in enumerate(rows)
    ]
    plans = [{"keep": 0.5, "ratios": {"model.0": 0.5, "model.1.a": 0.5}}, {"keep": 0.9, "ratios": {}}]
    figure = sensitivity_figure({"layers": layers, "sensitivity": plans})
    assert figure is not None
    assert (figure.blocks, figure.work_kept) == ((0, 1), (0.9, 0.5))
    assert figure.channels_kept == ((1.0, 1.0), (0.5, 0.75))
    assert sensitivity_figure({"layers": layers}) is None
    assert sensitivity_figure({"sensitivity": plans}) is None


def test_a_crowd_is_thinned_evenly_and_keeps_its_ends() -> None:
    crowd = [Point(str(i), 0.5, 8.0, 1.0, None, None, None, None, "") for i in range(10 * MOST_DOMINATED)]
    kept = thinned(crowd, MOST_DOMINATED)
    assert len({item.name for item in kept}) == MOST_DOMINATED
    assert (kept[0], kept[-1]) == (crowd[0], crowd[-1])
    assert thinned(crowd[:3], 5) == tuple(crowd[:3])


def test_tables_lie_beside_the_report(finished_run: RunFolder) -> None:
    frame = pd.read_parquet(finished_run.trials_parquet)
    csv = pd.read_csv(finished_run.trials_csv)
    assert list(frame["trial_id"]) == list(csv["trial_id"]) == [item.trial_id for item in finished_run.read_records()]
    assert frame["latency_ms"].dtype == csv["latency_ms"].dtype == float
    for name in ("front", "widths", "sensitivity", "hypervolume", "time"):
        assert (finished_run.report_dir / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (finished_run.report_dir / f"{name}.svg").read_bytes()


def test_markdown_says_the_same_and_links_what_is_there(finished_run: RunFolder) -> None:
    text = finished_run.report_markdown.read_text(encoding="utf-8")
    summary = summarise(finished_run)
    assert text.startswith(f"# {summary.headline.sentence}")
    for link in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (finished_run.path / link).is_file()
    for row in summary.finished:
        assert f"| {row.name} |" in text
    assert "more accurate, as fast" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)


def test_every_finished_pick_has_a_model_card(finished_run: RunFolder) -> None:
    hashes = {record.trial_id: record.plan_hash for record in finished_run.read_records()}
    for selected in finished_run.read_selected():
        text = (selected.directory / CARD).read_text(encoding="utf-8")
        assert hashes[selected.trial_id] in text
        assert "AGPL-3.0" in text
        assert "30 epochs, of which epoch 27 was kept" in text
        assert f"paretoprune export {finished_run.selected_checkpoint(selected.trial_id)}" in text
        others = {item.trial_id for item in finished_run.read_selected()} - {selected.trial_id}
        assert not any(f"| {other} |" in text for other in others)
