"""The report and its commands where trials differ in the precision of their files."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from paretoprune.base.atomic import write_json
from paretoprune.results.analysis.frames import front_rows, trials_frame
from paretoprune.results.analysis.precisions import precision_table
from paretoprune.results.analysis.summary import summarise
from paretoprune.results.report.report import write_report
from paretoprune.results.selection.selection import front
from paretoprune.results.store.records import TrialRecord, as_record
from paretoprune.results.store.run_folder import RunFolder

MakeRun = Callable[..., RunFolder]
BASE = {"metrics": {"map50_95": 0.60, "latency_ms": 20.0, "deploy_precision": "fp32"}}


def move(accuracy: float, speedup: float, imgsz: int | None = None, precision: str | None = None) -> TrialRecord:
    metrics = {"map50_95": accuracy, "latency_ms": 20.0 / speedup, "speedup": speedup}
    return as_record(f"{imgsz}{precision}", metrics, imgsz, precision)


def test_each_network_is_beside_itself_in_the_runs_precision_and_the_fastest_close_one_is_to_be_shipped() -> None:
    moves = [move(0.50, 1.5, 256), move(0.595, 1.8, None, "int8"), move(0.49, 2.5, 256, "int8")]
    assert precision_table(BASE, moves[:1], {}) is None
    assert precision_table({"metrics": {"map50_95": 0.60, "latency_ms": 20.0}}, moves, {}) is None
    found = precision_table(BASE, moves, {})
    assert found is not None
    assert (found.precisions, found.with_picks) == (("fp32", "int8"), False)
    assert list(found.rows) == ["the unpruned model", "the unpruned model at 256 px"]
    small = found.rows["the unpruned model at 256 px"]["int8"]
    assert (small.cost, small.gain) == (pytest.approx(-0.01), pytest.approx(2.5 / 1.5))
    assert found.advice == (
        "Ship the unpruned model in int8: 1.80 times as fast at mAP50-95 0.595 (−0.005), the fastest within 0.02 of "
        "the unpruned model in fp32; the unpruned model at 256 px in int8 is faster (2.50 times as fast) at −0.110."
    )


def judged(accuracy: float, speedup: float, cost: list[float] | None, gain: list[float] | None) -> dict[str, object]:
    figures = {"map50_95": accuracy, "latency_ms": 20.0 / speedup, "speedup": speedup}
    return {**figures, "accuracy_cost": cost, "speedup_over_own": gain}


def test_the_report_shows_them_and_a_picks_commands_work_in_its_own(
    records: list[TrialRecord], make_run: MakeRun
) -> None:
    best = front(records)[0].trial_id
    mixed = [record.changed(precision="int8" if record.trial_id == best else None) for record in records]
    folder = make_run(mixed, {best: "best"})
    baseline = json.loads(folder.baseline.read_text())
    baseline["metrics"]["deploy_precision"] = "fp32"
    write_json(folder.baseline, baseline)
    config = {"model": {"path": "n.pt", "imgsz": 320}, "data": {"path": "d.yaml"}}
    config |= {"deploy": {"format": "openvino", "precision": "fp32", "calibration_images": 48}}
    folder.config.write_text(json.dumps(config))
    folder.write_free_move(
        None, {"map50_95": 0.60, "latency_ms": 7.0, "speedup": 1.8, "latency_ratio": 1 / 1.8}, "int8"
    )
    session = {"schema_version": 1, "networks": ["baseline", best]}
    session["precisions"] = {
        "baseline": {
            "fp32": judged(0.612, 1.0, None, None),
            "int8": judged(0.590, 1.8, [-0.022, -0.03, -0.01], [1.8, 1.7, 1.9]),
        },
        best: {
            "int8": judged(0.60, 2.4, [-0.004, -0.01, 0.002], [1.9, 1.8, 2.0]),
            "fp32": judged(0.604, 1.25, None, None),
        },
    }  # fmt: skip
    write_json(folder.session, session)
    write_report(folder.path)
    page, text = folder.report_html.read_text(encoding="utf-8"), folder.report_markdown.read_text(encoding="utf-8")
    advice = f"Ship {best} in int8: 2.40 times as fast at mAP50-95 0.600 (−0.012), the fastest within 0.02"
    assert advice in page
    assert advice in text
    assert "<small>(−0.010 to +0.002)</small>" in page
    assert f"| {best} | 0.604 | 16.0 ms | 0.600 | −0.004 (−0.010 to +0.002) | 8.33 ms | 1.90× (1.80–2.00) |" in text
    assert "320 px<small>int8</small>" in page
    assert summarise(folder).input_of("") == "320 px, fp32"
    assert trials_frame(mixed, baseline)["deploy_precision"].tolist().count("int8") == 1
    rows = {row["trial_id"]: row["deploy_precision"] for row in front_rows(folder)}
    assert (rows[best], rows["unpruned@int8"]) == ("int8", "int8")
    assert "fp32" in rows.values()
    lines = [line for group in summarise(folder).commands if group.title == best for _, line in group.lines]
    export = next(line for line in lines if " export " in line)
    assert "--format openvino --imgsz 320 --precision int8 --calibration-images 48 --data d.yaml" in export
