"""Picks from what a person asks for: a number of them, the knee, the best within bounds, spread out, or by id."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from paretoprune.results.errors import ResultsError
from paretoprune.results.selection.selection import (
    KNEE,
    Pick,
    best_under,
    choose,
    comparable,
    fastest_within_drop,
    knee,
    spread,
    within_words,
)
from paretoprune.results.store.accuracy import accuracy_label, accuracy_of
from paretoprune.results.store.bounds import NO_BOUNDS, Bounds
from paretoprune.results.store.objectives import DEFAULT_OBJECTIVES
from paretoprune.results.store.records import TrialRecord

BY_HAND = "chosen by hand"
WITHIN, SPEEDUP = "within", "speedup"
WORDS = (
    "K", KNEE, "best", "fastest", "smallest", f"{WITHIN}:DROP", f"{SPEEDUP}:FACTOR", "spread:K",
    "a finished trial's id",
)  # fmt: skip


def pick_trials(
    records: Sequence[TrialRecord],
    baseline: Mapping[str, Any],
    wishes: Sequence[str],
    bounds: Bounds = NO_BOUNDS,
    objectives: Sequence[str] = DEFAULT_OBJECTIVES,
) -> list[Pick]:
    """The picks for each wish in turn, no trial twice.

    A wish is a number K (what the bounds ask for, then `choose`, K in all), `knee`, `best` (most accurate), `fastest`,
    `smallest` (fewest parameters), `within:DROP` (the fastest that loses at most so much accuracy against the unpruned
    model), `speedup:FACTOR` (the most accurate that is at least so many times as fast as it), `spread:K`, or a trial's
    id. All but an id look only at comparable trials within `bounds`. Raises ResultsError for a wish that is none of
    these and for one that no trial meets; a number K may also bring fewer, and none.
    """
    candidates = bounds.within(comparable(records), baseline)
    by_id = {record.trial_id: record for record in records}
    picks: dict[str, Pick] = {}
    for wish in wishes:
        if wish in by_id:
            found = [Pick(by_id[wish], BY_HAND)]
        else:
            found = _granted(wish, candidates, baseline, bounds, objectives)
        if not found and not wish.isdecimal():
            raise ResultsError(_nothing(wish, candidates, records, baseline, bounds))
        for item in found:
            picks.setdefault(item.trial_id, item)
    return list(picks.values())


def _granted(
    wish: str,
    candidates: Sequence[TrialRecord],
    baseline: Mapping[str, Any],
    bounds: Bounds,
    objectives: Sequence[str],
) -> list[Pick]:
    within = f" with {bounds}" if bounds.given else ""
    word, _, number = wish.partition(":")
    if wish.isdecimal():
        return _so_many(int(wish), candidates, baseline, bounds, objectives)
    if word == "spread" and number.isdecimal():
        chosen_as = f"spread over the front{within}"
        return [Pick(record, chosen_as) for record in spread(candidates, int(number), objectives)]
    limit = _limit(word, number)
    single = {
        f"{WITHIN}:{number}": lambda: (
            fastest_within_drop(candidates, baseline, limit),
            f"{within_words(limit, baseline)}{within}",
        ),
        f"{SPEEDUP}:{number}": lambda: (
            best_under(Bounds(min_speedup=limit).within(candidates, baseline)),
            f"most accurate at least {limit:g} times as fast{within}",
        ),
        KNEE: lambda: (knee(candidates, objectives), KNEE),
        "best": lambda: (best_under(candidates), f"most accurate{within}"),
        "fastest": lambda: (_least(candidates, "latency_ms"), f"fastest{within}"),
        "smallest": lambda: (_least(candidates, "params_m"), f"fewest parameters{within}"),
    }
    if wish not in single or math.isnan(limit):
        raise ResultsError(f"a pick must be {', '.join(WORDS[:-1])} or {WORDS[-1]} of the run, but got {wish!r}")
    record, chosen_as = single[wish]()
    return [Pick(record, chosen_as)] if record else []


def _limit(word: str, number: str) -> float:
    """The number of `within:DROP` and `speedup:FACTOR` (above 0); NaN where it is none, 0 for all other wishes."""
    if word not in (WITHIN, SPEEDUP):
        return 0.0
    try:
        limit = float(number)
    except ValueError:
        return math.nan
    return limit if math.isfinite(limit) and (word == WITHIN or limit > 0) else math.nan


def _so_many(
    k: int,
    candidates: Sequence[TrialRecord],
    baseline: Mapping[str, Any],
    bounds: Bounds,
    objectives: Sequence[str],
) -> list[Pick]:
    """What the bounds ask for first, then the default picks among the candidates; at most k."""
    wishes = []
    if bounds.ask_for_economy:
        best = best_under(candidates)
        wishes += [Pick(best, f"most accurate with {bounds}")] if best else []
    if bounds.ask_for_accuracy:
        fastest = _least(candidates, "latency_ms")
        wishes += [Pick(fastest, f"fastest with {bounds}")] if fastest else []
    picks: dict[str, Pick] = {}
    for wish in [*wishes, *choose(candidates, baseline, k, objectives)]:
        picks.setdefault(wish.trial_id, wish)
    return list(picks.values())[:k]


def _least(candidates: Sequence[TrialRecord], name: str) -> TrialRecord | None:
    """The trial with the least of a metric; ties: the more accurate one, then the id."""

    def key(record: TrialRecord) -> tuple[float, float, str]:
        return float(record.metrics[name]), -(accuracy_of(record.metrics) or 0.0), record.trial_id

    return min((record for record in candidates if record.number(name) is not None), key=key, default=None)


def _nothing(
    wish: str,
    candidates: Sequence[TrialRecord],
    records: Sequence[TrialRecord],
    baseline: Mapping[str, Any],
    bounds: Bounds,
) -> str:
    """The error's line; where there are candidates, it names the nearest."""
    if not comparable(records):
        return "a pick needs a completed trial, but there is none; see `paretoprune status`"
    word, _, number = wish.partition(":")
    best, fastest = best_under(candidates), _least(candidates, "latency_ms")
    if word == WITHIN and best:
        before, reached = accuracy_of(baseline["metrics"]) or 0.0, accuracy_of(best.metrics) or 0.0
        label = accuracy_label(baseline["metrics"])
        return (
            f"--pick {wish} finds no trial within {number} of the unpruned model's {label} {before:.3f}; the nearest "
            f"is {best.trial_id}, {before - reached:.4f} below it"
        )
    if word == SPEEDUP and fastest:
        speedup = float(baseline["metrics"]["latency_ms"]) / fastest.metrics["latency_ms"]
        return (
            f"--pick {wish} finds no trial at least {number} times as fast as the unpruned model; the nearest is "
            f"{fastest.trial_id}, {speedup:.2f} times as fast"
        )
    words = f"{bounds}; loosen the bounds" if bounds.given else "the metric it needs; choose another way"
    return f"--pick {wish} finds no completed trial with {words}"
