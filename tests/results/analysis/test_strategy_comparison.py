"""A comparison of strategies: complete on disk, the same after reading, safe and offline as a page."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from paretoprune.results.analysis.strategy_comparison import (
    Comparison,
    ComparisonFolder,
    ComparisonRow,
    as_csv,
    read_comparison,
    skipped_groups,
    write_comparison,
)
from paretoprune.results.errors import RecordError, RunFolderError, SchemaVersionError
from paretoprune.results.report.report import render_comparison, write_report
from paretoprune.results.report.strategy_comparison_page import figure_spec
from paretoprune.results.store.run_folder import RunFolder

NASTY = "<img src=x onerror=alert(1)>&\"'</script><script>alert(2)</script>"
METRICS = {
    "params_m": 2.1, "gflops": 1.4, "speedup": 1.31, "speedup_ci95": [1.28, 1.34], "latency_ms": 7.5,
    "map50_95": 0.581, "map50_95_refit": 0.402,
}  # fmt: skip
BASELINE = {**METRICS, "params_m": 3.0, "gflops": 2.0, "latency_ms": 9.9, "map50_95": 0.612, "speedup": 1.0}


class Page(HTMLParser):
    """Tags with their attributes, the text outside scripts, and what was left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "link", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += " " + data

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def row(folder: ComparisonFolder, name: str, **changes: Any) -> ComparisonRow:
    given: dict[str, Any] = {
        "strategy": name, "layers": ("model.0", "model.4.cv1"), "skipped": (), "epochs": 4, "metrics": METRICS,
        "checkpoint": str(folder.checkpoint(name)), "plan": str(folder.plan(name)),
    }  # fmt: skip
    return ComparisonRow(**{**given, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> ComparisonFolder:
    return ComparisonFolder(tmp_path / "run")


@pytest.fixture
def comparison(folder: ComparisonFolder) -> Comparison:
    skipped = (
        ("model.2.cv2", "feeds an addition"),
        ("model.9", "only the first layer"),
        ("model.6", "feeds an addition"),
    )
    sessions = (str(folder.strategy_dir("sequential") / "session-1.pt"),)
    rows = (
        row(folder, "structural"),
        row(folder, "sequential", skipped=skipped, sessions=sessions, notes={"sessions": 1}),
        row(folder, "mask", metrics={**METRICS, "speedup": 1.0, "speedup_ci95": [0.98, 1.02], "params_m": 3.0}),
    )
    settings = {"model": "m.pt", "data": "d.yaml", "imgsz": 320, "ratios": {"*": 0.3}, "epochs": 4, "seed": 0}
    return Comparison(settings, BASELINE, rows, "cpu", {"torch": "2.15.0"}, {"adapter": "RuntimeError: no luck"})


def test_what_is_written_reads_back_equal(folder: ComparisonFolder, comparison: Comparison) -> None:
    assert read_comparison(folder) is None
    assert write_comparison(folder, comparison) == folder.json
    assert read_comparison(folder) == comparison


def test_a_moved_folder_reads_with_its_own_paths(
    folder: ComparisonFolder, comparison: Comparison, tmp_path: Path
) -> None:
    write_comparison(folder, comparison)
    moved = ComparisonFolder(tmp_path / "elsewhere")
    shutil.move(folder.path, moved.path)
    found = read_comparison(moved)
    assert found is not None
    assert [item.checkpoint for item in found.rows] == [
        str(moved.checkpoint(item.strategy)) for item in comparison.rows
    ]
    assert found.rows[1].sessions == (str(moved.strategy_dir("sequential") / "session-1.pt"),)


def test_rows_hold_the_promised_keys_and_plain_types(comparison: Comparison) -> None:
    promised = {
        "strategy", "layers_pruned", "params_m", "gflops", "speedup", "speedup_ci95", "map50_95", "map50_95_refit",
        "epochs", "skipped", "checkpoint",
    }  # fmt: skip
    rows = comparison.to_rows()
    for item in rows:
        assert promised <= item.keys()
    assert json.loads(json.dumps(rows)) == rows
    assert rows[0]["layers_pruned"] == 2
    assert rows[1]["skipped"][0] == {"layer": "model.2.cv2", "reason": "feeds an addition"}
    assert comparison.baseline_row()["speedup"] == 1.0


def test_csv_has_a_line_a_strategy_with_lists_as_json(folder: ComparisonFolder, comparison: Comparison) -> None:
    write_comparison(folder, comparison)
    lines = list(csv.DictReader(io.StringIO(folder.csv.read_text())))
    assert [line["strategy"] for line in lines] == ["structural", "sequential", "mask"]
    assert json.loads(lines[1]["skipped"]) == comparison.to_rows()[1]["skipped"]
    assert float(lines[0]["speedup"]) == 1.31
    assert as_csv([]) == "strategy\n"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None, "0.5"])
@pytest.mark.parametrize("name", ["map50_95", "speedup"])
def test_a_metric_that_is_no_finite_number_is_refused(folder: ComparisonFolder, name: str, bad: object) -> None:
    with pytest.raises(RecordError, match=f"{name} of strategy mask must be finite, but got"):
        row(folder, "mask", metrics={**METRICS, name: bad})


def test_an_interval_with_nan_and_a_missing_metric_are_refused(folder: ComparisonFolder) -> None:
    with pytest.raises(RecordError, match="speedup_ci95 of strategy mask"):
        row(folder, "mask", metrics={**METRICS, "speedup_ci95": [1.0, float("nan")]})
    with pytest.raises(RecordError, match="gflops of strategy mask must be finite, but got None"):
        row(folder, "mask", metrics={name: value for name, value in METRICS.items() if name != "gflops"})


def test_layers_are_grouped_by_reason_in_order(comparison: Comparison) -> None:
    groups = skipped_groups(comparison.rows[1].skipped)
    assert [(group.reason, group.layers) for group in groups] == [
        ("feeds an addition", ("model.2.cv2", "model.6")),
        ("only the first layer", ("model.9",)),
    ]


def test_broken_files_are_named(folder: ComparisonFolder, comparison: Comparison) -> None:
    write_comparison(folder, comparison)
    content = json.loads(folder.json.read_text())
    folder.json.write_text(json.dumps({**content, "schema_version": 99}))
    with pytest.raises(SchemaVersionError, match="99"):
        read_comparison(folder)
    del content["baseline"]
    folder.json.write_text(json.dumps(content))
    with pytest.raises(RecordError, match="lacks 'baseline'"):
        read_comparison(folder)
    folder.json.write_text("{")
    with pytest.raises(RunFolderError, match="must be JSON"):
        read_comparison(folder)


def test_a_result_counts_only_with_its_checkpoint(folder: ComparisonFolder) -> None:
    assert folder.read_result("skip") is None
    folder.write_result("skip", {"epochs": 3})
    assert folder.read_result("skip") is None
    folder.checkpoint("skip").write_bytes(b"network")
    assert folder.read_result("skip") == {"schema_version": 1, "strategy": "skip", "epochs": 3}


def test_the_page_says_everything_and_loads_nothing(comparison: Comparison) -> None:
    text = render_comparison(comparison)
    page = Page(text)
    assert page.open == []
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert (attributes.get(name) or "") in ("", "data:,"), f"<{tag}> would load something"
    assert "url(" not in "".join(re.findall(r"<style>(.*?)</style>", text, re.DOTALL))
    rows = [attributes["data-strategy"] for _, attributes in page.tags if "data-strategy" in attributes]
    assert rows == ["structural", "sequential", "mask"]
    for words in (
        "3 strategies, the same ratios, 4 epochs each", "1.31×", "1.28–1.34", "0.581", "0.402", "−0.031",
        "only the first layer", "model.2.cv2", "session-1.pt", "RuntimeError: no luck", "2.15.0", "320 px",
    ):  # fmt: skip
        assert words in page.words, words


def test_names_and_reasons_cannot_become_markup(folder: ComparisonFolder, comparison: Comparison) -> None:
    hostile = row(
        folder, NASTY, skipped=((NASTY, NASTY),), layers=(NASTY,), checkpoint=NASTY, sessions=(NASTY,),
        notes={NASTY: NASTY},
    )  # fmt: skip
    settings = {**comparison.settings, "model": NASTY, "data": NASTY, "ratios": {NASTY: 0.3}}
    text = render_comparison(Comparison(settings, BASELINE, (hostile,), NASTY, {NASTY: NASTY}, {NASTY: NASTY}))
    page = Page(text)
    assert page.open == []
    names = [tag for tag, _ in page.tags]
    assert names.count("script") == 2
    assert "img" not in names
    assert "onerror=alert(1)>&" in page.words  # shown as text
    found = re.search(r"^const specs = (.*);$", text, re.MULTILINE)
    assert found is not None
    for trace in json.loads(found.group(1))["comparison"]["data"]:
        assert "<img" not in json.dumps([trace["name"], trace["hovertext"]])


def test_the_figure_shows_each_strategy_where_it_was_measured(comparison: Comparison) -> None:
    spec = figure_spec(comparison)
    go.Figure(spec)  # Plotly's own validation
    dots = {trace["name"]: (trace["x"], trace["y"]) for trace in spec["data"]}
    assert dots["structural"] == ([1.31], [0.581])
    assert dots["mask"] == ([1.0], [0.581])
    assert dots["unpruned"] == ([1.0], [0.612])
    bar = spec["data"][0]["error_x"]
    assert (bar["array"][0], bar["arrayminus"][0]) == pytest.approx((0.03, 0.03))
    looks = [(trace["marker"]["symbol"], trace["marker"]["color"]) for trace in spec["data"]]
    assert len({symbol for symbol, _ in looks}) == len(looks) == len({colour for _, colour in looks})


def test_a_comparison_without_failures_or_skipped_layers_is_a_page_too(comparison: Comparison) -> None:
    page = Page(render_comparison(replace(comparison, failed={}, rows=comparison.rows[:1], environment={})))
    assert "1 strategy, the same ratios" in page.words
    assert "Failed" not in page.words
    assert "None." in page.words


def test_it_is_part_of_the_report_of_a_search_in_the_same_folder(
    finished_run: RunFolder, comparison: Comparison, tmp_path: Path
) -> None:
    run = tmp_path / "both"
    shutil.copytree(finished_run.path, run)
    alone = Page(finished_run.report_html.read_text())
    write_comparison(ComparisonFolder(run), comparison)
    text = write_report(run).read_text()
    page = Page(text)
    assert page.open == []
    rows = [attributes["data-strategy"] for _, attributes in page.tags if "data-strategy" in attributes]
    assert rows == ["structural", "sequential", "mask"]
    places = {attributes.get("id") for _, attributes in page.tags}
    assert {"front", "comparison"} <= places
    assert set(json.loads(re.findall(r"^const specs = (.*);$", text, re.MULTILINE)[0])) >= {"front", "comparison"}
    sections = [
        re.findall(r"<h2>(.*?)(?: <|</h2>)", content) for content in (finished_run.report_html.read_text(), text)
    ]
    assert len(sections[0]) > 4
    assert set(sections[0]) < set(sections[1])  # nothing of the search is missing
    assert "Accuracy and speed-up of each strategy" not in alone.words


def test_a_classifiers_comparison_goes_by_top_1(folder: ComparisonFolder) -> None:
    figures = {name: value for name, value in METRICS.items() if not name.startswith("map50_95")}
    metrics = {**figures, "top1": 0.8, "top1_refit": 0.7}
    base = {**figures, "top1": 0.9, "speedup": 1.0}
    settings = {"model": "m.pt", "data": "d", "imgsz": 64, "ratios": {"*": 0.3}, "epochs": 4, "seed": 0}
    comparison = Comparison(settings, base, (row(folder, "structural", metrics=metrics),))
    write_comparison(folder, comparison)
    assert read_comparison(folder) == comparison
    assert comparison.to_rows()[0]["top1"] == 0.8
    assert comparison.baseline_row()["top1_refit"] is None
    page = Page(render_comparison(comparison))
    assert "top-1 accuracy" in page.words
    assert "mAP50-95" not in page.words
    assert "top-1 accuracy on the validation split" in json.dumps(figure_spec(comparison))


@pytest.mark.slow
def test_a_real_browser_draws_the_figure_without_the_network(
    folder: ComparisonFolder, comparison: Comparison, tmp_path: Path
) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium on this machine: the page was not opened in a browser")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --virtual-time-budget=5000 --dump-dom"
    write_comparison(folder, comparison)
    page = write_report(folder.path)
    assert page == RunFolder(folder.path).report_html
    command = [browser, *flags.split(), "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'p'}"]
    dom = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True).stdout
    assert len(re.findall(r'<path class="point"', dom)) == 4
    assert "Speed-up over the unpruned network" in dom
