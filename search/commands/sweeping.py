"""What search, resume and demo share: a sweep run and its front printed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from paretoprune.search.commands.output import print_rows, with_objectives
from paretoprune.search.monitoring.command_line import command_line

if TYPE_CHECKING:
    from paretoprune.results.store.run_folder import RunFolder
    from paretoprune.search.sweep.preflight import ValidatedRun

FRONT_COLUMNS = ("trial_id", "map50_95", "latency_ms", "latency_ratio", "params_m", "gflops", "fidelity")


def sweep(prepared: ValidatedRun) -> int:
    """Run the sweep, print the front, say what comes next."""
    from paretoprune.results.analysis.frames import TRIAL, front_rows
    from paretoprune.results.store.records import BEYOND_BOUNDS
    from paretoprune.search.sweep.sweep import run_sweep

    outcome = run_sweep(prepared)
    say_ignored(prepared.config.data.path)
    rows = front_rows(prepared.folder)
    beaten = ("beaten_by_free_move",) if any(row["beaten_by_free_move"] for row in rows) else ()
    columns = with_objectives((*FRONT_COLUMNS, *beaten), prepared.config.search.objectives)
    print_rows(rows, "table", columns, "no trials")
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
    for text in pick_lines(prepared.folder, prepared.config.search.objectives):
        click.echo(text, err=True)
    click.echo(f"next: {command_line('finetune', shown)}, then {command_line('report', shown)}", err=True)
    return 0


def pick_lines(folder: RunFolder, objectives: Sequence[str]) -> list[str]:
    """What `finetune` would pick, in plain words: "knee: t0004, 1.87 times as fast, mAP50-95 0.012 lower"."""
    from paretoprune.results.selection.selection import choose
    from paretoprune.results.store.accuracy import trade_off_text

    baseline = folder.read_baseline()
    picks = choose(folder.read_records(), baseline, objectives=objectives)
    return [
        f"{pick.chosen_as}: {pick.trial_id}, {trade_off_text(pick.record.metrics, baseline['metrics'])}"
        for pick in picks
    ]


def say_ignored(data: str) -> None:
    """A line about images that Ultralytics could not read, where there are any."""
    from paretoprune.pruning.data.ignored_images import ignored_images

    lines = ignored_images(data)
    if lines:
        click.echo(f"{len(lines)} images were left out of training and validation; the first: {lines[0]}", err=True)
