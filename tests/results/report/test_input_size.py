"""The report and its commands at an input size of a trial's own, a side or height and width."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable

from paretoprune.base.atomic import write_json
from paretoprune.results.analysis.frames import front_rows
from paretoprune.results.analysis.summary import summarise
from paretoprune.results.report.report import write_report
from paretoprune.results.selection.selection import front
from paretoprune.results.store.records import TrialRecord
from paretoprune.results.store.run_folder import RunFolder

MakeRun = Callable[..., RunFolder]


def test_the_input_size_is_shown_where_trials_differ_in_it(records: list[TrialRecord], make_run: MakeRun) -> None:
    """A pick's commands work at its size, timed against the unpruned model at the run's."""
    folder = make_run(records)
    assert summarise(folder).sizes == {}
    shutil.rmtree(folder.path)
    best = front(records)[0].trial_id
    folder = make_run(
        [record.changed(imgsz=256 if record.trial_id == best else None) for record in records], {best: "best"}
    )
    config = {"model": {"path": "n.pt", "imgsz": 320}, "data": {"path": "d.yaml"}}
    folder.config.write_text(json.dumps(config))
    summary = summarise(folder)
    assert {record.trial_id: summary.sizes[record.trial_id] for record in records} == {
        record.trial_id: 256 if record.trial_id == best else 320 for record in records
    }
    write_report(folder.path)
    assert "| 256 px |" in folder.report_markdown.read_text(encoding="utf-8")
    assert ">256 px</td>" in folder.report_html.read_text(encoding="utf-8")
    lines = [line for group in summary.commands if group.title == best for _, line in group.lines]
    for command, words in (
        (" latency ", "--imgsz 256"), (" latency ", "--against-imgsz 320"), ("yolo val", "imgsz=256"),
        (" export ", "--imgsz 256"), (" prune ", "--imgsz 256"),
    ):  # fmt: skip
        assert [line for line in lines if command in line and words in line], (command, words)


def test_a_rectangle_is_shown_and_given_to_commands_as_height_and_width(
    records: list[TrialRecord], make_run: MakeRun
) -> None:
    best = front(records)[0].trial_id
    folder = make_run(
        [record.changed(imgsz=[128, 224] if record.trial_id == best else None) for record in records], {best: "best"}
    )
    config = {"model": {"path": "n.pt", "imgsz": [192, 320]}, "data": {"path": "d.yaml"}}
    folder.config.write_text(json.dumps(config))
    write_json(folder.baseline, {**json.loads(folder.baseline.read_text()), "imgsz": [192, 320]})
    summary = summarise(folder)
    assert set(summary.sizes.values()) == {(192, 320), (128, 224)}
    write_report(folder.path)
    assert "| 128,224 px |" in folder.report_markdown.read_text(encoding="utf-8")
    assert ">192,320 px</td>" in folder.report_html.read_text(encoding="utf-8")
    card = (folder.selected_dir(best) / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "| Input | 128,224 px |" in card
    assert '"128,224"' in folder.front_csv.read_text()
    rows = {row["trial_id"]: row["imgsz"] for row in front_rows(folder)}
    assert rows[best] == [128, 224]
    assert [192, 320] in rows.values()
    lines = [line for group in summary.commands if group.title == best for _, line in group.lines]
    for command, words in (
        (" latency ", "--imgsz 128,224"), (" latency ", "--against-imgsz 192,320"), ("yolo export", "imgsz=128,224"),
        ("yolo val", "best.torchscript"), ("paretoprune export ", "--imgsz 128,224"), (" prune ", "--imgsz 128,224"),
    ):  # fmt: skip
        assert [line for line in lines if command in line and words in line], (command, words)
