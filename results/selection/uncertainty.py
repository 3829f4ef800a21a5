"""Which differences are clear and which may be luck: trials compared with the uncertainty of what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paretoprune.results.store.accuracy import LABELS, ON_ALL, VAL_IMAGES, accuracy_name, missing_metric, on_all_images
from paretoprune.results.store.objectives import DEFAULT_OBJECTIVES, Losses, device_of, direction, to_losses
from paretoprune.results.store.records import TrialRecord, as_record, likely_speedups, of_device
from paretoprune.results.store.run_files import Native, Selected

Z95 = 1.959964
UNKNOWN = "not known (a run made before it was measured): accuracies are taken as exact"


@dataclass(frozen=True)
class AccuracyNoise:
    """How much the difference of two networks' accuracy changes with the choice of validation images.

    std: metric -> standard deviation of that difference; a metric not in it counts as exact. source: for people.
    """

    std: Mapping[str, float] = field(default_factory=dict)
    source: str = UNKNOWN

    @property
    def text(self) -> str:
        """One line: how large a difference of accuracy must be to be clear, and where that comes from."""
        name = accuracy_name(self.std)
        if name not in self.std:
            return self.source
        return f"differences of {LABELS[name]} up to {Z95 * self.std[name]:.3f} may be luck ({self.source})"


def accuracy_noise(baseline: Mapping[str, Any], on_all: bool = False) -> AccuracyNoise:
    """What baseline.json says about it, for trials; on_all: for finished networks, which are judged on all validation
    images where trials are on a sample: the deviation falls with the square root of their number.

    Best, the paired bootstrap over images that a run makes at its start. Where only the number n of validation images
    is known: a mean of n values in [0, 1] with the mean p has a standard deviation of at most sqrt(p (1 - p) / n)
    (Bhatia and Davis, American Mathematical Monthly 2000), the difference of two independent ones sqrt(2) times that;
    an upper bound, since two networks see the same images. Else none.
    """
    known = baseline.get("noise") or {}
    stds = {name: float(known[f"{name}_std"]) for name in (*LABELS, "map50") if f"{name}_std" in known}
    images = known.get("images")
    every = baseline["metrics"].get(f"{VAL_IMAGES}{ON_ALL}")
    share = images / every if on_all and images and every else 1.0
    if stds:
        said = str(known.get("source", "measured"))
        return AccuracyNoise({name: std * math.sqrt(share) for name, std in stds.items()}, said)
    if not images:
        return AccuracyNoise()
    accuracies = {name: baseline["metrics"].get(name) for name in (*LABELS, "map50")}
    bound = {name: math.sqrt(2 * p * (1 - p) * share / images) for name, p in accuracies.items() if p is not None}
    return AccuracyNoise(bound, f"at most, from the number of validation images ({images})")


def loss_intervals(
    records: Sequence[TrialRecord],
    objectives: Sequence[str] = DEFAULT_OBJECTIVES,
    noise: AccuracyNoise | None = None,
) -> tuple[Losses, Losses]:
    """n records -> the (n, m) lower and upper ends of their 95 % intervals, as losses; low <= loss <= high.

    Latency: from its `speedup_ci95`, or the prediction's interval where it was predicted. Accuracy: half of the
    difference's interval to either side, so that two intervals overlap exactly where the difference is within its
    noise. Everything else is exact.
    """
    losses = to_losses(records, objectives)
    low, high = losses.copy(), losses.copy()
    stds = noise.std if noise else {}
    for column, name in enumerate(objectives):
        if name == "latency_ms" or device_of(name):
            ends = np.array([_latency_interval(record, device_of(name)) for record in records]).reshape(-1, 2)
            low[:, column], high[:, column] = ends[:, 0], ends[:, 1]
        elif direction(name) == "max" and name in stds:
            low[:, column] -= Z95 * stds[name] / 2
            high[:, column] += Z95 * stds[name] / 2
    return low, high


def _latency_interval(record: TrialRecord, device: str) -> tuple[float, float]:
    """latency_ms is the baseline's divided by the speed-up, so the speed-up's interval gives its own."""
    metrics = of_device(record.metrics, device)
    latency, bounds, speedup = float(metrics["latency_ms"]), likely_speedups(metrics), metrics.get("speedup")
    if not speedup or not bounds or min(bounds) <= 0:
        return latency, latency
    base = latency * speedup
    return min(latency, base / max(bounds)), max(latency, base / min(bounds))


@dataclass(frozen=True)
class Standing:
    """How sure a trial's place is.

    tied_with: trials that no objective tells apart from it. beaten_by: trials that are clearly better in an objective
    and clearly worse in none; of a front's member it says that only noise keeps it on the front.
    """

    tied_with: tuple[str, ...]
    beaten_by: tuple[str, ...]

    @property
    def firm(self) -> bool:
        """Whether no trial is as good or better within the noise."""
        return not self.tied_with and not self.beaten_by


def standings(
    shown: Sequence[TrialRecord],
    among: Sequence[TrialRecord],
    objectives: Sequence[str] = DEFAULT_OBJECTIVES,
    noise: AccuracyNoise | None = None,
) -> dict[str, Standing]:
    """The standing of each trial of `shown` among those it competes with, by trial id; ids in the order of `among`.

    O(len(shown) * len(among)) comparisons.
    """
    if not shown or not among:
        return {record.trial_id: Standing((), ()) for record in shown}
    low, high = loss_intervals(among, objectives, noise)
    ids = np.array([record.trial_id for record in among])
    own_low, own_high = loss_intervals(shown, objectives, noise)
    found = {}
    for row, record in enumerate(shown):
        better = high < own_low[row]  # (n, m): clearly better than the shown trial
        worse = low > own_high[row]
        others = ids != record.trial_id
        tied = others & ~better.any(axis=1) & ~worse.any(axis=1)
        beating = others & better.any(axis=1) & ~worse.any(axis=1)
        found[record.trial_id] = Standing(_names(ids, tied), _names(ids, beating))
    return found


def beaten_by_free_moves(
    shown: Sequence[TrialRecord], moves: Sequence[TrialRecord], noise: AccuracyNoise | None = None
) -> dict[str, str]:
    """Trial -> the free move that beats it; trials that none beats are not in it.

    A free move (`RunFolder.read_free_moves`) beats a trial as in `standings`, by accuracy and latency whatever the
    run's objectives are: clearly better in one, clearly worse in none. Of several it is the most accurate.
    """
    if not moves:
        return {}
    name = accuracy_name(moves[0].metrics)
    judged = [item for item in shown if item.number(name) is not None and item.number("latency_ms") is not None]
    ordered = sorted(moves, key=lambda move: -float(move.metrics[name]))
    found = standings(judged, ordered, (name, "latency_ms"), noise)
    return {trial_id: standing.beaten_by[0] for trial_id, standing in found.items() if standing.beaten_by}


def beaten_picks(
    selected: Sequence[Selected],
    moves: Sequence[TrialRecord],
    tuned: Sequence[Native] = (),
    noise: AccuracyNoise | None = None,
) -> dict[str, str]:
    """`beaten_by_free_moves` for picks after their full fine-tuning, by accuracy on all validation images (`noise`
    likewise); a free move that was fine-tuned, too (`tuned`), counts as it is then."""
    rivals = {move.trial_id: move.changed(metrics=on_all_images(move.metrics)) for move in moves}
    rivals |= {item.name: as_record(item.name, item.after) for item in tuned if not missing_metric(item.after)}
    finished = [as_record(item.trial_id, item.after) for item in selected if not missing_metric(item.after)]
    return beaten_by_free_moves(finished, list(rivals.values()), noise)


def _names(ids: NDArray[np.str_], mask: NDArray[np.bool_]) -> tuple[str, ...]:
    return tuple(str(name) for name in ids[mask])
