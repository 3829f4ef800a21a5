"""The command finetune: picks and stock rivals trained fully, and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from paretoprune.search.commands.options import (
    FILE,
    RUN,
    address_option,
    format_option,
    place_options,
    selector,
    set_option,
)
from paretoprune.search.commands.output import print_rows

SELECTED_COLUMNS = (
    "trial_id",
    "chosen_as",
    "map50_95",
    "map50_95_change_ci95",
    "speedup",
    "speedup_ci95",
    "latency_ms",
    "params_m",
    "epochs",
    "beaten_by_free_move",
    "checkpoint",
)


@click.command()
@click.argument("run", type=RUN)
@selector
@click.option("--trial", multiple=True, metavar="ID", help="Trial to fine-tune; may be repeated.")
@click.option(
    "--native",
    multiple=True,
    type=FILE,
    metavar="MODEL.pt",
    help="Smaller stock model to compare with, trained for as many epochs; may be repeated.",
)
@click.option(
    "--free-moves",
    type=click.IntRange(min=1),
    is_flag=False,
    flag_value=1,
    metavar="[N]",
    help="Fine-tune the unpruned model, too, as the N (1) free moves whose latency is nearest to the picks'.",
)
@click.option(
    "--epochs", type=click.IntRange(min=1), help="Maximum number of epochs.  [default: the run's finetune.epochs]"
)
@click.option(
    "--distill/--no-distill",
    default=None,
    help="Distil from the unpruned model instead of labels.  [default: as the run]",
)
@click.option(
    "--teacher",
    type=FILE,
    metavar="MODEL.pt",
    help="A larger model of the same classes, whose outputs are learned beside the labels.",
)
@click.option("--gpus-per-pick", type=click.IntRange(min=1), help="GPUs that train one pick together.  [default: 1]")
@set_option("finetune.train.mosaic=0.5")
@click.option(
    "--trust-checkpoint",
    is_flag=True,
    help="Load --native models and a --teacher that contain arbitrary pickled code. This can execute code.",
)
@address_option
@place_options
@format_option
def finetune(run: Path, form: str, settings: tuple[str, ...], **options: Any) -> int:
    """Fine-tune the picks of RUN fully, in parallel, and measure them again beside the unpruned model.

    Without --pick and --trial three are picked: the knee, the fastest close to the baseline, the best faster than it.
    """
    from paretoprune.search.api.runs import finetune_picks
    from paretoprune.search.config.run_config import parse_assignments

    options["trust_checkpoint"] = options["trust_checkpoint"] or None  # else it would go before the run's
    options["free_moves"] = options["free_moves"] or 0
    outcome = finetune_picks(run, settings=parse_assignments(settings), **options)
    beaten = any(row["beaten_by_free_move"] for row in outcome.rows)
    print_rows(outcome.rows, form, [name for name in SELECTED_COLUMNS if beaten or name != "beaten_by_free_move"])
    for trial_id, reason in outcome.failed.items():
        click.echo(f"error: {trial_id}: {reason}", err=True)
    return 1 if outcome.failed else 0
