"""The command that compares the strategies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paretoprune.pruning.names import STRATEGY_NAMES
from paretoprune.search.commands.options import FILE, FOLDER, SIZE, format_option, set_option, trust_option
from paretoprune.search.commands.output import echo, print_rows

if TYPE_CHECKING:
    from paretoprune.base.image_size import ImageSize
    from paretoprune.results.analysis.strategy_comparison import Comparison

COLUMNS = (
    "strategy", "layers_pruned", "params_m", "gflops", "speedup", "speedup_ci95", "map50_95_refit", "map50_95",
    "epochs", "skipped", "checkpoint",
)  # fmt: skip
ALL = ",".join(STRATEGY_NAMES)
DEFAULT_RATIO = 0.3
LAYERS_NAMED = 4


@click.command()
@click.argument("model", type=FILE)
@click.argument("data", type=FILE)
@click.option("--strategies", default=ALL, show_default=True, metavar="NAMES", help="Comma-separated strategies.")
@click.option(
    "--budget-epochs",
    type=click.IntRange(min=0),
    required=True,
    metavar="N",
    help="Total fine-tuning epochs per strategy; 0: evaluated right after the refit.",
)
@click.option("--ratio", type=float, help="Fraction removed from every prunable layer, in [0, 1).  [default: 0.3]")
@click.option("--plan", type=click.Path(path_type=Path), help="Use the ratios of this plan.json instead of --ratio.")
@click.option("--imgsz", type=SIZE, help="Side of the input, pixels, or HEIGHT,WIDTH.  [default: 640]")
@click.option("--run", type=FOLDER, help="The run's folder.  [default: runs/<model's name>-strategies]")
@set_option("finetune.batch=8")
@trust_option
@format_option
def compare(
    model: str,
    data: str,
    strategies: str,
    budget_epochs: int,
    ratio: float | None,
    plan: Path | None,
    imgsz: ImageSize | None,
    run: Path | None,
    settings: tuple[str, ...],
    trust_checkpoint: bool,
    form: str,
) -> int:
    """Prune MODEL by several strategies with equal ratios and epochs, and measure them together on DATA.

    Writes comparison.json and .csv into the run's folder, and adds a table and a figure to report.html there. Called
    again on the same folder, it resumes.
    """
    if ratio is not None and plan is not None:
        raise click.UsageError("give --ratio or --plan, not both")
    from paretoprune.search.api.runs import compose
    from paretoprune.search.comparison.compare import check_names, prepare
    from paretoprune.search.comparison.compare import compare as run_comparison
    from paretoprune.search.config.run_config import parse_assignments

    names, ratios = check_names(strategies), _ratios(ratio, plan)
    options = {"model.path": model, "data.path": data, "model.imgsz": imgsz}
    config = compose(None, {**options, "model.trust_checkpoint": trust_checkpoint or None}, parse_assignments(settings))
    folder = run or Path("runs") / f"{Path(model).stem}-strategies"
    comparison = run_comparison(prepare(config, names, ratios, budget_epochs, folder))
    show(comparison, form)
    for name, reason in comparison.failed.items():
        click.echo(f"error: {name}: {reason}", err=True)
    return 1 if comparison.failed else 0


def show(comparison: Comparison, form: str) -> None:
    """Print the strategies; the table has the unpruned network on top, and below it what was skipped and why."""
    rows = comparison.to_rows()
    if form != "table":
        print_rows(rows, form)
        return
    counted = [{**row, "skipped": len(row["skipped"])} for row in rows]
    print_rows([comparison.baseline_row(), *counted], form, COLUMNS)
    for line in skipped_lines(comparison):
        echo(line)


def skipped_lines(comparison: Comparison) -> list[str]:
    """One line for every strategy and reason: how many layers, the reason, the first of them."""
    from paretoprune.results.analysis.strategy_comparison import skipped_groups

    lines = []
    for row in comparison.rows:
        for group in skipped_groups(row.skipped):
            more = ", ..." if len(group.layers) > LAYERS_NAMED else ""
            layers = ", ".join(group.layers[:LAYERS_NAMED]) + more
            lines.append(f"{row.strategy} skipped {len(group.layers)}: {group.reason} ({layers})")
    return lines


def _ratios(ratio: float | None, plan: Path | None) -> dict[str, Any]:
    """The ratios for every strategy, checked before anything heavy is loaded."""
    from paretoprune.pruning.plan import Plan, check_ratio

    if plan is not None:
        return dict(Plan.load(plan).ratios)
    if ratio is not None:
        check_ratio("--ratio", ratio)
    return {"*": DEFAULT_RATIO if ratio is None else ratio}
