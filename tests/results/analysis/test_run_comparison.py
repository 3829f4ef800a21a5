"""Several runs on one page, and how trials ended over time."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from paretoprune.results.analysis.run_comparison import overlay
from paretoprune.results.analysis.trial_outcomes import course
from paretoprune.results.errors import ResultsError
from paretoprune.results.report.run_comparison_page import curves_spec, runs_spec, write_overlay
from paretoprune.results.selection.selection import front
from paretoprune.results.store.records import TrialRecord
from paretoprune.results.store.run_folder import RunFolder

Build = Callable[..., TrialRecord]
MakeRun = Callable[..., RunFolder]
NASTY = "<img src=x onerror=alert(1)>&"


@pytest.fixture
def two_runs(finished_run: RunFolder, make_run: MakeRun, make_many: Callable[[int], list[TrialRecord]]) -> list[Path]:
    return [finished_run.path, make_run(make_many(12)).path]


def test_both_fronts_the_picks_and_the_baselines_are_there(two_runs: list[Path]) -> None:
    spec = runs_spec(overlay(two_runs))
    go.Figure(spec)  # raises for a property that Plotly does not know
    go.Figure(curves_spec(overlay(two_runs)))
    shown = {trace["name"]: len(trace["x"]) for trace in spec["data"] if trace["mode"] == "markers"}
    expected = {}
    for path, name in zip(two_runs, overlay(two_runs).runs, strict=True):
        folder = RunFolder(path)
        expected[f"{name.name}: front"] = len(front(folder.read_records()))
        expected[f"{name.name}: fully fine-tuned"] = len(folder.read_selected())
        expected[f"{name.name}: unpruned"] = 1
    assert shown == expected
    symbols = [trace["marker"]["symbol"] for trace in spec["data"] if trace["name"].endswith(": front")]
    assert len(set(symbols)) == 2, "nothing may depend on colour alone"


def test_runs_are_named_by_what_tells_them_apart(two_runs: list[Path], tmp_path: Path) -> None:
    assert [path.name for path in two_runs] == ["run", "run"]
    assert [run.name for run in overlay(two_runs).runs] == [f"{path.parent.name}/run" for path in two_runs]
    other = shutil.copytree(two_runs[1], tmp_path / "other")
    assert [run.name for run in overlay([two_runs[1], other]).runs] == ["run", "other"]


def test_what_differs_is_said(two_runs: list[Path]) -> None:
    assert overlay(two_runs).differences == ()
    changed = RunFolder(two_runs[1])
    changed.write_baseline({**changed.read_baseline(), "device": "Tesla T4", "imgsz": 640})
    names = [run.name for run in overlay(two_runs).runs]
    assert overlay(two_runs).differences == (
        f"different image size ({names[0]}: 320; {names[1]}: 640)",
        f"different device ({names[0]}: cpu; {names[1]}: Tesla T4)",
    )


def test_names_cannot_become_markup_in_the_page(two_runs: list[Path], tmp_path: Path) -> None:
    nasty = shutil.copytree(two_runs[1], tmp_path / NASTY)
    text = write_overlay([two_runs[0], nasty], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<img" not in re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    specs = re.findall(r"^const specs = (.*);$", text, re.MULTILINE)
    assert "<img" not in specs[0]
    names = [trace["name"] for trace in json.loads(specs[0])["runs"]["data"]]
    assert any("&lt;img" in name for name in names)


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (lambda runs: [runs[0]], r"two to 7 runs can be laid over each other, but got 1; give others"),
        (lambda runs: [runs[0], runs[0]], r"every run must be given once, but got .*; leave out what is there twice"),
    ],
)
def test_what_cannot_be_compared_is_refused(two_runs: list[Path], choose: Any, message: str) -> None:
    with pytest.raises(ResultsError, match=message):
        overlay(choose(two_runs))


@pytest.mark.slow
def test_a_real_browser_draws_the_runs(two_runs: list[Path], drawn_by_browser: Callable[..., str]) -> None:
    dom = drawn_by_browser(write_overlay(two_runs))
    fronts = sum(len(front(RunFolder(path).read_records())) for path in two_runs)
    assert dom.count('<path class="point"') >= fronts
    assert len(re.findall("<tr data-run=", dom)) == 2


def test_the_course_counts_every_end(record: Build) -> None:
    told = [
        record("a", epochs=4, fidelity="epochs", finished_at=7300.0, seconds={"finetune": 100.0}),
        record("b", state="stopped", epochs=1, fidelity="epochs", finished_at=3700.0, seconds={"finetune": 100.0}),
        record("c", state="failed", error="no", metrics={}, finished_at=9100.0, seconds={"finetune": 1.0}),
        record("d", state="stopped", epochs=0, finished_at=10900.0, seconds={"finetune": 1.0}),
    ]
    found = course(told)
    assert found.hours == pytest.approx((100 / 3600, 3700 / 3600, 5500 / 3600, 7300 / 3600))
    assert dict(found.counts) == {
        "completed": (0, 1, 1, 1),
        "stopped": (1, 1, 1, 2),
        "failed": (0, 0, 1, 1),
    }
    assert found.stopping == (
        "2 of 4 trials stopped early (1 after 0 epochs, 1 after 1 epoch), which spared 7 of 16 epochs."
    )
    assert course([]).stopping == "No trial was stopped early."


def test_trials_beyond_the_bounds_are_not_counted_as_stopped(record: Build) -> None:
    slow: dict[str, Any] = {"state": "stopped", "epochs": 0, "violations": {"max_latency_ms": 0.5}}
    told = [
        record("a", epochs=4, fidelity="epochs"),
        record("b", **slow),
        record("c", **slow),
        # Stopped by its rivals: the floor on accuracy would be judged at the end only.
        record("d", state="stopped", epochs=1, fidelity="epochs", violations={"min_map": 0.1}),
        record("e", epochs=4, fidelity="epochs", violations={"min_map": 0.1}),
    ]
    found = course(told)
    assert {ending: counts[-1] for ending, counts in found.counts} == {
        "completed": 1,
        "stopped": 1,
        "beyond the bounds": 3,
    }
    assert found.stopping == (
        "1 of 5 trials stopped early (1 after 1 epoch), which spared 3 of 20 epochs. "
        "2 trials were not trained, being beyond the bounds."
    )
