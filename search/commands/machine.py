"""Commands about this machine: doctor, and the demo that needs nothing else."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from search.output import FOLDER, emit, format_option


@click.command()
@click.option("--run", type=FOLDER, default=Path("runs/demo"), show_default=True, help="The run's folder.")
@click.option("--trials", type=click.IntRange(min=1), default=12, show_default=True, help="Trials in all.")
def demo(run: Path, trials: int) -> int:
    """Do the whole job on the built-in dataset and model: search, pick, full fine-tuning, report."""
    from search.demo import run_demo

    return run_demo(run, trials)


@click.command()
@click.option("--address", help="A Ray cluster to look at.  [default: one started here]")
@format_option
def doctor(address: str | None, form: str) -> int:
    """Check that this machine is fit for a run, and say what to do about what is not."""
    from cluster.doctor import examine

    checks = []
    for check in examine(address=address):
        checks.append(check)
        if form == "table":
            click.echo(f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<16} {check.detail}")
            if check.remedy:
                click.echo(f"      {'':<16} -> {check.remedy}")
    if form != "table":
        emit([asdict(check) for check in checks], form)
    return 0 if all(check.ok for check in checks) else 1
