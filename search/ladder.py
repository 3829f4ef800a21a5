"""The warm start: one uniform ratio over all layers, climbing from light to heavy.

Measured on a synthetic front, this start alone beats a sampler without it for the first hundreds of trials; it is also
what people do by hand, so it is the comparison that a front has to stand.
"""

from __future__ import annotations

from search.space import Levels, Space

LIGHTEST, HEAVIEST = 0.1, 0.6
MOST_STEPS = 11  # ratio steps of 0.05: finer ones hardly change any width


def ladder_ratios(trials: int) -> list[float]:
    """The ratios to try when a run has ``trials`` trials in all: about a quarter of them, at least 2, at most 11."""
    steps = min(MOST_STEPS, max(2, round(trials / 4)), trials)
    if steps == 1:
        return [(LIGHTEST + HEAVIEST) / 2]
    return [LIGHTEST + (HEAVIEST - LIGHTEST) * step / (steps - 1) for step in range(steps)]


def ladder_plans(space: Space, trials: int) -> list[Levels]:
    """Different plans of the ladder, lightest first; bounds may make steps equal, and those are left out once seen."""
    plans = [space.uniform(ratio) for ratio in ladder_ratios(trials)]
    unpruned = space.uniform(0.0)
    return [plan for plan in dict.fromkeys(plans) if plan != unpruned]
