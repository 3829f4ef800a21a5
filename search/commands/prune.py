"""The command prune: one plan, by hand or to a budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paretoprune.pruning.names import RECOVERIES, STRUCTURAL
from paretoprune.search.commands.options import FILE, FOLDER, SIZE, classes_option, format_option, trust_option
from paretoprune.search.commands.output import as_table, echo, print_row, print_rows

if TYPE_CHECKING:
    from paretoprune.pruning.budget.budget import BlockCut
    from paretoprune.search.api.models import Pruned, PruneJob


@click.command()
@click.argument("model", type=FILE)
@click.option("--ratio", type=float, help="Fraction of channels removed from every prunable layer, in [0, 1).")
@click.option("--plan", type=click.Path(path_type=Path), help="A plan.json, instead of --ratio.")
@click.option(
    "--keep-macs", type=float, help="Maximum share of multiply-adds to keep, in (0, 1]; widths by sensitivity."
)
@click.option("--keep-params", type=float, help="Maximum share of parameters to keep, in (0, 1].")
@click.option("--speedup", type=float, help="Minimum speed-up, predicted from plans timed now (or from --run).")
@click.option("--data", type=FILE, help="data.yaml with calibration images; without it nothing is recovered.")
@classes_option
@click.option("--importance", help="Importance criterion.  [default: reconstruction with --data, else l2]")
@click.option(
    "--recover", type=click.Choice(RECOVERIES), help="Recovery after removal.  [default: refit with --data, else none]"
)
@click.option(
    "--strategy",
    default=STRUCTURAL,
    show_default=True,
    help="structural, sequential, adapter, skip or mask; no epochs.",
)
@click.option(
    "--round-to", type=click.IntRange(min=1), default=8, show_default=True, help="Round widths to a multiple of this."
)
@click.option(
    "--imgsz",
    type=SIZE,
    help="Side of the input, pixels, or HEIGHT,WIDTH.  [default: the plan's, else 640]",
)
@click.option(
    "--calibration-images",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Number of calibration images.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Random seed for the choice of calibration images.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The pruned checkpoint, OUT.pt.")
@click.option("--dry-run", is_flag=True, help="Write nothing; print widths, parameters and latency.")
@click.option(
    "--measure",
    type=click.IntRange(min=6),
    help="With --dry-run or --speedup: time N random plans and predict the latency.",
)
@click.option("--run", type=FOLDER, help="With --dry-run or --speedup: predict the latency from this run's trials.")
@click.option("--device", help="cpu, cuda:0, ...  [default: the first GPU, else cpu]")
@trust_option
@format_option
def prune(model: str, output: Path | None, dry_run: bool, form: str, **options: Any) -> None:
    """Remove channels from MODEL; writes OUT.pt (loads in stock Ultralytics) and OUT.plan.json beside it."""
    from paretoprune.search.api.models import check_target, prune_job

    job = prune_job(model, **options)
    _check_dry_run(job, dry_run, output)
    if output is None:
        _show_estimate(job.run_estimate(), form)
        return
    check_target(output, job.reads, job.strategy)
    pruned = job.run_pruning()
    if pruned.blocks:
        click.echo(_blocks(pruned.blocks), err=True)
    print_row(_row(pruned, pruned.save(output), form), form)


def _check_dry_run(job: PruneJob, dry_run: bool, output: Path | None) -> None:
    """Either a dry run or a file to write, each with its own options only."""
    if dry_run and output is not None:
        raise click.UsageError("--dry-run writes nothing: leave -o out")
    if dry_run and job.strategy != STRUCTURAL:
        raise click.UsageError(f"--dry-run knows the structural strategy only, got --strategy {job.strategy}")
    if not dry_run and job.speedup is None and (job.measure is not None or job.run is not None):
        raise click.UsageError("--measure and --run belong to --dry-run or --speedup")
    if not dry_run and output is None:
        raise click.UsageError("give -o OUT.pt, or --dry-run to write nothing")


def _show_estimate(row: dict[str, Any], form: str) -> None:
    """Print what a plan brings; a table has its widths below."""
    if form != "table":
        print_row(row, form)
        return
    widths = row.pop("widths")
    print_row(row, form)
    echo()
    print_rows(widths, form, ("group", "channels", "width"))


def _row(pruned: Pruned, written: Path, form: str) -> dict[str, Any]:
    """What was written, what changed and how it was made."""
    from paretoprune.search.api.models import PLAN, SESSIONS

    row = {"checkpoint": str(written), "plan": str(written.with_suffix(PLAN)), **pruned.summary()}
    if pruned.strategy == STRUCTURAL:
        return row
    skipped = [{"layer": layer, "reason": reason} for layer, reason in pruned.skipped]
    return {
        **row,
        "strategy": pruned.strategy,
        "sessions": [str(written.with_suffix(SESSIONS) / path.name) for path in pruned.sessions],
        "skipped": len(skipped) if form == "table" else skipped,
        "notes": "; ".join(f"{key} {value}" for key, value in pruned.notes.items()),
    }


def _blocks(blocks: tuple[BlockCut, ...]) -> str:
    """What each block lost to a budget."""
    return as_table(
        [
            {
                "block": block.block,
                "module": block.kind,
                "channels": f"{block.channels_before} -> {block.channels}",
                "macs_kept": round(block.macs / block.macs_before, 3) if block.macs_before else None,
                "estimated_loss": float(f"{block.loss:.3g}"),
            }
            for block in blocks
        ]
    )
