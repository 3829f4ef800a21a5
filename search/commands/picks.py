"""Commands over a run's finished trials: front, finetune, report."""

from __future__ import annotations

from pathlib import Path

import click

from search.output import FOLDER, emit, format_option

COLUMNS = (
    "trial_id", "map50_95", "latency_ms", "speedup", "params_m", "gflops", "fidelity", "chosen_as", "checkpoint",
)  # fmt: skip
SELECTED_COLUMNS = ("trial_id", "chosen_as", "map50_95", "speedup", "latency_ms", "params_m", "epochs", "checkpoint")


@click.command()
@click.argument("run", type=FOLDER)
@format_option
@click.option("--max-latency-ms", type=click.FloatRange(min=0), help="Only trials at most this slow.")
@click.option("--max-drop", type=float, help="Only trials that lose at most this much mAP50-95 (0.02 is two points).")
@click.option("--pick", type=click.IntRange(min=1), help="Only so many picks: best under the bounds, knee, spread.")
def front(run: Path, form: str, max_latency_ms: float | None, max_drop: float | None, pick: int | None) -> None:
    """Print RUN's front, the most accurate trial first."""
    from results.frames import front_rows
    from search.preflight import existing_run

    folder, _ = existing_run(run)
    rows = front_rows(folder, max_latency_ms=max_latency_ms, max_drop=max_drop, pick=pick)
    columns = [name for name in COLUMNS if name != "chosen_as" or pick]
    emit(rows, form, columns)


@click.command()
@click.argument("run", type=FOLDER)
@click.option("--pick", type=click.IntRange(min=1), help="How many trials the selector picks.  [default: 3]")
@click.option("--trial", "trials", multiple=True, metavar="ID", help="These trials instead; may be repeated.")
@click.option("--epochs", type=click.IntRange(min=1), help="Epochs at most.  [default: the run's finetune.epochs]")
@format_option
def finetune(run: Path, pick: int | None, trials: tuple[str, ...], epochs: int | None, form: str) -> int:
    """Fine-tune the picks of RUN fully, in parallel, and measure them again beside the unpruned model."""
    from search.preflight import existing_run
    from search.promote import choose_picks, promote

    if pick is not None and trials:
        raise click.UsageError("give --pick or --trial, not both")
    folder, config = existing_run(run)
    if epochs is not None:
        section = config.finetune.model_copy(update={"epochs": epochs})
        config = config.model_copy(update={"finetune": section})
    picks = choose_picks(folder, config.search.objectives, pick or 3, trials)
    outcome = promote(folder, config, picks)
    emit(outcome.rows, form, SELECTED_COLUMNS)
    for trial_id, reason in outcome.failed.items():
        click.echo(f"error: {trial_id}: {reason}", err=True)
    return 1 if outcome.failed else 0


@click.command()
@click.argument("run", type=FOLDER)
def report(run: Path) -> None:
    """Write RUN's report.html (opens offline), front.csv and figures; prints the report's path."""
    from results.report import write_report
    from search.preflight import existing_run

    folder, _ = existing_run(run)
    click.echo(str(write_report(folder.path)))
