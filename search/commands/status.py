"""The command status."""

from __future__ import annotations

from pathlib import Path

import click

from paretoprune.search.commands.options import RUN, format_option
from paretoprune.search.commands.output import echo, emit_one


@click.command()
@click.argument("run", type=RUN)
@format_option
def status(run: Path, form: str) -> None:
    """Show the progress of RUN: trials done, running and left, the front, the time left."""
    from paretoprune.search.api.runs import Run
    from paretoprune.search.monitoring.status import status_lines

    state = Run(run).status()
    if form == "table":
        for line in status_lines(state):
            echo(line)
    else:
        emit_one(state.to_row(), form)
