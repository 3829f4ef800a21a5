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

    Several runs are compared on one page: runs.html in the first one's folder.
    """
    from paretoprune.search.api.runs import report as write

    echo(str(write(*runs, model=model, data=data)))
