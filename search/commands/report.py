"""The command report: one run's, or several on one page."""

from __future__ import annotations

from pathlib import Path

import click

from paretoprune.search.commands.options import RUN, place_options
from paretoprune.search.commands.output import echo


@click.command()
@click.argument("runs", type=RUN, nargs=-1, required=True, metavar="RUN...")
@place_options
def report(runs: tuple[Path, ...], model: str | None, data: str | None) -> None:
    """Write RUN's report.html (opens offline), front.csv and figures; prints the report's path.

    Of several runs, one page that lays them over each other: runs.html in the first one's folder.
    """
    from paretoprune.results.analysis.strategy_comparison import ComparisonFolder
    from paretoprune.results.report.report import write_report
    from paretoprune.results.report.run_comparison_page import write_overlay
    from paretoprune.results.store.run_folder import RunFolder
    from paretoprune.search.config.inputs import check_comparable

    if len(runs) > 1 and (model or data):
        raise click.UsageError("--model and --data say where one run's lie now; give one RUN with them")
    for run in runs:
        if len(runs) > 1 or not ComparisonFolder(run).json.is_file():  # a comparison is reported without a search, too
            _check_run(run, model, data)
    check_comparable([RunFolder(run) for run in runs])
    echo(str(write_report(runs[0]) if len(runs) == 1 else write_overlay(runs)))


def _check_run(run: Path, model: str | None, data: str | None) -> None:
    """A run's model and dataset are still its own; where they are not at hand, a report is written all the same."""
    from paretoprune.base.messages import note
    from paretoprune.search.config.inputs import check_dataset_same, check_weights, missing, placed
    from paretoprune.search.config.stored import save_run_config
    from paretoprune.search.sweep.preflight import existing_run

    folder, before = existing_run(run)
    config = placed(before, model, data)
    check_weights(folder, config.model.path)
    gone = missing(config)
    if "dataset" not in gone:
        check_dataset_same(folder, config)
    for what, option in gone.items():
        note(f"the {what} of {folder.path} is not where it was and was not compared; {option} says where it lies now")
    if config != before:
        save_run_config(folder, config)
