"""The command resume."""

from __future__ import annotations

from pathlib import Path

import click

from paretoprune.search.commands.options import RUN, address_option, gpu_hours_option, hours_option, place_options
from paretoprune.search.commands.sweeping import sweep


@click.command()
@click.argument("run", type=RUN)
@click.option("--trials", type=int, help="Trials in all; more than before extends the run.")
@hours_option
@gpu_hours_option
@address_option
@place_options
def resume(run: Path, address: str | None, model: str | None, data: str | None, **more: float | None) -> int:
    """Go on with RUN after any kind of end, or extend a finished one; prints the front.

    Finished trials are kept, unfinished ones are done again under their ids.
    """
    from paretoprune.search.config.inputs import check_places, placed
    from paretoprune.search.config.run_config import build_config, merge, nest
    from paretoprune.search.sweep.preflight import existing_run, prepare

    folder, config = existing_run(run)
    config = placed(config, model, data)
    check_places(folder, config)
    given = {**{f"search.{name}": value for name, value in more.items()}, "resources.address": address}
    over = nest({name: value for name, value in given.items() if value is not None})
    if over:
        config = build_config(merge(config.model_dump(mode="json"), over), "the options")
    return sweep(prepare(config, folder.path, moved=bool(model or data)))
