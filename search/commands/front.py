"""The command front: a run's trade-offs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from paretoprune.search.commands.options import RUN, format_option, selector
from paretoprune.search.commands.output import print_rows, with_objectives

COLUMNS = (
    "trial_id", "kind", "map50_95", "latency_ms", "speedup", "speedup_ci95", "params_m", "gflops", "imgsz",
    "deploy_precision", "branches_removed", "fidelity", "tied_with", "beaten_by", "beaten_by_free_move", "chosen_as",
    "checkpoint",
)  # fmt: skip

SHORTENED = ("tied_with", "beaten_by", "branches_removed")
IDS_IN_A_CELL = 3


@click.command()
@click.argument("run", type=RUN)
@format_option
@selector
def front(run: Path, form: str, pick: tuple[str, ...], **bounds: float | None) -> None:
    """Print RUN's front, the most accurate trial first, then its free moves: the unpruned model at smaller inputs
    and in other precisions.

    tied_with: trials statistically indistinguishable from this one (overlapping intervals of latency and of accuracy).
    beaten_by: trials that are significantly better in one objective and significantly worse in none.
    beaten_by_free_move: the free move that is so in accuracy and latency.
    """
    from paretoprune.results.analysis.frames import front_rows
    from paretoprune.results.selection.uncertainty import accuracy_noise
    from paretoprune.results.store.accuracy import sample_text
    from paretoprune.search.api.runs import Run, bounds_of

    folder = Run(run).folder
    rows = front_rows(folder, bounds_of(bounds), pick)
    if form != "table":
        print_rows(rows, form)
        return
    moves = folder.read_free_moves()
    unused = {"chosen_as": not pick, "branches_removed": not any(row["branches_removed"] for row in rows)}
    unused["deploy_precision"] = len({row["deploy_precision"] for row in rows}) < 2
    unused |= dict.fromkeys(("kind", "beaten_by_free_move"), not moves)
    columns = with_objectives([name for name in COLUMNS if not unused.get(name)], folder.objectives())
    print_rows(
        [{**row, **{name: _few(row[name]) for name in SHORTENED}} for row in rows],
        form,
        columns,
        "no trials",
    )
    if not moves:
        text = "this run did not measure the unpruned model at smaller inputs or in other precisions"
        click.echo(f"free moves: none, {text}", err=True)
    if judged := sample_text(folder.read_baseline()["metrics"]):
        click.echo(f"accuracy: {judged}", err=True)
    click.echo(f"accuracy noise: {accuracy_noise(folder.read_baseline()).text}", err=True)


def _few(ids: Sequence[str]) -> str | None:
    """The first ids and how many more, so that a cell stays narrow."""
    more = f" +{len(ids) - IDS_IN_A_CELL}" if len(ids) > IDS_IN_A_CELL else ""
    return " ".join(ids[:IDS_IN_A_CELL]) + more if ids else None
