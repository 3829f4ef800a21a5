"""The report: one HTML file that opens offline; Markdown, tables and figures beside it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from paretoprune.base import formatting
from paretoprune.base.atomic import write_bytes, write_text
from paretoprune.results.analysis.frames import front_frame, trials_frame
from paretoprune.results.analysis.layer_effect_frames import hypervolume_frame, insight_frame
from paretoprune.results.analysis.strategy_comparison import Comparison, ComparisonFolder, read_comparison
from paretoprune.results.analysis.summary import Summary, summarise
from paretoprune.results.report import palette
from paretoprune.results.report.markdown import markdown
from paretoprune.results.report.matplotlib_figures import (
    draw_front,
    draw_hypervolume,
    draw_sensitivity,
    draw_time,
    draw_widths,
)
from paretoprune.results.report.model_card import write_cards
from paretoprune.results.report.plotly_figures import (
    course_spec,
    front_spec,
    hypervolume_spec,
    script_json,
    sensitivity_spec,
)
from paretoprune.results.report.strategy_comparison_page import figure_spec, groups_by_strategy
from paretoprune.results.store.accuracy import accuracy_label, accuracy_name, accuracy_of
from paretoprune.results.store.objectives import title
from paretoprune.results.store.run_folder import RunFolder

_TEMPLATES = Path(__file__).parent / "templates"


def write_report(run_dir: str | Path) -> Path:
    """Write a run's report and return the path of report.html, the same in one file that opens offline.

    Beside it: a model card in the folder of each finished pick, report.md, front.csv, trials.csv and trials.parquet
    (all trials), report/layers.csv and hypervolume.csv, report/*.png and *.svg. Works at any time of a run, also before
    the first trial has finished. A comparison of strategies in the folder is part of the report; where there is no
    search, it is the whole of it. Raises ResultsError where the folder is not a run folder or one of its files is
    broken, OSError where it cannot be written.
    """
    folder = RunFolder(Path(run_dir))
    comparison = read_comparison(ComparisonFolder(folder.path))
    if comparison is not None and not folder.baseline.is_file():
        return write_text(folder.report_html, render_comparison(comparison))
    summary = summarise(folder)
    write_tables(folder, summary)
    write_cards(folder, summary)
    draw_figures(summary, folder.report_dir)
    write_text(folder.report_markdown, markdown(summary, folder.report_dir.name))
    return write_text(folder.report_html, render(summary, comparison))


def write_tables(folder: RunFolder, summary: Summary) -> None:
    """front.csv, trials.csv and trials.parquet; what the trials say of the layers, and how the front grew."""
    write_text(folder.front_csv, front_frame(folder).to_csv(index=False))
    records, baseline, objectives = folder.read_records(), folder.read_baseline(), folder.objectives()
    write_text(folder.report_dir / "layers.csv", insight_frame(summary.insight, objectives).to_csv(index=False))
    growth = hypervolume_frame(records, baseline, objectives)
    write_text(folder.report_dir / "hypervolume.csv", growth.to_csv(index=False))
    trials = trials_frame(records, baseline, objectives)
    write_text(folder.trials_csv, trials.to_csv(index=False))
    buffer = io.BytesIO()
    trials.to_parquet(buffer, index=False)
    write_bytes(folder.trials_parquet, buffer.getvalue())


def draw_figures(summary: Summary, directory: Path) -> list[Path]:
    """The figures that have something to show, as PNG and SVG in `directory`; stale ones are removed."""
    title = f"{summary.model}: pruned networks"
    drawn = [draw_front(summary.front, summary.latency_title, title, directory / "front.png")]
    if summary.widths:
        drawn.append(draw_widths(summary.widths, directory / "widths.png"))
    if summary.sensitivity:
        drawn.append(draw_sensitivity(summary.sensitivity, directory / "sensitivity.png"))
    if summary.hypervolume.trials:
        drawn.append(draw_hypervolume(summary.hypervolume, directory / "hypervolume.png"))
    if summary.time.phases:
        drawn.append(draw_time(summary.time, directory / "time.png"))
    for name in ("widths.png", "sensitivity.png", "hypervolume.png", "time.png"):
        if directory / name not in drawn:
            for suffix in (".png", ".svg"):
                (directory / name).with_suffix(suffix).unlink(missing_ok=True)
    return drawn


def render(summary: Summary, comparison: Comparison | None = None) -> str:
    """The HTML text of a run's report, with the comparison of strategies that lies in its folder."""
    specs: dict[str, Any] = {"front": front_spec(summary.front, summary.latency_title)}
    if summary.sensitivity:
        specs["sensitivity"] = sensitivity_spec(summary.sensitivity)
    if summary.hypervolume.trials:
        specs["hypervolume"] = hypervolume_spec(summary.hypervolume)
    if summary.course.hours:
        specs["course"] = course_spec(summary.course)
    return render_page("report.html.j2", specs, comparison, run=summary)


def render_comparison(comparison: Comparison) -> str:
    """The HTML text where a comparison of strategies is all there is."""
    return render_page("comparison.html.j2", {}, comparison)


def render_page(template: str, specs: Mapping[str, Any], comparison: Comparison | None = None, **values: Any) -> str:
    """A page of `templates` with Plotly inside and `specs` (element id -> figure) drawn into it.

    Every value is escaped: autoescape for HTML, `script_json` for what the scripts read.
    """
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(wording=formatting, palette=palette, title=title)
    environment.globals.update(accuracy_of=accuracy_of, accuracy_name=accuracy_name, accuracy_label=accuracy_label)
    if comparison is not None:
        specs = {**specs, "comparison": figure_spec(comparison)}
        values["skipped_groups"] = groups_by_strategy(comparison)
    return environment.get_template(template).render(
        comparison=comparison,
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        plotly=Markup(get_plotlyjs()),  # Plotly's own bundle; it holds no closing script tag
        specs=Markup(script_json(specs)),
        **values,
    )
