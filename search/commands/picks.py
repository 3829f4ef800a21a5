"""Commands over a run's finished trials: front, finetune, report."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paretoprune.search.commands.output import (
    FILE,
    RUN,
    address_option,
    echo,
    emit,
    format_option,
    place_options,
    with_objectives,
)

if TYPE_CHECKING:
    from paretoprune.results.store.bounds import Bounds

COLUMNS = (
    "trial_id", "map50_95", "latency_ms", "speedup", "speedup_ci95", "params_m", "gflops", "fidelity", "tied_with",
    "beaten_by", "chosen_as", "checkpoint",
)  # fmt: skip
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
IDS_IN_A_CELL = 3

Command = Callable[..., Any]


def selector(command: Command) -> Command:
    """The options that say which trials: bounds, and what to pick within them."""
    options = (
        click.option("--max-latency-ms", type=click.FloatRange(min=0), help="Only trials at most this slow."),
        click.option("--max-params-m", type=click.FloatRange(min=0), help="Only trials of at most so many million."),
        click.option("--max-gflops", type=click.FloatRange(min=0), help="Only trials of at most so many GFLOPs."),
        click.option("--min-map", type=click.FloatRange(0, 1), help="Only trials of at least this mAP50-95 or top-1."),
        click.option("--max-drop", type=float, help="Only trials that lose at most so much of it (0.02: two points)."),
        click.option(
            "--pick", "picks", multiple=True, metavar="WHAT",
            help="K (so many), knee, best, fastest, smallest, spread:K or a trial's id; may be repeated.",
        ),
    )  # fmt: skip
    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(options), command)


def bounds_of(values: Mapping[str, Any]) -> Bounds:
    """The bounds among the options of `selector`."""
    from paretoprune.results.store.bounds import Bounds

    return Bounds(**{item.name: values[item.name] for item in dataclasses.fields(Bounds)})


@click.command()
@click.argument("run", type=RUN)
@format_option
@selector
def front(run: Path, form: str, picks: tuple[str, ...], **values: Any) -> None:
    """Print RUN's front, the most accurate trial first.

    tied_with: trials that the measurements do not tell apart from this one (overlapping intervals of latency and of
    accuracy). beaten_by: trials that are clearly better in one objective and clearly worse in none.
    """
    from paretoprune.results.analysis.frames import front_rows
    from paretoprune.results.selection.uncertainty import accuracy_noise
    from paretoprune.search.sweep.preflight import existing_run

    folder, _ = existing_run(run)
    rows = front_rows(folder, bounds_of(values), picks)
    if form != "table":
        emit(rows, form)
        return
    columns = with_objectives([name for name in COLUMNS if name != "chosen_as" or picks], folder.objectives())
    emit([{**row, **{name: _few(row[name]) for name in ("tied_with", "beaten_by")}} for row in rows], form, columns)
    click.echo(f"accuracy noise: {accuracy_noise(folder.read_baseline()).text}", err=True)


def _few(ids: Sequence[str]) -> str | None:
    """The first ids and how many more, so that a cell stays narrow."""
    more = f" +{len(ids) - IDS_IN_A_CELL}" if len(ids) > IDS_IN_A_CELL else ""
    return " ".join(ids[:IDS_IN_A_CELL]) + more if ids else None


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
