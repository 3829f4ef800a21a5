"""What search, resume and demo share: a sweep run and its front printed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from paretoprune.search.commands.output import emit, with_objectives
from paretoprune.search.monitoring.command_line import command_line

if TYPE_CHECKING:
    from paretoprune.search.sweep.preflight import Prepared

FRONT_COLUMNS = ("trial_id", "map50_95", "latency_ms", "latency_ratio", "params_m", "gflops", "fidelity")


def sweep(prepared: Prepared) -> int:
    """Run the sweep, print the front, say what comes next."""
    from paretoprune.results.analysis.frames import TRIAL, front_rows
    from paretoprune.results.store.records import BEYOND_BOUNDS
    from paretoprune.search.sweep.sweep import run_sweep

    outcome = run_sweep(prepared)
    say_ignored(prepared.config.data.path)
    rows = front_rows(prepared.folder)
    beaten = ("beaten_by_free_move",) if any(row["beaten_by_free_move"] for row in rows) else ()
    columns = with_objectives((*FRONT_COLUMNS, *beaten), prepared.config.search.objectives)
    emit(rows, "table", columns, "no trials")
    counts = {"stopped": outcome.stopped, "failed": outcome.failed, BEYOND_BOUNDS: outcome.infeasible}
    told = "".join(f", {count} {name}" for name, count in counts.items() if count)
    members = [row for row in rows if row["kind"] == TRIAL]
    click.echo(f"{outcome.finished}/{outcome.total} trials{told}; front of {len(members)} trials", err=True)
    if outcome.fault:
        click.echo(outcome.fault, err=True)
    if outcome.used_up:
        click.echo(f"stopped: {outcome.used_up} is used up", err=True)
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
