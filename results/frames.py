"""Tables of a run: a data frame of all trials, and the rows of its front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from results.objectives import DEFAULT_OBJECTIVES
from results.records import TrialRecord
from results.run_folder import RunFolder, Selected
from results.selection import Pick, best_under, choose, comparable, fastest_within_drop, front

METRIC_COLUMNS = (
    "map50_95",
    "map50",
    "precision",
    "recall",
    "map50_95_refit",
    "latency_ms",
    "latency_p90_ms",
    "latency_ratio",
    "speedup",
    "params_m",
    "gflops",
    "size_mb",
)


def trials_frame(
    records: Sequence[TrialRecord], baseline: Mapping[str, Any], objectives: Sequence[str] = DEFAULT_OBJECTIVES
) -> pd.DataFrame:
    """One row a record, in their order; numbers carry their unit in the column name, missing ones are NaN.

    Columns: trial_id, state, fidelity, epochs, on_front, the metrics, speedup_low, speedup_high (95 % interval),
    map50_95_drop (baseline minus trial), seconds_total, finished_at (unix seconds), plan_hash, device, node,
    provenance, error. `on_front` is true only among completed trials of the run's main fidelity.
    """
    on_front = {record.trial_id for record in front(records, objectives)}
    rows = [{**_row(record, baseline), "on_front": record.trial_id in on_front} for record in records]
    frame = pd.DataFrame(rows, columns=list(_columns()))
    numbers = (*METRIC_COLUMNS, "speedup_low", "speedup_high", "map50_95_drop")
    return frame.astype(dict.fromkeys(numbers, float))  # a column that is missing throughout would be of objects


def _columns() -> tuple[str, ...]:
    head = ("trial_id", "state", "fidelity", "epochs", "on_front", *METRIC_COLUMNS, "speedup_low", "speedup_high")
    tail = ("seconds_total", "finished_at", "plan_hash", "device", "node", "provenance", "error")
    return (*head, "map50_95_drop", *tail)


def speedup_interval(metrics: Mapping[str, Any]) -> tuple[float, float] | None:
    """The speed-up's 95 % interval (low, high), or None where it was not measured."""
    bounds = metrics.get("speedup_ci95")
    if not isinstance(bounds, Sequence) or len(bounds) != 2:
        return None
    return float(bounds[0]), float(bounds[1])


def _row(record: TrialRecord, baseline: Mapping[str, Any]) -> dict[str, Any]:
    low, high = speedup_interval(record.metrics) or (None, None)
    accuracy = record.number("map50_95")
    return {
        "trial_id": record.trial_id,
        "state": record.state.value,
        "fidelity": record.fidelity_label,
        "epochs": record.epochs,
        **{name: record.number(name) for name in METRIC_COLUMNS},
        "speedup_low": low,
        "speedup_high": high,
        "map50_95_drop": None if accuracy is None else baseline["metrics"]["map50_95"] - accuracy,
        "seconds_total": sum(record.seconds.values()),
        "finished_at": record.finished_at,
        "plan_hash": record.plan_hash,
        "device": record.device,
        "node": record.node,
        "provenance": record.provenance,
        "error": record.error,
    }


def front_rows(
    run: RunFolder | str | Path,
    *,
    max_latency_ms: float | None = None,
    max_drop: float | None = None,
    pick: int | None = None,
) -> list[dict[str, Any]]:
    """The front of a run as JSON-ready rows, the most accurate first; numbers that were not measured are None.

    max_latency_ms: only trials at most that slow. max_drop: only trials that lose at most that much mAP50-95.
    pick: only that many picks. The best under the latency bound and the fastest within the drop come first, `choose`
    fills the rest from what is left; `chosen_as` says why a row is there ("" without `pick`).
    `plan` and `checkpoint` are absolute paths that exist, or None.
    """
    folder = run if isinstance(run, RunFolder) else RunFolder(Path(run))
    baseline, objectives = folder.read_baseline(), folder.objectives()
    candidates = _within(comparable(folder.read_records()), baseline, max_latency_ms, max_drop)
    picks = _picks(candidates, baseline, objectives, max_latency_ms, max_drop, pick) if pick else []
    chosen_as = {item.trial_id: item.chosen_as for item in picks}
    members = front(candidates, objectives)
    shown = [item.record for item in picks] if pick else members
    on_front = {record.trial_id for record in members}
    finetuned = {item.trial_id: item for item in folder.read_selected()}
    return [
        {
            **_front_row(folder, record, baseline, finetuned.get(record.trial_id)),
            "on_front": record.trial_id in on_front,
            "chosen_as": chosen_as.get(record.trial_id, ""),
        }
        for record in shown
    ]


def _within(
    records: Sequence[TrialRecord],
    baseline: Mapping[str, Any],
    max_latency_ms: float | None,
    max_drop: float | None,
) -> list[TrialRecord]:
    kept = list(records)
    if max_latency_ms is not None:
        kept = [record for record in kept if best_under([record], max_latency_ms=max_latency_ms)]
    if max_drop is not None:
        kept = [record for record in kept if fastest_within_drop([record], baseline, max_drop)]
    return kept


def _picks(
    candidates: Sequence[TrialRecord],
    baseline: Mapping[str, Any],
    objectives: Sequence[str],
    max_latency_ms: float | None,
    max_drop: float | None,
    k: int,
) -> list[Pick]:
    """What the bounds ask for first, then the default picks among the candidates; at most k."""
    wishes = []
    if max_latency_ms is not None:
        best = best_under(candidates, max_latency_ms=max_latency_ms)
        wishes += [Pick(best, f"best under {max_latency_ms:g} ms")] if best else []
    if max_drop is not None:
        fastest = fastest_within_drop(candidates, baseline, max_drop)
        wishes += [Pick(fastest, f"fastest within {max_drop:g} of the baseline's mAP50-95")] if fastest else []
    wishes += choose(candidates, baseline, k, objectives)
    picks: dict[str, Pick] = {}
    for wish in wishes:
        picks.setdefault(wish.trial_id, wish)
    return list(picks.values())[:k]


def _front_row(
    folder: RunFolder, record: TrialRecord, baseline: Mapping[str, Any], finetuned: Selected | None
) -> dict[str, Any]:
    row: dict[str, Any] = {"trial_id": record.trial_id, "fidelity": record.fidelity_label, "epochs": record.epochs}
    row.update({name: record.number(name) for name in METRIC_COLUMNS})
    bounds = speedup_interval(record.metrics)
    row["speedup_ci95"] = list(bounds) if bounds else None
    row["map50_95_drop"] = baseline["metrics"]["map50_95"] - record.metrics["map50_95"]
    row["plan_hash"] = record.plan_hash
    row["plan"] = _existing(folder.trial_plan(record.trial_id))
    row["checkpoint"] = _existing(folder.trial_checkpoint(record.trial_id))
    row["finetuned_map50_95"] = finetuned.after.get("map50_95") if finetuned else None
    row["finetuned_speedup"] = finetuned.after.get("speedup") if finetuned else None
    row["finetuned_checkpoint"] = _existing(folder.selected_checkpoint(record.trial_id)) if finetuned else None
    return row


def _existing(path: Path) -> str | None:
    return str(path.resolve()) if path.exists() else None


def front_frame(run: RunFolder | str | Path) -> pd.DataFrame:
    """`front_rows` as a data frame with flat columns, for front.csv."""
    rows = front_rows(run)
    for row in rows:
        row["speedup_low"], row["speedup_high"] = row.pop("speedup_ci95") or (None, None)
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=["trial_id", "map50_95", "latency_ms"])
