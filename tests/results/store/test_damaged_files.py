"""A run's files after an editor, a full disk or a bad merge: one line that names the file, never a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paretoprune.results.analysis.frames import front_rows
from paretoprune.results.errors import ResultsError
from paretoprune.results.report.report import write_report
from paretoprune.results.store.records import TrialRecord
from paretoprune.results.store.run_folder import RunFolder

HUGE = "9" * 401  # an integer that no float holds
DEEP = '{"a": ' * 100_000
Damage = Callable[[dict[str, Any]], str]


def with_value(place: str, value: str) -> Damage:
    """The file's text with JSON ``value`` at ``place`` (dotted)."""

    def damage(content: dict[str, Any]) -> str:
        *parents, last = place.split(".")
        inner = content
        for name in parents:
            inner = inner[name]
        inner[last] = "HERE"
        return json.dumps(content).replace('"HERE"', value)

    return damage


def without(name: str) -> Damage:
    return lambda content: json.dumps({key: value for key, value in content.items() if key != name})


VALUES = (HUGE, "1e999", "NaN", '"fast"', "[1.0]", "{}", "true", "null")
WHOLE: dict[str, Damage] = {
    "deep": lambda content: DEEP,
    "list": lambda content: "[1, 2]",
    "text": lambda content: '"text"',
    "bytes": lambda content: "\udcff\udcfe",
    "half": lambda content: json.dumps(content)[:-20],
}


def damaged(path: Path, damage: Damage) -> Path:
    text = damage(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    return path


def refused(act: Callable[[], Any]) -> str:
    with pytest.raises(ResultsError) as caught:
        act()
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 500
    return line


@pytest.fixture
def run(make_run: Callable[..., RunFolder], records: list[TrialRecord]) -> RunFolder:
    return make_run(records[:9], {records[0].trial_id: "knee"})


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("place", ["metrics.latency_ms", "metrics.map50_95", "epochs", "finished_at", "ratios.model.5"])
def test_a_record_with_no_number_where_one_belongs_is_named_by_its_line(run: RunFolder, place: str, value: str) -> None:
    lines = run.trials_file.read_text().splitlines()
    content = json.loads(lines[4])
    content["ratios"] = {"model": {"5": 0.5}} if place.startswith("ratios") else content["ratios"]
    text = with_value(place, value)(content)
    lines[4] = text.replace('{"model": {"5": ', '{"model.5": ').replace("}}, ", "}, ", 1) if "ratios" in place else text
    run.trials_file.write_text("\n".join(lines) + "\n")
    for act in (run.read_records, lambda: front_rows(run.path), lambda: write_report(run.path)):
        assert f"{run.trials_file} line 5: " in refused(act)


@pytest.mark.parametrize("damage", WHOLE.values(), ids=WHOLE)
def test_a_line_that_is_no_record_is_named(run: RunFolder, damage: Damage) -> None:
    lines = run.trials_file.read_text().splitlines()
    lines[2] = damage(json.loads(lines[2]))
    run.trials_file.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogateescape")
    assert f"{run.trials_file} line 3: " in refused(run.read_records)


@pytest.mark.parametrize("name", ["trial_id", "state", "ratios", "metrics", "epochs", "fidelity", "finished_at"])
def test_a_missing_field_is_named(run: RunFolder, name: str) -> None:
    lines = run.trials_file.read_text().splitlines()
    lines[0] = without(name)(json.loads(lines[0]))
    run.trials_file.write_text("\n".join(lines) + "\n")
    assert f"line 1: the field {name!r} is missing" in refused(run.read_records)


BASELINE: dict[str, Damage] = {
    **WHOLE,
    **{f"latency {value[:5]}": with_value("metrics.latency_ms", value) for value in (*VALUES, "0", "-1.0")},
    **{f"accuracy {value[:5]}": with_value("metrics.map50_95", value) for value in VALUES},
    "no metrics": without("metrics"),
    "metrics list": with_value("metrics", "[1]"),
    "layers number": with_value("layers", "3"),
    "layers text": with_value("layers", '["a"]'),
    "layer without name": with_value("layers", '[{"block": 1}]'),
    "width text": with_value("layers", '[{"layer": "a", "out_channels": "64"}]'),
    "groups": with_value("groups", '[{"layers": 5}]'),
    "noise": with_value("noise", '{"map50_95_std": "small"}'),
    "sensitivity": with_value("sensitivity", '[{"keep": "half", "ratios": {}}]'),
}


@pytest.mark.parametrize("damage", BASELINE.values(), ids=BASELINE)
def test_a_damaged_baseline_is_named(run: RunFolder, damage: Damage) -> None:
    damaged(run.baseline, damage)
    for act in (run.read_baseline, lambda: front_rows(run.path), lambda: write_report(run.path)):
        assert str(run.baseline) in refused(act)


FINISHED: dict[str, Damage] = {
    **WHOLE,
    **{f"latency {value[:5]}": with_value("after.latency_ms", value) for value in VALUES},
    **{f"epochs {value[:5]}": with_value("epochs", value) for value in (HUGE + ".5", '"30"', "[30]", "-1")},
    "no after": without("after"),
    "interval": with_value("after.speedup_ci95", "[1.2]"),
    "interval falls": with_value("after.speedup_ci95", "[1.2, 1.1]"),
    "seconds": with_value("seconds", '{"finetune": "long"}'),
    "before": with_value("before", "7"),
}


@pytest.mark.parametrize("damage", FINISHED.values(), ids=FINISHED)
def test_damaged_metrics_of_a_pick_are_named(run: RunFolder, damage: Damage) -> None:
    path = damaged(next(run.selected_root.glob("*/metrics.json")), damage)
    for act in (run.read_selected, lambda: front_rows(run.path), lambda: write_report(run.path)):
        assert str(path) in refused(act)


@pytest.mark.parametrize("over", ["7", '{"t0000": [1, 2, 3]}', '{"t0000": {"native:n": [1.0, "a", 2.0]}}'])
def test_a_damaged_comparison_of_finished_networks_is_named(run: RunFolder, over: str) -> None:
    run.session.write_text(f'{{"schema_version": 1, "networks": [], "map50_95_over": {over}}}')
    assert str(run.session) in refused(lambda: write_report(run.path))


def test_a_configuration_nested_too_deep_is_named(run: RunFolder) -> None:
    run.config.write_text("[" * 100_000)
    assert str(run.config) in refused(run.read_config)
