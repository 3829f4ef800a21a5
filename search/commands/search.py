"""The command search."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from paretoprune.pruning.names import RECOVERIES, STRATEGY_NAMES, STRUCTURAL, listed
from paretoprune.search.commands.options import (
    FILE,
    FOLDER,
    RUN,
    SIZE,
    address_option,
    gpu_hours_option,
    hours_option,
    set_option,
    trust_option,
)
from paretoprune.search.commands.sweeping import sweep


def search_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Bounds, budgets, stopping, and what to begin with; each is a setting of the section ``search``."""
    options = (
        click.option("--min-map", type=float, help="Least accuracy of use (mAP50-95 or top-1)."),
        click.option("--max-latency-ms", type=float, help="Greatest latency of use; slower plans are not trained."),
        click.option("--max-params-m", type=float, help="Greatest number of parameters of use, millions."),
        hours_option,
        gpu_hours_option,
        click.option("--stopping/--no-stopping", default=None, help="End hopeless trials early.  [default: stopping]"),
        click.option("--plan", type=FILE, multiple=True, help="A plan.json to try first; may be repeated."),
        click.option("--from-run", type=FILE, help="Another run on MODEL, whose trials the sampler is told."),
    )
    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(options), command)


@click.command()
@click.argument("model", type=FILE)
@click.argument("data", type=FILE)
@click.option("--run", type=RUN, help="The run's folder.  [default: runs/<model's name>]")
@click.option("--trials", type=int, help="Trials in all.  [default: 50]")
@click.option("--epochs", type=int, help="Epochs of a trial; 0: judged right after the refit.  [default: 1]")
@click.option("--imgsz", type=SIZE, help="Side of the input, pixels.  [default: 640]")
@click.option("--strategy", help=f"{listed(STRATEGY_NAMES)}.  [default: {STRUCTURAL}]")
@click.option("--latency-target", help="own, cpu:N or node:RESOURCE; see docs/latency.md.  [default: own]")
@click.option("--recover", type=click.Choice(RECOVERIES), help="What follows removal.  [default: refit]")
@click.option(
    "--distill/--no-distill", default=None, help="Learn the unpruned model's outputs, not labels.  [default: in trials]"
)
@search_options
@click.option("--config", "file", type=FOLDER, help="Settings from a YAML file.")
@set_option("space.round_to=16")
@address_option
@trust_option
def search(
    model: str, data: str, run: Path | None, file: Path | None, settings: tuple[str, ...], **options: Any
) -> int:
    """Search MODEL's pruning trade-offs on DATA; prints the front.

    MODEL is an Ultralytics checkpoint (.pt), DATA its data.yaml (a classifier's: its folder). Called again on the same
    run folder, it goes on.
    """
    from paretoprune.search.api.runs import prepare_search
    from paretoprune.search.config.run_config import parse_assignments

    options["plan"] = options["plan"] or None
    options["trust_checkpoint"] = options["trust_checkpoint"] or None  # else it would go before the file's
    assigned = parse_assignments(settings)
    return sweep(prepare_search(model, data, run=run, config=file, settings=assigned, **options))
