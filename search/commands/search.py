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
    classes_option,
    gpu_hours_option,
    hours_option,
    set_option,
    trust_option,
)
from paretoprune.search.commands.sweeping import sweep


def search_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Bounds, budgets, stopping, and what to begin with; each is a setting of the section ``search``."""
    options = (
        click.option("--min-map", type=float, help="Minimum accuracy (mAP50-95 or top-1)."),
        click.option("--max-latency-ms", type=float, help="Maximum latency, ms; slower plans are not trained."),
        click.option("--max-latency-ratio", type=float, help="Maximum latency as a fraction of the unpruned model's."),
        click.option("--min-speedup", type=float, help="Minimum speed-up over the unpruned model (2: twice as fast)."),
        click.option("--max-params-m", type=float, help="Maximum number of parameters, millions."),
        hours_option,
        gpu_hours_option,
        click.option(
            "--stopping/--no-stopping", default=None, help="Stop unpromising trials early.  [default: stopping]"
        ),
        click.option("--plan", type=FILE, multiple=True, help="A plan.json to evaluate first; may be repeated."),
        click.option("--from-run", type=FILE, help="Warm-start the sampler with the trials of another run on MODEL."),
    )
    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(options), command)


@click.command()
@click.argument("model", type=FILE)
@click.argument("data", type=FILE)
@click.option("--run", type=RUN, help="The run's folder.  [default: runs/<model's name>]")
@classes_option
@click.option("--trials", type=int, help="Total number of trials.  [default: 50]")
@click.option("--epochs", type=int, help="Epochs per trial; 0: evaluated right after the refit.  [default: 1]")
@click.option("--imgsz", type=SIZE, help="Side of the input, pixels, or HEIGHT,WIDTH.  [default: 640]")
@click.option("--strategy", help=f"{listed(STRATEGY_NAMES)}.  [default: {STRUCTURAL}]")
@click.option(
    "--latency-target", help="own, cpu:N, node:RESOURCE or http://HOST:PORT; see docs/latency.md.  [default: own]"
)
@click.option("--recover", type=click.Choice(RECOVERIES), help="Recovery after removal.  [default: refit]")
@click.option(
    "--distill/--no-distill",
    default=None,
    help="Distil from the unpruned model instead of labels.  [default: in trials]",
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
    run folder, it resumes.
    """
    from paretoprune.search.api.runs import prepare_search
    from paretoprune.search.config.run_config import parse_assignments

    options["plan"] = options["plan"] or None
    options["trust_checkpoint"] = options["trust_checkpoint"] or None  # else it would go before the file's
    assigned = parse_assignments(settings)
    return sweep(prepare_search(model, data, run=run, config=file, settings=assigned, **options))
