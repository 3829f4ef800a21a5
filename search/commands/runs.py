"""Commands that make and watch a run: search, resume, status."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paretoprune.pruning.names import RECOVERIES, STRATEGY_NAMES, STRUCTURAL, listed
from paretoprune.search.commands.output import (
    FILE,
    FOLDER,
    RUN,
    SIZE,
    address_option,
    echo,
    emit,
    emit_one,
    format_option,
    place_options,
    set_option,
    trust_option,
    with_objectives,
)
from paretoprune.search.monitoring.command_line import command_line

if TYPE_CHECKING:
    from paretoprune.search.config.run_config import RunConfig
    from paretoprune.search.sweep.preflight import Prepared

FRONT_COLUMNS = ("trial_id", "map50_95", "latency_ms", "latency_ratio", "params_m", "gflops", "fidelity")

hours_option = click.option("--hours", type=float, help="No trial begins after so many hours.")
gpu_hours_option = click.option("--gpu-hours", type=float, help="No trial begins after so many GPU hours in all.")


def search_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Bounds, budgets, stopping, and what to begin with; each is a setting of the section ``search``."""
    options = (
        click.option("--min-map", type=float, help="Least accuracy of use (mAP50-95 or top-1)."),
        click.option("--max-latency-ms", type=float, help="Greatest latency of use; slower plans are not trained."),
        click.option("--max-params-m", type=float, help="Greatest number of parameters of use, millions."),
        hours_option,
        gpu_hours_option,
        click.option("--stopping/--no-stopping", default=None, help="End hopeless trials early.  [default: stopping]"),
        click.option("--plan", "plans", type=FILE, multiple=True, help="A plan.json to try first; may be repeated."),
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
    model: str,
    data: str,
    run: Path | None,
    trials: int | None,
    epochs: int | None,
    imgsz: int | None,
    strategy: str | None,
    latency_target: str | None,
    recover: str | None,
    distill: bool | None,
    file: Path | None,
    settings: tuple[str, ...],
    address: str | None,
    trust_checkpoint: bool,
    **more: Any,
) -> int:
    """Search MODEL's pruning trade-offs on DATA; prints the front.

    MODEL is an Ultralytics checkpoint (.pt), DATA its data.yaml (a classifier's: its folder). Called again on the same
    run folder, it goes on.
    """
    from paretoprune.search.sweep.preflight import prepare

    options: dict[str, Any] = {"model.path": model, "data.path": data, "search.trials": trials, "trial.epochs": epochs}
    options |= {"model.imgsz": imgsz, "trial.strategy": strategy, "resources.address": address}
    options |= {"latency.target": latency_target}
    options |= {"model.trust_checkpoint": trust_checkpoint or None}
    options |= {"recover.how": recover, "trial.distill": distill, "finetune.distill": distill}
    options |= {f"search.{name}": list(value) or None if name == "plans" else value for name, value in more.items()}
    config = compose(file, options, settings)
    return sweep(prepare(config, run or Path("runs") / Path(model).stem))


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


@click.command()
@click.argument("run", type=RUN)
@format_option
def status(run: Path, form: str) -> None:
    """Say how far RUN is: trials done, running, left, the front, the time left."""
    from paretoprune.search.monitoring.status import run_status, status_lines
    from paretoprune.search.sweep.preflight import existing_run

    folder, config = existing_run(run)
    state = run_status(folder, config.search.trials, config.search.objectives)
    if form == "table":
        for line in status_lines(state):
            echo(line)
    else:
        emit_one(state.to_row(), form)


def compose(file: Path | None, options: dict[str, Any], settings: Sequence[str]) -> RunConfig:
    """Defaults, then the file, then options that were given, then ``--set``."""
    from paretoprune.search.config.paths import resolve_paths
    from paretoprune.search.config.run_config import build_config, merge, nest, parse_assignments, read_yaml

    values: dict[str, Any] = {}
    if file is not None:
        values = read_yaml(file)
        # On their own first, so that a mistake in the file is reported with the file's name.
        build_config(merge({"model": {"path": "model.pt"}, "data": {"path": "data.yaml"}}, values), str(file))
    values = merge(values, nest({key: value for key, value in options.items() if value is not None}))
    values = merge(values, parse_assignments(settings))
    return build_config(resolve_paths(values), "the settings")


def sweep(prepared: Prepared) -> int:
    """Run the sweep, print the front, say what comes next."""
    from paretoprune.results.analysis.frames import front_rows
    from paretoprune.results.store.records import BEYOND_BOUNDS
    from paretoprune.search.sweep.sweep import run_sweep

    outcome = run_sweep(prepared)
    say_ignored(prepared.config.data.path)
    rows = front_rows(prepared.folder)
    emit(rows, "table", with_objectives(FRONT_COLUMNS, prepared.config.search.objectives))
    counts = {"stopped": outcome.stopped, "failed": outcome.failed, BEYOND_BOUNDS: outcome.infeasible}
    told = "".join(f", {count} {name}" for name, count in counts.items() if count)
    click.echo(f"{outcome.finished}/{outcome.total} trials{told}; front of {len(rows)} trials", err=True)
    if outcome.fault:
        click.echo(outcome.fault, err=True)
    if outcome.used_up:
        click.echo(f"used up: {outcome.used_up}", err=True)
    shown = prepared.folder.path
    if outcome.interrupted or outcome.finished < outcome.total:
        click.echo(f"go on: {command_line('resume', shown)}", err=True)
        return int(outcome.interrupted)
    click.echo(f"next: {command_line('finetune', shown)}, then {command_line('report', shown)}", err=True)
    return 0


def say_ignored(data: str) -> None:
    """A line about images that Ultralytics could not read, where there are any."""
    from paretoprune.pruning.data.ignored_images import ignored_images

    lines = ignored_images(data)
    if lines:
        click.echo(f"{len(lines)} images were left out of training and validation; the first: {lines[0]}", err=True)
