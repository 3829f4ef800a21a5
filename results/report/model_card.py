"""A model card beside each finished pick: where it comes from, what it scores, its licence, how to repeat it."""

from __future__ import annotations

from pathlib import Path

from paretoprune.base import formatting
from paretoprune.base.atomic import write_text
from paretoprune.results.analysis.finalists import FinishedRow
from paretoprune.results.analysis.summary import Summary
from paretoprune.results.report.markdown import FREE_MOVES, finished_table, free_moves_table, plain_cell, table
from paretoprune.results.store.run_files import Selected
from paretoprune.results.store.run_folder import RunFolder

CARD = "MODEL_CARD.md"
LICENCE = (
    "The network was trained with and is loaded by Ultralytics' software, which is licensed under AGPL-3.0 unless its "
    "makers granted another licence (https://ultralytics.com/license); that covers models made with it. The licence of "
    "the data it was trained on is its publisher's."
)


def write_cards(folder: RunFolder, run: Summary) -> list[Path]:
    """Write `selected/<trial_id>/MODEL_CARD.md` for every finished pick of `run`, the folder's summary; their paths."""
    records = {record.trial_id: record for record in folder.read_records()}
    rows = {row.name: row for row in run.finished}
    written = []
    for selected in folder.read_selected():
        row, record = rows.get(selected.trial_id), records.get(selected.trial_id)
        if row is not None and row.at is not None:
            text = card(run, row, selected, record.plan_hash if record else "")
            written.append(write_text(selected.directory / CARD, text))
    return written


def card(run: Summary, row: FinishedRow, selected: Selected, plan_hash: str) -> str:
    """The Markdown text of one pick's card."""
    lineage = [
        ("Pruned from", run.model),
        ("Plan", f"{plan_hash} (plan.json: the ratio of every layer and the channels that were kept)"),
        ("Trial", f"{selected.trial_id} of run {run.title}, chosen as: {selected.chosen_as or 'by id'}"),
        ("Trained on", run.data),
        ("In the trial", row.before.fidelity if row.before else ""),
        (
            "Full fine-tuning",
            f"{formatting.count(selected.epochs, 'epoch')}, of which epoch {selected.best_epoch} was kept",
        ),
        ("Taught by", Path(selected.settings.get("teacher") or "").name),
        ("Training arguments", ", ".join(f"{k}={v}" for k, v in (selected.settings.get("train") or {}).items())),
        ("Input", run.input_of(row.name) if run.imgsz else ""),
        ("Measured on", run.device),
    ]
    shown = [item for item in run.finished if item.kind == "baseline" or item.name == row.name]
    commands = next((group for group in run.commands if group.title == selected.trial_id), None)
    lines = "\n".join(f"# {purpose}\n{line}" for purpose, line in commands.lines) if commands else ""
    parts = [
        f"# {plain_cell(run.model)}, pruned ({plain_cell(selected.trial_id)})",
        "`best.pt` is a stock Ultralytics checkpoint: it loads with `YOLO('best.pt')` where nothing else is installed.",
        "## Where it comes from",
        table(("What", "Which"), [(name, value) for name, value in lineage if value]),
        "## What it scores",
        finished_table(run, shown),
        "Accuracy is that of the dataset's validation split; intervals are 95 %. Latency is measured in turn "
        "with the unpruned model; the speed-up's interval is for another measurement at another time. Expect other "
        "figures on another device.",
        *([f"Accuracy: {run.judged}."] if run.judged else []),
        *_free_moves(run, row),
        "## Licence",
        LICENCE,
    ]
    if lines:
        parts += ["## How to repeat it", f"```sh\n{lines}\n```"]
    if run.environment:
        parts += ["## Made with", table(("What", "Version"), list(run.environment.items()))]
    return "\n\n".join(parts) + "\n"


def _free_moves(run: Summary, row: FinishedRow) -> list[str]:
    """What is to be had without pruning, and whether it is better than this network."""
    if not run.front.free_moves:
        return []
    better = run.front.beaten_by(row.name, after=True)
    trained = " after the same fine-tuning" if better in run.front.tuned_moves else ""
    verdict = (
        f"{better.name} is better than this network{trained}" if better else "None of them is better than this network"
    )
    return ["## Free moves", f"{FREE_MOVES} {verdict}.", free_moves_table(run)]
