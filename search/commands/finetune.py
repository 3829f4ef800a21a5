"""The command finetune: picks and stock rivals trained fully, and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from paretoprune.search.commands.options import (
    FILE,
    RUN,
    address_option,
    bounds_of,
    format_option,
    place_options,
    selector,
)
from paretoprune.search.commands.output import emit

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
    "checkpoint",
)


@click.command()
@click.argument("run", type=RUN)
@selector
@click.option("--trial", "trials", multiple=True, metavar="ID", help="This trial; may be repeated.")
@click.option(
    "--native",
    "natives",
    multiple=True,
    type=FILE,
    metavar="MODEL.pt",
    help="A smaller stock model as a rival: same budget, measured with the picks; may be repeated.",
)
@click.option("--epochs", type=click.IntRange(min=1), help="Epochs at most.  [default: the run's finetune.epochs]")
@click.option(
    "--distill/--no-distill",
    default=None,
    help="Learn the unpruned model's outputs, not labels.  [default: as the run]",
)
@click.option("--gpus-per-pick", type=click.IntRange(min=1), help="GPUs that train one pick together.  [default: 1]")
@click.option("--trust-checkpoint", is_flag=True, help="Load natives that name unusual things; runs what they say.")
@address_option
@place_options
@format_option
def finetune(
    run: Path,
    model: str | None,
    data: str | None,
    picks: tuple[str, ...],
    trials: tuple[str, ...],
    natives: tuple[str, ...],
    epochs: int | None,
    distill: bool | None,
    gpus_per_pick: int | None,
    trust_checkpoint: bool,
    address: str | None,
    form: str,
    **values: Any,
) -> int:
    """Fine-tune the picks of RUN fully, in parallel, and measure them again beside the unpruned model.

    Without --pick and --trial three are picked: the knee, the fastest close to the baseline, the best faster than it.
    """
    from paretoprune.search.config.inputs import check_dataset_same, check_places, check_weights, placed
    from paretoprune.search.config.run_config import build_config, merge
    from paretoprune.search.config.stored import save_run_config
    from paretoprune.search.finalists.finetune_picks import choose_picks, promote
    from paretoprune.search.sweep.preflight import check_batches, check_natives, check_teachable, existing_run

    if picks and trials:
        raise click.UsageError("give --pick or --trial, not both")
    folder, before = existing_run(run)
    config = placed(before, model, data)
    check_places(folder, config)
    check_weights(folder, config.model.path)
    check_dataset_same(folder, config)
    if config != before:
        save_run_config(folder, config)  # the next command finds them there
    given = {"epochs": epochs, "distill": distill, "gpus_per_pick": gpus_per_pick}
    given["trust_checkpoint"] = trust_checkpoint or None
    changed = {name: value for name, value in given.items() if value is not None}
    config = build_config(merge(config.model_dump(mode="json"), {"finetune": changed}), "the options")
    if address is not None:
        config = config.model_copy(update={"resources": config.resources.model_copy(update={"address": address})})
    chosen = choose_picks(folder, config.search.objectives, picks or trials, bounds_of(values))
    check_batches(config, "finetune")
    check_teachable(config)
    check_natives(config, natives)
    outcome = promote(folder, config, chosen, natives=natives)
    emit(outcome.rows, form, SELECTED_COLUMNS)
    for trial_id, reason in outcome.failed.items():
        click.echo(f"error: {trial_id}: {reason}", err=True)
    return 1 if outcome.failed else 0
