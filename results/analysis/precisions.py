"""What each precision costs and brings: networks with their accuracy and latency in every precision, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paretoprune.base import formatting
from paretoprune.base.image_size import ImageSize, size_text
from paretoprune.results.selection.selection import DEFAULT_MAX_DROP
from paretoprune.results.store.accuracy import LABELS, accuracy_name, accuracy_of
from paretoprune.results.store.bounds import ROUNDING
from paretoprune.results.store.records import DEPLOY_PRECISION, TrialRecord

Interval = tuple[float, float]
BASELINE, UNPRUNED = "baseline", "the unpruned model"


@dataclass(frozen=True)
class PrecisionCell:
    """One network in one precision; latency in ms, `speedup` over the unpruned model in the run's own precision.

    cost, gain: change of the accuracy and speed-up against the same network in the run's own precision, with 95 %
    intervals where they were measured in one session; None for that precision itself, and where it was not measured.
    """

    accuracy: float
    latency_ms: float
    speedup: float
    cost: float | None = None
    cost_ci95: Interval | None = None
    gain: float | None = None
    gain_ci95: Interval | None = None


@dataclass(frozen=True)
class PrecisionTable:
    """rows: network -> precision -> what it is in it. precisions: the run's own first. advice: what to ship, in words.

    with_picks: picks are among them, after their full fine-tuning.
    """

    precisions: tuple[str, ...]
    rows: Mapping[str, Mapping[str, PrecisionCell]]
    accuracy_label: str
    advice: str
    with_picks: bool


def precision_table(
    baseline: Mapping[str, Any], moves: Sequence[TrialRecord], session: Mapping[str, Any]
) -> PrecisionTable | None:
    """By the last session (session.json), else by the free moves alone; None where a run has one precision."""
    own = baseline["metrics"].get(DEPLOY_PRECISION)
    others = tuple(dict.fromkeys(move.precision for move in moves if move.precision))
    if own is None or not others:
        return None
    judged = {name: by for name, by in (session.get("precisions") or {}).items() if own in by}
    rows = {UNPRUNED if n == BASELINE else n.removeprefix("native:"): _judged(by, own) for n, by in judged.items()}
    with_picks = any(name != BASELINE for name in judged)
    candidates = rows or {}
    measured: dict[ImageSize | None, dict[str, Mapping[str, Any]]] = {None: {own: baseline["metrics"]}}
    for move in moves:
        measured.setdefault(move.imgsz, {})[move.precision or own] = move.metrics
    free = {
        UNPRUNED if size is None else f"{UNPRUNED} at {size_text(size)} px": _measured(by, own)
        for size, by in measured.items()
        if own in by and len(by) > 1
    }
    if UNPRUNED not in free and not rows:
        return None
    rows = {**free, **rows}
    return PrecisionTable(
        (own, *others),
        {name: rows[name] for name in dict.fromkeys([UNPRUNED, *free, *rows]) if name in rows},
        LABELS[accuracy_name(baseline["metrics"])],
        _advice(candidates or free, own, LABELS[accuracy_name(baseline["metrics"])]),
        with_picks,
    )


def _judged(by: Mapping[str, Mapping[str, Any]], own: str) -> dict[str, PrecisionCell]:
    """Cells of a network of the session, which has intervals."""
    cells = _measured(by, own)
    found = {}
    for precision, cell in cells.items():
        cost, gain = by[precision].get("accuracy_cost"), by[precision].get("speedup_over_own")
        more: dict[str, Any] = {"cost": cost[0], "cost_ci95": (cost[1], cost[2])} if cost else {}
        more |= {"gain": gain[0], "gain_ci95": (gain[1], gain[2])} if gain else {}
        found[precision] = PrecisionCell(**{**vars(cell), **more})
    return found


def _measured(by: Mapping[str, Mapping[str, Any]], own: str) -> dict[str, PrecisionCell]:
    """Cells by precision, that of the run first, from the metrics of each."""
    found: dict[str, PrecisionCell] = {}
    for precision in (own, *(name for name in by if name != own)):
        metrics = by[precision]
        accuracy, speedup = float(accuracy_of(metrics) or 0.0), float(metrics.get("speedup", 1.0))
        change: dict[str, Any] = {}
        if precision != own:
            change = {"cost": accuracy - found[own].accuracy, "gain": speedup / found[own].speedup}
        found[precision] = PrecisionCell(accuracy, float(metrics["latency_ms"]), speedup, **change)
    return found


def _advice(rows: Mapping[str, Mapping[str, PrecisionCell]], own: str, label: str) -> str:
    """The fastest of all networks in all precisions within DEFAULT_MAX_DROP of the unpruned model in the run's own."""
    base = rows[UNPRUNED][own]
    every = [(name, precision, cell) for name, by in rows.items() for precision, cell in by.items()]
    close = [each for each in every if each[2].accuracy >= base.accuracy - DEFAULT_MAX_DROP - ROUNDING]
    name, precision, best = min(close, key=lambda each: each[2].latency_ms)
    if best is base:
        text = f"Ship {UNPRUNED} in {own}: nothing faster here is within {DEFAULT_MAX_DROP:g} of its {label}"
    else:
        text = f"Ship {name} in {precision}: {formatting.times(best.speedup)} at {label} {best.accuracy:.3f} "
        text += f"({formatting.signed(best.accuracy - base.accuracy)}), the fastest within {DEFAULT_MAX_DROP:g} of "
        text += f"{UNPRUNED} in {own}"
    fastest = min(every, key=lambda each: each[2].latency_ms)
    if fastest[2] is not best:
        lost = formatting.signed(fastest[2].accuracy - base.accuracy)
        text += f"; {fastest[0]} in {fastest[1]} is faster ({formatting.times(fastest[2].speedup)}) at {lost}"
    return f"{text}."
