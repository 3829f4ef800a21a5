"""The command resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from paretoprune.search.commands.options import RUN, address_option, gpu_hours_option, hours_option, place_options
from paretoprune.search.commands.sweeping import sweep


@click.command()
@click.argument("run", type=RUN)
@click.option("--trials", type=int, help="Total number of trials; more than before extends the run.")
@hours_option
@gpu_hours_option
@address_option
@place_options
def resume(run: Path, **options: Any) -> int:
    """Resume an interrupted RUN, or extend a finished one; prints the front.

    Finished trials are kept, unfinished ones continue under their ids.
    """
    from paretoprune.search.api.runs import prepare_resume

    return sweep(prepare_resume(run, **options))
