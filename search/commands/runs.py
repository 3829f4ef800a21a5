"""Commands that make and watch a run: search, resume, status."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from search.output import FOLDER, RECOVERIES, RUN, address_option, emit, emit_one, format_option, trust_option

if TYPE_CHECKING:
    from search.config import RunConfig
    from search.preflight import Prepared

FRONT_COLUMNS = ("trial_id", "map50_95", "latency_ms", "latency_ratio", "params_m", "gflops", "fidelity")


@click.command()
@click.argument("model")
@click.argument("data")
@click.option("--run", type=RUN, help="The run's folder.  [default: runs/<model's name>]")
@click.option("--trials", type=int, help="Trials in all.  [default: 50]")
@click.option("--epochs", type=int, help="Epochs of a trial; 0: judged right after the refit.  [default: 1]")
@click.option("--imgsz", type=int, help="Side of the input, pixels.  [default: 640]")
@click.option("--strategy", help="structural, sequential, adapter, skip or mask.  [default: structural]")
@click.option("--recover", type=click.Choice(RECOVERIES), help="What follows removal.  [default: refit]")
@click.option("--distill/--no-distill", default=None, help="Let the unpruned model teach.  [default: no-distill]")
@click.option("--config", "file", type=FOLDER, help="Settings from a YAML file.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="One setting, e.g. space.round_to=16.")
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
    recover: str | None,
    distill: bool | None,
    file: Path | None,
    settings: tuple[str, ...],
    address: str | None,
    trust_checkpoint: bool,
) -> int:
    """Search MODEL's pruning trade-offs on DATA; prints the front.

    MODEL is an Ultralytics checkpoint (.pt), DATA its data.yaml (a classifier's: its folder). Called again on the same
    run folder, it goes on.
    """
    from search.preflight import prepare

    options: dict[str, Any] = {"model.path": model, "data.path": data, "search.trials": trials, "trial.epochs": epochs}
    options |= {"model.imgsz": imgsz, "trial.strategy": strategy, "resources.address": address}
    options |= {"model.trust_checkpoint": trust_checkpoint or None}
    options |= {"recover.how": recover, "trial.distill": distill, "finetune.distill": distill}
    config = compose(file, options, settings)
    return sweep(prepare(config, run or Path("runs") / Path(model).stem))


@click.command()
@click.argument("run", type=RUN)
@click.option("--trials", type=int, help="Trials in all; more than before extends the run.")
@address_option
def resume(run: Path, trials: int | None, address: str | None) -> int:
    """Go on with RUN after any kind of end, or extend a finished one; prints the front.

    Finished trials are kept, unfinished ones are done again under their ids.
    """
    from search.config import build_config, merge, nest
    from search.preflight import existing_run, prepare

    folder, config = existing_run(run)
    over = nest({k: v for k, v in {"search.trials": trials, "resources.address": address}.items() if v is not None})
    if over:
        config = build_config(merge(config.model_dump(mode="json"), over), "--trials and --address")
    return sweep(prepare(config, folder.path))


@click.command()
@click.argument("run", type=RUN)
@format_option
def status(run: Path, form: str) -> None:
    """Say how far RUN is: trials done, running, left, the front, the time left."""
    from search.preflight import existing_run
    from search.status import run_status, status_lines

    folder, config = existing_run(run)
    state = run_status(folder, config.search.trials, config.search.objectives)
    if form == "table":
        for line in status_lines(state):
            click.echo(line)
    else:
        emit_one(state.to_row(), form)


def compose(file: Path | None, options: dict[str, Any], settings: Sequence[str]) -> RunConfig:
    """Defaults, then the file, then options that were given, then ``--set``."""
    from search.config import build_config, merge, nest, parse_assignments, read_yaml
    from search.preflight import resolve_paths

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
    from results.frames import front_rows
    from search.sweep import run_sweep

    outcome = run_sweep(prepared)
    say_ignored(prepared.config.data.path)
    rows = front_rows(prepared.folder)
    emit(rows, "table", FRONT_COLUMNS)
    failed = f", {outcome.failed} failed" if outcome.failed else ""
    click.echo(f"{outcome.finished}/{outcome.total} trials{failed}; front of {len(rows)} trials", err=True)
    shown = prepared.folder.path
    if outcome.interrupted or outcome.finished < outcome.total:
        click.echo(f"go on: paretoprune resume {shown}", err=True)
        return int(outcome.interrupted)
    click.echo(f"next: paretoprune finetune {shown}, then paretoprune report {shown}", err=True)
    return 0


def say_ignored(data: str) -> None:
    """A line about images that Ultralytics could not read, where there are any."""
    from pruning.ignored_images import ignored_images

    lines = ignored_images(data)
    if lines:
        click.echo(f"{len(lines)} images were left out of training and validation; the first: {lines[0]}", err=True)
