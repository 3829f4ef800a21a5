"""The report: complete, offline, escaped, at every stage of a run."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from matplotlib.image import imread

from paretoprune.base import formatting
from paretoprune.results.analysis.frames import trials_frame
from paretoprune.results.analysis.summary import summarise
from paretoprune.results.errors import RunFolderError
from paretoprune.results.report.plotly_figures import front_spec, hypervolume_spec, script_json
from paretoprune.results.report.report import write_report
from paretoprune.results.selection.selection import comparable, front
from paretoprune.results.store.records import TrialRecord
from paretoprune.results.store.run_folder import RunFolder

Build = Callable[..., TrialRecord]
MakeRun = Callable[..., RunFolder]
NASTY = "<img src=x onerror=alert(1)>&\"'</script><script>alert(2)</script>$x_1$"
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """The elements of a page in order, the text outside scripts, and whether its tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def specs(text: str) -> dict[str, Any]:
    """The figures that the page hands to Plotly."""
    found = re.search(r"^const specs = (.*);$", text, re.MULTILINE)
    assert found is not None
    return json.loads(found.group(1))


def test_the_page_is_whole_and_loads_nothing(finished_run: RunFolder) -> None:
    text = finished_run.report_html.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            value = attributes.get(name) or ""
            assert value in ("", "data:,"), f"<{tag} {name}={value!r}> would be loaded"
    styles = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert len(styles) == 1
    assert "url(" not in styles[0]
    assert "@import" not in styles[0]
    assert text.count("Plotly.newPlot") >= 1


def test_everything_of_the_front_and_the_picks_is_in_the_page(finished_run: RunFolder) -> None:
    page = Page(finished_run.report_html.read_text(encoding="utf-8"))
    members = {record.trial_id for record in front(finished_run.read_records())}
    rows = {attributes["data-trial"] for _, attributes in page.elements if "data-trial" in attributes}
    assert rows == members
    for selected in finished_run.read_selected():
        assert f"{selected.after['map50_95']:.3f}" in page.words
        assert f"paretoprune export {finished_run.selected_checkpoint(selected.trial_id)} --format onnx" in page.words
    assert "worker died (signal 9)" in page.words
    assert "Shown apart and not compared: 3 trials stopped early (1 epoch)" in page.words
    for text in (
        "3 epochs",
        "fully fine-tuned",
        "2.15.0",
        "Where the time went",
        "Pruning per block",
        "short fine-tuning",
    ):
        assert text in page.words


def test_the_headline_says_what_was_won(finished_run: RunFolder) -> None:
    """The fastest pick within 0.02 of the unpruned model, the knee beside it, and the free move that beats it."""
    picks = finished_run.read_selected()
    summary = summarise(finished_run)
    (knee,) = [item for item in picks if item.chosen_as == "knee"]
    close = [item for item in picks if item.after["map50_95"] >= 0.612 - 0.02]
    pick = min(close, key=lambda item: item.after["latency_ratio"])
    assert pick != knee
    speedup, drop = 1 / pick.after["latency_ratio"], 0.612 - pick.after["map50_95"]
    fewer = round(100 * (1 - pick.after["params_m"] / 3.01))
    assert summary.headline.sentence == (
        f"Pruned, n is {speedup:.2f} times as fast (12.4 ms → {formatting.milliseconds(12.4 / speedup)}) "
        f"at mAP50-95 {pick.after['map50_95']:.3f} (−{drop:.3f}), with {fewer} % fewer parameters; "
        f"the unpruned model at 224 px is better: {1 / 0.55:.2f} times as fast at 0.632 after the same fine-tuning"
    )
    reached = f"{1 / knee.after['latency_ratio']:.2f} times as fast at {knee.after['map50_95']:.3f}"
    assert summary.headline.detail == (
        f"Pick {pick.trial_id} (fastest within 0.02 of the unpruned model's mAP50-95), after full fine-tuning of 30 "
        f"epochs. The knee, {knee.trial_id}: {reached} ({formatting.signed(knee.after['map50_95'] - 0.612)})."
    )


def test_the_headline_says_where_no_trial_is_close(record: Build, make_run: MakeRun) -> None:
    """Then it speaks of the knee; before the full fine-tuning it speaks of trials."""
    far = [record("a", 0.58, 8.0), record("bend", 0.57, 5.0), record("c", 0.3, 4.0)]
    folder = make_run(far)
    sentence = summarise(folder).headline.sentence
    assert sentence.startswith(
        "No trial is within 0.02 of n's mAP50-95; bend is 2.48 times as fast (12.4 ms → 5.00 ms)"
    )
    folder.trials_file.unlink()
    for item in (*far, record("close", 0.592, 10.0), record("slower", 0.62, 12.0)):
        folder.store.append(item)
    headline = summarise(folder).headline
    assert headline.sentence == "Pruned, n is 1.24 times as fast (12.4 ms → 10.0 ms) at mAP50-95 0.592 (−0.020)"
    assert "The knee, bend: 2.48 times as fast at 0.570 (−0.042)." in headline.detail
    folder.write_free_move(256, {"map50_95": 0.6, "latency_ms": 9.0})
    told = "; the unpruned model at 256 px is better: 1.38 times as fast at 0.600"
    assert summarise(folder).headline.sentence == headline.sentence + told


def test_the_figures_are_valid_for_plotly(finished_run: RunFolder) -> None:
    found = specs(finished_run.report_html.read_text(encoding="utf-8"))
    assert set(found) == {"front", "hypervolume", "sensitivity", "course"}
    for spec in found.values():
        go.Figure(spec)  # raises for a property that Plotly does not know
    shown = sum(
        len(trace["x"]) for trace in found["front"]["data"] if trace.get("name", "").startswith(("Trial", "Front"))
    )
    assert shown == sum(record.state.value == "completed" for record in finished_run.read_records())
    (menu,) = found["hypervolume"]["layout"]["updatemenus"]
    (trials, hours) = (button["args"][0]["x"][0] for button in menu["buttons"])
    assert trials == found["hypervolume"]["data"][0]["x"]
    assert len(hours) == len(trials)
    assert hours == sorted(hours)
    arrows = [item for item in found["front"]["layout"]["annotations"] if item["showarrow"]]
    assert len(arrows) == 3


def test_figures_and_csv_lie_beside_it(finished_run: RunFolder) -> None:
    for name in ("front", "widths", "hypervolume", "time"):
        pixels = imread(finished_run.report_dir / f"{name}.png")
        assert pixels.shape[1] >= 1200
        inked = np.argwhere(pixels[..., :3].min(axis=2) < 0.8)
        assert (np.ptp(inked, axis=0) > 0.9 * np.array(pixels.shape[:2])).all(), f"{name}.png does not fill its frame"
    with finished_run.front_csv.open(newline="") as file:
        rows = list(csv.DictReader(file))
    members = [record.trial_id for record in front(finished_run.read_records())]
    assert [row["trial_id"] for row in rows] == [*members, "unpruned@288", "unpruned@224"]
    assert [row["kind"] for row in rows] == ["trial"] * len(members) + ["free move"] * 2
    rows = rows[: len(members)]
    assert float(rows[0]["map50_95"]) > float(rows[-1]["map50_95"])


def test_what_the_layers_cost_is_in_the_page_and_beside_it(finished_run: RunFolder) -> None:
    found = summarise(finished_run).insight
    assert found is not None
    page = Page(finished_run.report_html.read_text(encoding="utf-8"))
    text = finished_run.report_markdown.read_text(encoding="utf-8")
    assert "Effect of each layer on the objectives" in page.words
    assert found.reading in page.words
    assert found.reading in text
    for layer in found.layers:
        assert layer.layer in page.words
    with (finished_run.report_dir / "layers.csv").open(newline="") as file:
        assert [row["layer"] for row in csv.DictReader(file)] == [layer.layer for layer in found.layers]
    with (finished_run.report_dir / "hypervolume.csv").open(newline="") as file:
        growth = list(csv.DictReader(file))
    assert len(growth) == len(comparable(finished_run.read_records()))
    assert float(growth[-1]["hypervolume_share"]) >= float(growth[0]["hypervolume_share"]) > 0


def test_figures_of_a_sample_of_the_images_are_said_to_be(finished_run: RunFolder, tmp_path: Path) -> None:
    """Trials go with the baseline on the sample, finished networks with the baseline on all."""
    folder = RunFolder(shutil.copytree(finished_run.path, tmp_path / "run"))
    content = folder.read_baseline()
    some = content["metrics"]["map50_95"]
    every = {"val_images": 100, "val_images_all": 5000, "map50_95_all": some + 0.1}
    folder.write_baseline({**content, "metrics": {**content["metrics"], **every}})
    found = summarise(folder)
    assert found.judged.startswith("trials, and the unpruned model beside them, are judged on 100 of 5,000 validation")
    assert found.front.baseline.accuracy == some
    row = next(row for row in found.finished if row.kind == "baseline")
    assert row.at is not None
    assert row.at.accuracy == pytest.approx(some + 0.1)
    pick = found.front.picks[0].after
    assert pick is not None
    assert found.front.baseline_of(pick) is row.at
    assert found.front.baseline_of(found.front.front[0]) is found.front.baseline
    write_report(folder.path)
    for page in (folder.report_html, folder.report_markdown):
        text = page.read_text(encoding="utf-8")
        assert found.judged in text
        assert formatting.signed(pick.accuracy - some - 0.1) in text
    assert "judged on" not in finished_run.report_markdown.read_text(encoding="utf-8")


def test_before_the_full_fine_tuning_the_picks_are_suggestions(records: list[TrialRecord], make_run: MakeRun) -> None:
    folder = make_run(records)
    page = Page(write_report(folder.path).read_text(encoding="utf-8"))
    assert "Suggested picks" in page.words
    assert "No pick has been fully fine-tuned yet" in page.words
    assert f"paretoprune finetune {folder.path} --trial" in page.words


def test_a_run_without_trials_has_a_report(make_run: MakeRun) -> None:
    folder = make_run([])
    text = write_report(folder.path).read_text(encoding="utf-8")
    assert "The search over n has no result yet" in Page(text).words
    assert set(specs(text)) == {"front"}
    assert sorted(path.name for path in folder.report_dir.glob("*.[ps][nv]g")) == ["front.png", "front.svg"]


def test_a_run_in_which_all_failed_says_why(record: Build, make_run: MakeRun) -> None:
    failed = [record(f"t{n}", state="failed", error="out of memory", metrics={}) for n in range(40)]
    page = Page(write_report(make_run(failed).path).read_text(encoding="utf-8"))
    assert "40 trials ended without a result." in page.words
    assert "out of memory" in page.words
    assert "t0, t1, t2" in page.words
    assert "and 28 more" in page.words


def test_figures_of_an_earlier_report_do_not_stay(finished_run: RunFolder, tmp_path: Path) -> None:
    folder = RunFolder(shutil.copytree(finished_run.path, tmp_path / "run"))
    folder.trials_file.unlink()
    shutil.rmtree(folder.selected_root)
    assert write_report(folder.path) == folder.report_html
    left = sorted(path.name for path in folder.report_dir.glob("*.[ps][nv]g"))
    assert left == ["front.png", "front.svg", "sensitivity.png", "sensitivity.svg"]


def test_records_without_the_optional_figures_are_enough(record: Build, make_run: MakeRun) -> None:
    folder = make_run([record("a", 0.5, 8.0), record("b", 0.4, 6.0), record("c", 0.3, 7.0), record("d", 0.2, 20.0)])
    assert "–" in Page(write_report(folder.path).read_text(encoding="utf-8")).words


def test_different_fidelities_are_told_apart(record: Build, make_run: MakeRun) -> None:
    records = [record(f"t{n}", 0.5 + n / 100, 8.0 + n) for n in range(4)]
    records += [record("far", 0.9, 3.0, epochs=9, fidelity="epochs")]
    text = write_report(make_run(records).path).read_text(encoding="utf-8")
    assert "Shown apart and not compared: 1 trial of another fidelity (9 epochs)." in Page(text).words
    names = {trace["name"]: trace["x"] for trace in specs(text)["front"]["data"] if "name" in trace}
    assert names["Of another fidelity"] == [3.0]
    assert len(names["Front (refit only)"]) == 4


def test_trials_beyond_the_bounds_have_their_own_word(record: Build, make_run: MakeRun) -> None:
    """They were neither stopped by rivals nor taken to another fidelity, also where both are the case elsewhere."""
    done: dict[str, Any] = {"epochs": 3, "fidelity": "epochs"}
    records = [record(f"t{n}", 0.5 + n / 100, 8.0 + n, **done) for n in range(4)]
    records += [record("slow", 0.4, 30.0, state="stopped", violations={"max_latency_ms": 1.0})]
    records += [record("poor", 0.1, 7.0, violations={"min_map": 0.3}, **done)]
    records += [record("behind", 0.2, 9.0, state="stopped", epochs=1, fidelity="epochs")]
    folder = make_run(records)
    text = write_report(folder.path).read_text(encoding="utf-8")
    apart = (
        "Shown apart and not compared: 1 trial beyond the bounds (3 epochs); 1 trial beyond the bounds (refit only); "
        "1 trial stopped early (1 epoch)."
    )
    for words in (Page(text).words, folder.report_markdown.read_text(encoding="utf-8")):
        assert apart in words
        assert "4 completed, 1 stopped, 2 beyond the bounds" in words
        assert "1 trial was not trained, being beyond the bounds." in words
        assert "another fidelity" not in words
    traces = {trace["name"]: trace for trace in specs(text)["front"]["data"] if "name" in trace}
    hover = traces["Stopped early or beyond the bounds"]["hovertext"]
    assert ["beyond the bounds" in line for line in hover] == [True, True, False]
    assert "beyond the bounds" in [trace["name"] for trace in specs(text)["course"]["data"]]
    frame = trials_frame(folder.read_records(), folder.read_baseline())
    assert frame.loc[~frame.feasible, "trial_id"].tolist() == ["slow", "poor"]


def test_three_objectives_are_named(records: list[TrialRecord], make_run: MakeRun) -> None:
    folder = make_run(records)
    folder.config.write_text("search: {objectives: [map50_95, latency_ms, params_m]}")
    assert "found over map50_95, latency_ms, params_m" in Page(write_report(folder.path).read_text()).words


def test_every_objective_has_a_column_with_its_figures(record: Build, make_run: MakeRun) -> None:
    own = [("a", 5.1, 0.711), ("b", 4.2, 0.622), ("c", 3.3, 0.533)]
    records = [
        record(name, metrics={"map50_95": 0.5, "latency_ms": 8.0, "size_mb": size, "map50_95_mask": mask})
        for name, size, mask in own
    ]
    folder = make_run(records)
    content = folder.read_baseline()
    content["metrics"].update(size_mb=6.0, map50_95_mask=0.8)
    folder.write_baseline(content)
    folder.config.write_text("search: {objectives: [map50_95_mask, latency_ms, size_mb]}")
    written = write_report(folder.path).read_text(encoding="utf-8")
    page, text = Page(written), folder.report_markdown.read_text(encoding="utf-8")
    labels = " ".join(label for trace in specs(written)["front"]["data"] for label in trace.get("hovertext", []))
    for words in (page.words, text, labels):
        assert "mask mAP50-95" in words
        assert "size, MB" in words
        for _, size, mask in own:
            assert f"{size:.3f}" in words
            assert f"{mask:.3f}" in words
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines()}
    assert "0.711 | 5.100" in rows["a"]
    assert "0.533 | 3.300" in rows["c"]


def test_names_cannot_become_markup(records: list[TrialRecord], make_run: MakeRun) -> None:
    harmless = NASTY.replace("/", "|")  # a slash is refused in a trial id
    renamed = [TrialRecord.from_json({**item.to_json(), "trial_id": f"{item.trial_id}{harmless}"}) for item in records]
    failed = {"state": "failed", "error": NASTY, "metrics": {}, "trial_id": "bad", "epochs": 0, "fidelity": "refit"}
    renamed.append(TrialRecord.from_json({**records[0].to_json(), **failed}))
    folder = make_run(renamed)
    content = folder.read_baseline()
    content.update(model=NASTY, data=NASTY, device=NASTY, environment={NASTY: NASTY})
    content["layers"][0].update(reason=NASTY, prunable=False)
    folder.write_baseline(content)
    text = write_report(folder.path).read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert not any(tag == "img" for tag, _ in page.elements)
    assert "onerror=alert(1)>&" in page.words  # shown as text
    for trace in specs(text)["front"]["data"]:
        for shown in trace.get("hovertext", []):
            assert "<img" not in shown
            assert "<script" not in shown


def test_script_json_is_json_that_cannot_leave_its_script() -> None:
    content = {NASTY: [NASTY, "\u2028", 1.5]}
    text = script_json(content)
    assert not re.search("[<>&\u2028]", text)
    assert json.loads(text) == content
    with pytest.raises(ValueError, match="not JSON compliant"):
        script_json({"x": float("nan")})


def test_commands_are_safe_to_paste(records: list[TrialRecord], make_run: MakeRun) -> None:
    folder = make_run(records)
    folder.config.write_text(json.dumps({"model": {"path": "my model; rm -rf x.pt"}, "data": {"path": "d.yaml"}}))
    (line,) = [line for _, line in summarise(folder).commands[0].lines]
    assert line.startswith("paretoprune search 'my model; rm -rf x.pt' d.yaml --config")


def test_a_pick_that_waits_has_the_command_that_finishes_it(records: list[TrialRecord], make_run: MakeRun) -> None:
    folder = make_run(records)
    _, *picks = summarise(folder).commands
    assert len(picks) == 3
    for group in picks:
        prune, finetune = (line for _, line in group.lines)
        assert prune.endswith(f"--device cpu -o {group.title}.pt")
        assert finetune == f"paretoprune finetune {folder.path} --trial {group.title}"


def test_latency_meant_for_another_device_is_measured_there(records: list[TrialRecord], make_run: MakeRun) -> None:
    def printed(latency: dict[str, Any]) -> tuple[str, str]:
        config = {"model": {"path": "n.pt"}, "data": {"path": "d.yaml"}, "latency": latency}
        folder.config.write_text(json.dumps(config))
        folder.write_baseline({**folder.read_baseline(), "device": "cuda:0"})
        (found,) = [line for line in summarise(folder).commands[1].lines if " latency " in line[1]]
        return found

    folder = make_run(records, {records[0].trial_id: "knee"})
    assert printed({"target": "own"})[1].endswith("best.pt --against n.pt --device cuda:0")
    assert printed({"target": "cpu:4", "threads": 4, "half": False})[1].endswith("--threads 4 --device cpu")
    purpose, line = printed({"target": "node:edge", "runtime": "onnx", "half": True, "max_seconds": 4.0})
    assert purpose.endswith(", on the node with edge")
    assert line.endswith("--runtime onnx --half --max-seconds 32")


@pytest.mark.slow
def test_five_thousand_trials(
    make_many: Callable[[int], list[TrialRecord]], make_run: MakeRun, drawn_by_browser: Callable[..., str]
) -> None:
    records = make_many(5000)
    folder = make_run(records)
    text = write_report(folder.path).read_text(encoding="utf-8")
    page = Page(text)
    rows = [attributes["data-trial"] for _, attributes in page.elements if "data-trial" in attributes]
    assert set(rows) == {record.trial_id for record in front(records)}
    assert "4,995 completed" in page.words
    assert len(text) < 12e6
    assert drawn_by_browser(folder.report_html).count('<path class="point"') > 2000


@pytest.mark.slow
def test_five_trials(
    make_many: Callable[..., list[TrialRecord]], make_run: MakeRun, drawn_by_browser: Callable[..., str]
) -> None:
    folder = make_run(make_many(5, failed=0, stopped=0))
    page = Page(write_report(folder.path).read_text(encoding="utf-8"))
    assert "5 completed" in page.words
    assert "No trial was stopped early." in page.words
    assert drawn_by_browser(folder.report_html).count('<path class="point"') >= 5


def test_a_folder_that_is_no_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"holds baseline.json, but .* does not"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_old_run_still_has_a_report(tmp_path: Path) -> None:
    old = Path(__file__).parent.parent / "fixtures" / "run_v1"
    shutil.copytree(old, tmp_path / "run")
    page = Page(write_report(tmp_path / "run").read_text(encoding="utf-8"))
    assert "Pruned, bccd_yolov8n is 1.33 times as fast" in page.words


def test_specs_of_empty_parts_are_valid(baseline: dict[str, Any], make_run: MakeRun) -> None:
    summary = summarise(make_run([]))
    go.Figure(front_spec(summary.front, "ms"))
    go.Figure(hypervolume_spec(summary.hypervolume))


@pytest.mark.slow
def test_a_real_browser_draws_every_figure_without_the_network(
    finished_run: RunFolder, drawn_by_browser: Callable[..., str]
) -> None:
    dom = drawn_by_browser(finished_run.report_html)
    assert dom.count('class="main-svg"') >= 4
    points = re.findall(r'<path class="point"', dom)
    assert len(points) >= len(finished_run.read_records()) - 5
    assert "Speed-up over the baseline" in dom


@pytest.mark.slow
def test_on_a_narrow_screen_the_marks_keep_their_distance(
    finished_run: RunFolder, drawn_by_browser: Callable[..., str]
) -> None:
    marks = [drawn_by_browser(finished_run.report_html, width).count('class="x2tick"') for width in (500, 1280)]
    assert 2 <= marks[0] < marks[1]
