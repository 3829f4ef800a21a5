"""The command demo: the whole job on what the project brings along, in minutes, without a network or a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paretoprune.base.messages import note
from paretoprune.results.store.accuracy import accuracy_label, accuracy_of, trade_off_text
from paretoprune.search.commands.options import FOLDER
from paretoprune.search.commands.output import as_table, echo
from paretoprune.search.commands.sweeping import sweep
from paretoprune.search.monitoring.command_line import command_line

if TYPE_CHECKING:
    from paretoprune.results.store.run_files import Selected
    from paretoprune.results.store.run_folder import RunFolder

# Chosen for two idle CPU cores: a trial takes some fifteen seconds, the whole demo five to eight minutes.
TRIAL_EPOCHS = 1
FULL_EPOCHS = 20
PICKS = 2
LATENCY_SECONDS = 2.0


@click.command()
@click.option("--run", type=FOLDER, default=Path("runs/demo"), show_default=True, help="The run's folder.")
@click.option("--trials", type=click.IntRange(min=1), default=12, show_default=True, help="Total number of trials.")
def demo(run: Path, trials: int) -> int:
    """Run the full pipeline on the built-in dataset and model: search, pick, full fine-tuning, report."""
    return run_demo(run, trials)


def demo_settings(trials: int) -> dict[str, Any]:
    """The demo's settings; everything not named keeps its default."""
    return {
        "search.trials": trials,
        "trial.epochs": TRIAL_EPOCHS,
        "finetune.epochs": FULL_EPOCHS,
        "latency.max_seconds": LATENCY_SECONDS,
    }


def run_demo(run: Path, trials: int) -> int:
    """Build the dataset, search, fine-tune two picks, report; ends with the finalists and what to do next.

    Returns the exit code.
    """
    from paretoprune.pruning.builtin import BASELINE, IMGSZ
    from paretoprune.pruning.builtin.dataset import build_dataset
    from paretoprune.search.api.runs import finetune_picks, prepare_search
    from paretoprune.search.api.runs import report as write_report
    from paretoprune.search.sweep.preflight import check_writable

    check_writable(run)
    note("building the dataset")
    dataset = build_dataset(run.parent / "builtin-data")
    prepared = prepare_search(BASELINE, dataset.resolve(), run=run, imgsz=IMGSZ, settings=demo_settings(trials))
    if sweep(prepared) != 0:
        return 1
    folder = prepared.folder
    promotion = finetune_picks(folder.path, pick=str(PICKS))
    report = write_report(folder.path)
    if promotion.failed:
        for trial_id, reason in promotion.failed.items():
            click.echo(f"error: {trial_id}: {reason}", err=True)
        return 1
    for line in closing_lines(folder, folder.read_selected(), report):
        echo(line)
    return 0


def closing_lines(folder: RunFolder, selected: Sequence[Selected], report: Path) -> list[str]:
    """Every finalist beside the unpruned model, the report's headline first; the report; what to do with one's own."""
    from paretoprune.results.selection.selection import lead_pick

    content = folder.read_baseline()
    lead = lead_pick(selected, content)
    rows = [{"network": "unpruned", **_figures(content["metrics"])}]
    for item in sorted(selected, key=lambda item: item is not lead):
        words = {"against the unpruned model": trade_off_text(item.after, item.baseline), "picked as": item.chosen_as}
        rows.append({"network": item.trial_id, **_figures(item.after), **words})
    own = [("search", "my.pt", "my/data.yaml", "--run", "runs/my"), ("finetune", "runs/my"), ("report", "runs/my")]
    return [
        *as_table(rows, list(rows[-1])).splitlines(),
        "",
        f"report: {report}",
        "your own model next:",
        *(f"  {command_line(*words)}" for words in own),
    ]


def _figures(metrics: Mapping[str, Any]) -> dict[str, str]:
    """The columns of a network."""
    accuracy = f"{accuracy_of(metrics) or 0.0:.3f}"
    figures = {"latency": f"{metrics['latency_ms']:.2f} ms", "parameters": f"{metrics['params_m']:.2f} M"}
    return {accuracy_label(metrics): accuracy, **figures}
