"""Tables of a run: a data frame of all trials, and the rows of its front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from paretoprune.base import formatting
from paretoprune.base.file_names import BEST
from paretoprune.base.image_size import plain_size, size_text
from paretoprune.results.selection.picks import pick_trials
from paretoprune.results.selection.selection import comparable, front
from paretoprune.results.selection.uncertainty import Standing, accuracy_noise, beaten_by_free_moves, standings
from paretoprune.results.store.accuracy import LABELS
from paretoprune.results.store.bounds import NO_BOUNDS, Bounds
from paretoprune.results.store.objectives import DEFAULT_OBJECTIVES
from paretoprune.results.store.records import CI95, DEPLOY_PRECISION, PI95, SOURCE, TrialRecord, speedup_interval
from paretoprune.results.store.run_files import Native, Selected
from paretoprune.results.store.run_folder import RunFolder

DataFrame = pd.DataFrame  # for the annotations of those who only pass one on

TRIAL, FREE_MOVE = "trial", "free move"
"""Kinds of a front's rows."""
UNPRUNED = "unpruned"  # how far a free move goes, in place of a trial's fidelity

METRIC_COLUMNS = (
    "map50_95",
    "map50",
    "precision",
    "recall",
    "map50_95_refit",
    "top1",
    "top5",
    "top1_refit",
    "val_images",
    "latency_ms",
    "latency_p90_ms",
    "latency_ratio",
    "speedup",
    "params_m",
    "gflops",
    "size_mb",
    "energy_j",
)
INTERVAL_COLUMNS = ("speedup_low", "speedup_high", "speedup_predicted_low", "speedup_predicted_high")
DROP_COLUMNS = tuple(f"{name}_drop" for name in LABELS)


def trials_frame(
    records: Sequence[TrialRecord], baseline: Mapping[str, Any], objectives: Sequence[str] = DEFAULT_OBJECTIVES
) -> pd.DataFrame:
    """One row a record, in their order; numbers carry their unit in the column name, missing ones are NaN.

    Columns: trial_id, state, fidelity, epochs, imgsz (the trial's own, else the run's: pixels, or text "384,640" in all
    rows where one is height and width), deploy_precision (of the file, None where trials are judged in PyTorch;
    `precision` is the accuracy of that name), branches_removed,
    on_front, feasible, violations, the metrics, objectives not among them, speedup_low, speedup_high (95 % interval of
    a measured one), speedup_predicted_low, speedup_predicted_high (of one that was predicted, as for some that were
    stopped), latency_source (measured or foretold), map50_95_drop and
    top1_drop (baseline minus trial), seconds_total, finished_at (unix seconds), plan_hash, device,
    node, provenance, error. `on_front` is true only among completed trials of the run's main fidelity that keep to the
    run's bounds (`feasible`; `violations` names those not kept).
    """
    on_front = {record.trial_id for record in front(records, objectives)}
    metrics = metric_columns(objectives)
    rows = [
        _readable({**_row(record, baseline, metrics), "on_front": record.trial_id in on_front}) for record in records
    ]
    pairs = any(isinstance(row["imgsz"], tuple) for row in rows)
    if pairs:
        rows = [{**row, "imgsz": row["imgsz"] and size_text(row["imgsz"])} for row in rows]
    frame = pd.DataFrame(rows, columns=list(_columns(metrics)))
    numbers = (*metrics, *INTERVAL_COLUMNS, *DROP_COLUMNS)
    return frame.astype(
        dict.fromkeys(numbers, float) | {"imgsz": object if pairs else "Int64"}
    )  # a column that is missing throughout would be of objects


def _readable(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose text Arrow can hold."""
    return {name: formatting.readable(value) if isinstance(value, str) else value for name, value in row.items()}


def metric_columns(objectives: Sequence[str]) -> tuple[str, ...]:
    """The metrics of a table: the usual ones, and the run's objectives that are not among them (masks, keypoints)."""
    return (*METRIC_COLUMNS, *(name for name in objectives if name not in METRIC_COLUMNS))


def _columns(metrics: Sequence[str]) -> tuple[str, ...]:
    head = (
        "trial_id",
        "state",
        "fidelity",
        "epochs",
        "imgsz",
        DEPLOY_PRECISION,
        "branches_removed",
        "on_front",
        "feasible",
        "violations",
    )
    tail = ("seconds_total", "finished_at", "plan_hash", "device", "node", "provenance", "error")
    return (*head, *metrics, *INTERVAL_COLUMNS, SOURCE, *DROP_COLUMNS, *tail)


def _interval_cells(measured: Sequence[float] | None, predicted: Sequence[float] | None) -> dict[str, float | None]:
    return dict(zip(INTERVAL_COLUMNS, (*(measured or (None, None)), *(predicted or (None, None))), strict=True))


def _row(record: TrialRecord, baseline: Mapping[str, Any], metrics: Sequence[str]) -> dict[str, Any]:
    return {
        "trial_id": record.trial_id,
        "state": record.state.value,
        "fidelity": record.fidelity_label,
        "epochs": record.epochs,
        "imgsz": record.imgsz or baseline.get("imgsz"),
        DEPLOY_PRECISION: precision_of(record, baseline),
        "branches_removed": " ".join(record.branches_removed),
        "feasible": record.feasible,
        "violations": ", ".join(record.violations),
        **{name: record.number(name) for name in metrics},
        **_interval_cells(speedup_interval(record.metrics), speedup_interval(record.metrics, PI95)),
        SOURCE: record.metrics.get(SOURCE, "measured" if record.number("latency_ms") is not None else None),
        **_drops(record.metrics, baseline),
        "seconds_total": sum(record.seconds.values()),
        "finished_at": record.finished_at,
        "plan_hash": record.plan_hash,
        "device": record.device,
        "node": record.node,
        "provenance": record.provenance,
        "error": record.error,
    }


def precision_of(record: TrialRecord, baseline: Mapping[str, Any]) -> str | None:
    """What a trial's file computes in: its own precision, else the run's; None where trials are judged in PyTorch."""
    return record.precision or baseline["metrics"].get(DEPLOY_PRECISION)


def _drops(metrics: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, float | None]:
    """The loss of each accuracy against the baseline; None where it was not measured."""
    before = baseline["metrics"]
    both = {name: name in metrics and name in before for name in LABELS}
    return {f"{name}_drop": before[name] - metrics[name] if both[name] else None for name in LABELS}


def front_rows(
    run: RunFolder | str | Path, bounds: Bounds = NO_BOUNDS, picks: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The front of a run as JSON-ready rows, the most accurate first; numbers that were not measured are None.

    Behind the trials (`kind` "trial") come the run's free moves within the bounds (`kind` "free move": the unpruned
    model at a smaller input or in another precision, `plan` None, `checkpoint` the unpruned model), the largest input
    first; not with `picks`.
    `beaten_by_free_move` names the free move that is clearly better than the row's trial in accuracy or latency and
    clearly worse in neither, or is None.

    bounds: only trials within them. picks: only what these wishes choose (see `choosing.pick_trials`); `chosen_as` says
    why a row is there ("" without `picks`). `tied_with` names the trials that the measurements do not tell apart from
    the row's, `beaten_by` those that are clearly better in one objective and clearly worse in none: the row then stands
    on the front by luck. `val_images` is on how many validation images the row was judged, None of older runs. `imgsz`
    is the size of the input, a trial's own or else the run's: pixels, or a list [height, width]; `deploy_precision`
    what its file computes in, likewise, None where trials are judged in PyTorch.
    `plan` and `checkpoint` are absolute paths that exist, or None.
    """
    folder = run if isinstance(run, RunFolder) else RunFolder(Path(run))
    baseline, objectives, records = folder.read_baseline(), folder.objectives(), folder.read_records()
    candidates = bounds.within(comparable(records), baseline)
    chosen = pick_trials(records, baseline, picks, bounds, objectives) if picks else []
    chosen_as = {item.trial_id: item.chosen_as for item in chosen}
    members = front(candidates, objectives)
    shown = [item.record for item in chosen] if picks else members
    on_front = {record.trial_id for record in members}
    judged = [record for record in shown if all(record.number(name) is not None for name in objectives)]
    noise, free_moves = accuracy_noise(baseline), folder.read_free_moves()
    sure = standings(judged, candidates, objectives, noise)
    beaten = beaten_by_free_moves(shown, free_moves, noise)
    finetuned: dict[str, Selected | Native] = {item.trial_id: item for item in folder.read_selected()}
    finetuned |= {item.name: item for item in folder.read_tuned_moves()}
    listed = [(record, TRIAL) for record in shown]
    listed += [(move, FREE_MOVE) for move in bounds.within(free_moves, baseline) if not picks]
    rows = []
    for record, kind in listed:
        standing = sure.get(record.trial_id, Standing((), ()))
        rows.append(
            {
                **_front_row(folder, record, kind, baseline, finetuned.get(record.trial_id)),
                **{name: record.number(name) for name in metric_columns(objectives)},
                "on_front": record.trial_id in on_front,
                "tied_with": list(standing.tied_with),
                "beaten_by": list(standing.beaten_by),
                "beaten_by_free_move": beaten.get(record.trial_id),
                "chosen_as": chosen_as.get(record.trial_id, ""),
            }
        )
    return rows


def _front_row(
    folder: RunFolder,
    record: TrialRecord,
    kind: str,
    baseline: Mapping[str, Any],
    finetuned: Selected | Native | None,
) -> dict[str, Any]:
    free = kind == FREE_MOVE
    row: dict[str, Any] = {"trial_id": record.trial_id, "kind": kind}
    row["fidelity"] = UNPRUNED if free else record.fidelity_label
    row["epochs"] = record.epochs
    size = record.imgsz or baseline.get("imgsz")
    row["imgsz"] = size and plain_size(size)
    row[DEPLOY_PRECISION] = precision_of(record, baseline)
    row["branches_removed"] = list(record.branches_removed)
    row.update({name: record.number(name) for name in METRIC_COLUMNS})
    for name in (CI95, PI95):
        bounds = speedup_interval(record.metrics, name)
        row[name] = list(bounds) if bounds else None
    row.update(_drops(record.metrics, baseline))
    row["plan_hash"] = record.plan_hash
    row["plan"] = None if free else _existing(folder.trial_plan(record.trial_id))
    row["checkpoint"] = _existing(folder.model_path() if free else folder.trial_checkpoint(record.trial_id))
    row.update({f"finetuned_{name}": finetuned.after.get(name) if finetuned else None for name in LABELS})
    row["finetuned_speedup"] = finetuned.after.get("speedup") if finetuned else None
    row["finetuned_checkpoint"] = _existing(finetuned.directory / BEST) if finetuned else None
    return row


def _existing(path: Path) -> str | None:
    return str(path.resolve()) if path.exists() else None


def front_frame(run: RunFolder | str | Path, bounds: Bounds = NO_BOUNDS, picks: Sequence[str] = ()) -> pd.DataFrame:
    """`front_rows` as a data frame with flat columns, for front.csv."""
    rows = front_rows(run, bounds, picks)
    for row in rows:
        row.update(_interval_cells(row.pop(CI95), row.pop(PI95)))
        row.update({name: " ".join(row[name]) for name in ("tied_with", "beaten_by", "branches_removed")})
        if isinstance(row["imgsz"], list):
            row["imgsz"] = ",".join(map(str, row["imgsz"]))
    return frame_of(rows) if rows else pd.DataFrame(columns=["trial_id", "kind", "map50_95", "latency_ms"])


def frame_of(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """JSON-ready rows as a data frame."""
    return pd.DataFrame(map(_readable, rows))
