"""The command status."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from paretoprune.base.messages import is_live, showing
from paretoprune.search.commands.options import RUN, format_option
from paretoprune.search.commands.output import echo, print_row, stdout_width

if TYPE_CHECKING:
    from paretoprune.search.monitoring.status import RunStatus

LOOK_SECONDS = 2.0


@click.command()
@click.argument("run", type=RUN)
@click.option(
    "--watch", is_flag=True, help="Refresh until the run has ended, or Ctrl-C; in a pipe a line for each change."
)
@format_option
def status(run: Path, watch: bool, form: str) -> None:
    """Show the progress of RUN: trials done, running and left, the front, the time left."""
    from paretoprune.search.api.runs import Run
    from paretoprune.search.monitoring.status import status_lines

    if watch:
        if form == "csv":
            raise click.UsageError("--watch prints a table or json, but got --format csv")
        _watch(run, form)
        return
    state = Run(run).status()
    if form == "table":
        for line in status_lines(state):
            echo(line)
    else:
        print_row(state.to_row(), form)


def _watch(run: Path, form: str) -> None:
    """On a terminal what `status` prints, made anew; else a line of it, or of JSON, for each change."""
    from paretoprune.search.api.runs import Run
    from paretoprune.search.monitoring.status import status_lines

    state = Run(run).status()
    on_terminal = form == "table" and stdout_width() is not None and is_live()
    shown = ""
    with showing(lambda: status_lines(state)) if on_terminal else nullcontext():
        try:
            while True:
                if not on_terminal and (change := _change(state, form)) != shown:
                    shown = change
                    echo(change if form == "json" else f"{time.strftime('%H:%M:%S')} {change}")
                if state.driver is None:
                    break
                time.sleep(LOOK_SECONDS)
                state = Run(run).status()
        except KeyboardInterrupt:  # how a person ends it
            pass
    for line in status_lines(state) if on_terminal else ():
        echo(line)


def _change(state: RunStatus, form: str) -> str:
    """One line that is another one as soon as anything changes."""
    from paretoprune.search.monitoring.progress import summary_line

    if form == "json":
        return json.dumps(state.to_row())
    return "; ".join([summary_line(state.progress), *(f"{name} {doing}" for name, doing in state.phases.items())])
