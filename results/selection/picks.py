"""Picks from what a person asks for: a number of them, the knee, the best within bounds, spread out, or by id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from paretoprune.results.errors import ResultsError
from paretoprune.results.selection.selection import KNEE, Pick, best_under, choose, comparable, knee, spread
from paretoprune.results.store.accuracy import accuracy_of
from paretoprune.results.store.bounds import NO_BOUNDS, Bounds
from paretoprune.results.store.objectives import DEFAULT_OBJECTIVES
from paretoprune.results.store.records import TrialRecord

BY_HAND = "chosen by hand"
WORDS = ("K", KNEE, "best", "fastest", "smallest", "spread:K", "a finished trial's id")


def pick_trials(
    records: Sequence[TrialRecord],
    baseline: Mapping[str, Any],
    wishes: Sequence[str],
    bounds: Bounds = NO_BOUNDS,
    objectives: Sequence[str] = DEFAULT_OBJECTIVES,
) -> list[Pick]:
    """The picks for each wish in turn, no trial twice.

    A wish is a number K (what the bounds ask for, then `choose`, K in all), `knee`, `best` (most accurate), `fastest`,
    `smallest` (fewest parameters), `spread:K`, or a trial's id. All but an id look only at comparable trials within
    `bounds`. Raises ResultsError for a wish that is none of these and for one that no trial meets; a number K may also
    bring fewer, and none.
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
            raise ResultsError(_nothing(wish, records, bounds))
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
    single = {
        KNEE: lambda: (knee(candidates, objectives), KNEE),
        "best": lambda: (best_under(candidates), f"most accurate{within}"),
        "fastest": lambda: (_least(candidates, "latency_ms"), f"fastest{within}"),
        "smallest": lambda: (_least(candidates, "params_m"), f"fewest parameters{within}"),
    }
    if wish not in single:
        raise ResultsError(f"a pick must be {', '.join(WORDS[:-1])} or {WORDS[-1]} of the run, but got {wish!r}")
    record, chosen_as = single[wish]()
    return [Pick(record, chosen_as)] if record else []


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


def _nothing(wish: str, records: Sequence[TrialRecord], bounds: Bounds) -> str:
    if not comparable(records):
        return "a pick needs a completed trial, but there is none; see `paretoprune status`"
    words = f"{bounds}; loosen the bounds" if bounds.given else "the metric it needs; choose another way"
    return f"--pick {wish} finds no completed trial with {words}"
