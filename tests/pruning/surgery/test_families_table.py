"""The table of families that people read is the one that the exactness tests gave."""

from __future__ import annotations

from pathlib import Path

from benchmarks.families import HEADER, TABLE, table
from tests.pruning.surgery.test_families import DETECT, EXACT, TASKS

PAGE = TABLE.parent.parent.parent / "docs" / "families.md"


def test_the_table_is_made_of_what_the_tests_recorded(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    values = {"groups": 51, "reach": 0.976, "worst_relative_error": 2.9e-07, "table_ms": 61}
    properties = "".join(f'<property name="{k}" value="{v}"/>' for k, v in values.items())
    case = f'<testcase name="test_pruned_equals_masked[yolov8n-seg]"><properties>{properties}</properties></testcase>'
    report.write_text(f"<testsuites><testsuite>{case}</testsuite></testsuites>")
    assert table(report).splitlines()[2:] == ["| yolov8n-seg | 51 | 97.6% | 2.9e-07 | 61 |"]


def test_every_family_and_task_is_in_the_table() -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in TABLE.read_text().splitlines()[2:]]
    assert [row[0] for row in rows] == DETECT + TASKS
    assert all(0 < float(row[3]) < EXACT for row in rows)


def test_the_documentation_shows_this_table() -> None:
    table_text = TABLE.read_text(encoding="utf-8").strip()
    assert table_text.startswith(HEADER)
    assert table_text in PAGE.read_text(encoding="utf-8")
