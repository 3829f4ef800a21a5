"""Which trials to take: the front, its knee, the best under a bound, the fastest within a drop, K spread out.

All are pure functions of records. They compare completed trials of one fidelity only (see `comparable`); a trial that
was stopped, failed, or went less far than the others never competes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paretoprune.results.errors import ResultsError
from paretoprune.results.selection.pareto import non_dominated
from paretoprune.results.store.accuracy import accuracy_label, accuracy_name, accuracy_of, on_all_images
from paretoprune.results.store.bounds import ROUNDING as _ROUNDING
from paretoprune.results.store.objectives import DEFAULT_OBJECTIVES, Losses, to_losses
from paretoprune.results.store.records import FIDELITIES, TrialRecord, TrialState
from paretoprune.results.store.run_files import Selected

DEFAULT_MAX_DROP = 0.02
KNEE = "knee"


@dataclass(frozen=True)
class Pick:
    """A trial that was chosen, and as what."""

    record: TrialRecord
    chosen_as: str

    @property
    def trial_id(self) -> str:
        """The chosen trial's id."""
        return self.record.trial_id


def main_fidelity(records: Sequence[TrialRecord]) -> str | None:
    """The fidelity label most completed trials have (ties: the one that went further); None without any."""
    completed = [record for record in records if record.state is TrialState.COMPLETED]
    counts = Counter(record.fidelity_label for record in completed)
    if not counts:
        return None
    reach = {record.fidelity_label: (FIDELITIES.index(record.fidelity), record.epochs) for record in completed}
    return max(counts, key=lambda label: (counts[label], reach[label]))


def comparable(records: Sequence[TrialRecord], fidelity: str | None = None) -> list[TrialRecord]:
    """The completed, feasible records of one fidelity label (default: `main_fidelity`), in their order."""
    label = fidelity or main_fidelity(records)
    done = [item for item in records if item.state is TrialState.COMPLETED and item.feasible]
    return [item for item in done if item.fidelity_label == label]


def front(
    records: Sequence[TrialRecord], objectives: Sequence[str] = DEFAULT_OBJECTIVES, fidelity: str | None = None
) -> list[TrialRecord]:
    """The non-dominated comparable records, the best in the first objective first. Equal ones all stay."""
    candidates = comparable(records, fidelity)
    losses = to_losses(candidates, objectives)
    kept = sorted(np.flatnonzero(non_dominated(losses)), key=lambda index: (*losses[index], candidates[index].trial_id))
    return [candidates[index] for index in kept]


def _scaled(records: Sequence[TrialRecord], objectives: Sequence[str]) -> Losses:
    """(n, m) losses scaled to [0, 1] over the records; a column without range becomes 0."""
    losses = to_losses(records, objectives)
    spans = np.ptp(losses, axis=0)
    return np.asarray((losses - losses.min(axis=0)) / np.where(spans > 0, spans, 1.0))


def knee(records: Sequence[TrialRecord], objectives: Sequence[str] = DEFAULT_OBJECTIVES) -> TrialRecord | None:
    """The front's knee: farthest below the chord (hyperplane) between its extremes, objectives scaled to [0, 1].

    That distance is (1 - sum of scaled losses) / sqrt(m), as in Das, "On characterizing the knee of the Pareto curve",
    Structural Optimization 1999. Ties go to the trial that is better in the first objective. None without a front.
    """
    candidates = front(records, objectives)
    if not candidates:
        return None
    sums = _scaled(candidates, objectives).sum(axis=1)
    return candidates[int(np.flatnonzero(sums <= sums.min() + _ROUNDING)[0])]


def best_under(records: Sequence[TrialRecord], **bounds: float | None) -> TrialRecord | None:
    """The most accurate trial within upper bounds such as max_latency_ms=8.0, max_params_m=2.0 (inclusive).

    A bound of None is no bound; a trial without a bounded metric does not qualify. Ties: the faster one. None if no
    trial qualifies. Raises ResultsError for a bound that is not named `max_<metric>`.
    """
    limits = {_bounded_metric(name): limit for name, limit in bounds.items() if limit is not None}

    def within(record: TrialRecord) -> bool:
        values = {name: record.number(name) for name in limits}
        return all(value is not None and value <= limits[name] + _ROUNDING for name, value in values.items())

    return min((item for item in comparable(records) if within(item)), key=_by_accuracy, default=None)


def _bounded_metric(name: str) -> str:
    metric = name.removeprefix("max_")
    if metric == name or metric not in ("latency_ms", "latency_ratio", "params_m", "gflops", "size_mb"):
        raise ResultsError(f"a bound must be max_latency_ms, max_params_m, max_gflops or max_size_mb, but got {name!r}")
    return metric


def _by_accuracy(record: TrialRecord) -> tuple[float, float, str]:
    accuracy, latency = to_losses([record], (accuracy_name(record.metrics), "latency_ms"))[0]
    return float(accuracy), float(latency), record.trial_id


def fastest_within_drop(
    records: Sequence[TrialRecord], baseline: Mapping[str, Any], max_drop: float
) -> TrialRecord | None:
    """The fastest trial that loses at most `max_drop` of accuracy (absolute, 0.02 = two points) against the baseline.

    baseline: the content of baseline.json. Ties: the more accurate one. None if no trial qualifies.
    """
    floor = (accuracy_of(baseline["metrics"]) or 0.0) - max_drop - _ROUNDING
    within = [record for record in comparable(records) if (accuracy_of(record.metrics) or 0.0) >= floor]

    def by_latency(record: TrialRecord) -> tuple[float, float, str]:
        accuracy, latency, trial_id = _by_accuracy(record)
        return latency, accuracy, trial_id

    return min(within, key=by_latency, default=None)


def within_words(max_drop: float, baseline: Mapping[str, Any]) -> str:
    """As what the trial of `fastest_within_drop` is chosen."""
    return f"fastest within {max_drop:g} of the unpruned model's {accuracy_label(baseline['metrics'])}"


def spread(records: Sequence[TrialRecord], k: int, objectives: Sequence[str] = DEFAULT_OBJECTIVES) -> list[TrialRecord]:
    """K trials spread over the front: the smallest gap between neighbours is as large as it can be.

    Gaps are measured along the front (scaled L1 steps from its best to its worst trial in the first objective). One
    trial is the knee; with two or more, both ends are in. Fewer than k come back only where the front is smaller.
    """
    _check_count(k)
    candidates = front(records, objectives)
    if k == 1 and candidates:
        return [item for item in [knee(records, objectives)] if item]
    if len(candidates) <= k:
        return candidates
    steps = np.abs(np.diff(_scaled(candidates, objectives), axis=0)).sum(axis=1)
    positions = np.concatenate([[0.0], np.cumsum(steps)])
    return [candidates[index] for index in _most_separated(positions, k)]


def _check_count(k: int) -> None:
    if k < 1:
        raise ResultsError(f"the number of picks must be at least 1, but got {k}")


def _most_separated(positions: NDArray[np.float64], k: int) -> list[int]:
    """k indices of ascending positions whose smallest gap is maximal: bisection over the possible gaps."""
    distinct = np.unique(positions)
    gaps = np.unique(np.abs(distinct[:, None] - distinct[None, :]))
    low, high = 0, len(gaps) - 1  # gap 0 is always possible
    while low < high:
        middle = (low + high + 1) // 2
        if len(_greedy(positions, float(gaps[middle]), k)) == k:
            low = middle
        else:
            high = middle - 1
    chosen = _greedy(positions, float(gaps[low]), k)
    chosen[-1] = len(positions) - 1  # moving the last one to the end only widens its gap
    return chosen


def _greedy(positions: NDArray[np.float64], gap: float, k: int) -> list[int]:
    """The first index, then each next one at least `gap` further, at most k of them."""
    chosen = [0]
    for index in range(1, len(positions)):
        if len(chosen) < k and positions[index] - positions[chosen[-1]] >= gap - _ROUNDING:
            chosen.append(index)
    return chosen


def choose(
    records: Sequence[TrialRecord],
    baseline: Mapping[str, Any],
    k: int = 3,
    objectives: Sequence[str] = DEFAULT_OBJECTIVES,
) -> list[Pick]:
    """The default picks, at most k different trials and fewer where the front is smaller.

    In this order: the knee; the fastest within a small accuracy drop; the most accurate that is faster than the
    baseline; then whichever front trial lies farthest from those chosen. Without any comparable trial: [].
    """
    _check_count(k)
    limit_ms = float(baseline["metrics"]["latency_ms"])
    wishes = [
        (knee(records, objectives), KNEE),
        (
            fastest_within_drop(records, baseline, DEFAULT_MAX_DROP),
            within_words(DEFAULT_MAX_DROP, baseline),
        ),
        (best_under(records, max_latency_ms=limit_ms), f"best under the baseline's {limit_ms:.3g} ms"),
    ]
    picks: dict[str, Pick] = {}
    for record, chosen_as in wishes:
        if record and record.trial_id not in picks and len(picks) < k:
            picks[record.trial_id] = Pick(record, chosen_as)
    for record in _farthest_first(front(records, objectives), list(picks), k - len(picks), objectives):
        picks[record.trial_id] = Pick(record, "spread over the front")
    return list(picks.values())


def _farthest_first(
    candidates: list[TrialRecord], chosen_ids: list[str], count: int, objectives: Sequence[str]
) -> list[TrialRecord]:
    """Up to `count` further candidates, each the farthest (scaled Euclidean) from those chosen; no exact doubles."""
    if not candidates or count < 1:
        return []
    points = _scaled(candidates, objectives)
    distances = np.full(len(candidates), np.inf)
    for index, record in enumerate(candidates):
        if record.trial_id in chosen_ids:
            distances = np.minimum(distances, np.linalg.norm(points - points[index], axis=1))
    added = []
    for _ in range(count):
        farthest = int(np.argmax(distances))
        if distances[farthest] <= 0:
            break
        added.append(candidates[farthest])
        distances = np.minimum(distances, np.linalg.norm(points - points[farthest], axis=1))
    return added


def lead_pick(selected: Sequence[Selected], baseline: Mapping[str, Any]) -> Selected | None:
    """The fully fine-tuned pick that a careful person would take: the fastest within DEFAULT_MAX_DROP of the unpruned
    model's accuracy; where there is none, the knee, else the most accurate one. baseline: of baseline.json."""
    floor = (accuracy_of(on_all_images(baseline["metrics"])) or 0.0) - DEFAULT_MAX_DROP - _ROUNDING
    within = [item for item in selected if (accuracy_of(item.after) or 0.0) >= floor and "latency_ms" in item.after]
    if within:
        return min(within, key=lambda item: float(item.after["latency_ms"]))
    return max(selected, key=lambda item: (item.chosen_as == KNEE, accuracy_of(item.after) or 0.0), default=None)
