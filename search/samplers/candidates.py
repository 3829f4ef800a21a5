"""The next plan to try, from what finished plans gave: the one that promises most hypervolume. Numbers only, no Optuna.

Plans are levels (whole numbers, one an axis). Each objective has a
:class:`~search.samplers.gaussian_process.Surrogate`; the front is what the surrogates say of the tried plans, so that a
lucky measurement does not block its neighbours; plans that are being evaluated count with their expected result.
Candidates start from that front and climb by steps of one axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr

from paretoprune.results.selection.pareto import non_dominated
from paretoprune.search.samplers.acquisition import expected_improvement, free_cells
from paretoprune.search.samplers.features import PlanFeatures
from paretoprune.search.samplers.gaussian_process import FeatureMatrix, Surrogate, fit_hyperparameters

Array = NDArray[np.float64]
Whole = NDArray[np.int64]
View = Callable[[FeatureMatrix], FeatureMatrix]

MOST_POINTS = 300  # the cost of a suggestion grows with the square; further trials are thinned out, the front stays
# Nobody ships what has lost half of its accuracy, and most look where little is lost. On the synthetic problem (two
# trials in flight, 16 problems) 24 trials have 0.90 of the front's hypervolume, 0.90 of what lies above three quarters
# of the unpruned accuracy, and their fastest plan within 0.02 takes 1.08 times the front's latency; all corners alike
# give 0.90, 0.89 and 1.09, the first one alone, before work and floors were known, 0.91, 0.84 and 1.12.
_OF_USE = {0.0: 0.1, 0.5: 1.0, 0.75: 1.0}  # share of the best accuracy: weight
_CANDIDATES = 600
_CLIMBERS = 6
_CLIMBS = 8
_REFIT_GROWTH = 1.06  # refit the hyperparameters when there are this many times more trials


@dataclass(frozen=True)
class Evidence:
    """What is known: ``levels`` (n, d) tried, ``losses`` (n, m; lower is better, finite), ``variances`` (n, m) that a
    loss has beyond the noise of all (0 for a plain one), ``violations`` (n, c; above 0: a bound is not kept),
    ``pending`` (p, d) under way, ``accuracies``: the columns of ``losses`` that are negative accuracies."""

    levels: Whole
    losses: Array
    variances: Array
    violations: Array
    pending: Whole
    accuracies: Sequence[int] = ()


@dataclass
class CandidateGenerator:
    """Over the plans that ``features`` describes. Equal evidence and seed give equal proposals.

    ``path``: plans (n, d) that were good guesses before anything was tried; they and what lies near are candidates.
    """

    features: PlanFeatures
    seed: int
    path: Whole = field(default_factory=lambda: np.empty((0, 0), dtype=np.int64))
    _random: np.random.Generator = field(init=False)
    _tops: Whole = field(init=False)
    _hyper: list[Array] = field(init=False, default_factory=list)
    _fitted_at: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)
        self._tops = np.array(self.features.sizes) - 1

    def propose(self, evidence: Evidence, taken: set[tuple[int, ...]]) -> tuple[int, ...]:
        """The most promising plan that is not in ``taken``; needs two tried plans or more."""
        evidence = self._thinned(evidence)
        targets = np.hstack([evidence.losses, evidence.violations])
        extra = np.hstack([evidence.variances, np.zeros_like(evidence.violations)])
        design = self.features.design(evidence.levels)
        seen = self._seen_by(evidence)
        self._fit(design, targets, extra, seen)
        models = _models(design, targets, extra, self._hyper, seen)
        if len(evidence.pending):
            pending = self.features.design(evidence.pending)
            believed = np.stack([m.predict(view(pending))[0] for m, view in zip(models, seen, strict=True)], axis=1)
            design, targets = design.joined(pending), np.vstack([targets, believed])
            extra = np.vstack([extra, np.zeros_like(believed)])
            models = _models(design, targets, extra, self._hyper, seen)
        corners, floors = corners_of(evidence.losses, evidence.accuracies), self._floors(evidence)
        score = _Score(models, design, evidence.losses.shape[1], corners, floors, seen)
        return self._climb(score, np.vstack([evidence.levels, evidence.pending]), taken)

    def _floors(self, evidence: Evidence) -> Callable[[Whole], Array]:
        """The least losses (n, m) of plans: no accuracy above the best one of their size and precision, where the
        unpruned network was measured there."""
        widths = len(self._tops) - self.features.shared
        places = [tuple(row) for row in evidence.levels[:, widths:].tolist()]
        floors: dict[tuple[int, ...], Array] = {}
        for row in np.flatnonzero((evidence.levels[:, :widths] == 0).all(axis=1)):
            same = [index for index, place in enumerate(places) if place == places[row]]
            floors[places[row]] = np.full(evidence.losses.shape[1], -np.inf)
            for column in evidence.accuracies:
                floors[places[row]][column] = evidence.losses[same, column].min()
        unknown = np.full(evidence.losses.shape[1], -np.inf)
        return lambda plans: np.array([floors.get(tuple(row), unknown) for row in plans[:, widths:].tolist()])

    def _seen_by(self, evidence: Evidence) -> list[View]:
        """What each surrogate sees of a plan: that of a cost nothing of what the plan's accuracy loses."""
        costs = [k not in evidence.accuracies for k in range(evidence.losses.shape[1])]
        costs += [False] * evidence.violations.shape[1]
        return [FeatureMatrix.without_losses if cost and self.features.losses else _whole for cost in costs]

    def _fit(self, design: FeatureMatrix, targets: Array, extra: Array, seen: list[View]) -> None:
        count, columns = targets.shape
        if len(self._hyper) == columns and count < _REFIT_GROWTH * self._fitted_at:
            return
        starts = self._hyper if len(self._hyper) == columns else [None] * columns
        self._hyper = [
            fit_hyperparameters(seen[column](design), targets[:, column], extra[:, column], start)
            for column, start in enumerate(starts)
        ]
        self._fitted_at = count

    def _climb(self, score: _Score, known: Whole, taken: set[tuple[int, ...]]) -> tuple[int, ...]:
        """The best of the candidates after some rounds of single steps."""
        pool = self._candidates(known[score.best], taken)
        values = score(self.features.design(pool), pool)
        for _ in range(_CLIMBS):
            order = np.argsort(-values, kind="stable")[:_CLIMBERS]
            near = self._unseen(self._sensible(np.vstack([self._steps(pool[index]) for index in order])), taken)
            near_values = score(self.features.design(near), near)
            best = values[order[0]]
            pool, values = np.vstack([pool[order], near]), np.concatenate([values[order], near_values])
            if values.max() <= best:
                break
        return tuple(int(level) for level in pool[int(np.argmax(values))])

    def _candidates(self, front: Whole, taken: set[tuple[int, ...]]) -> Whole:
        """The path and mutations of it; mutations and crossings of the front, plans of one ratio, and random ones."""
        tops = self._tops
        axes = len(tops)
        parents = front[self._random.integers(len(front), size=(2, _CANDIDATES))]
        crossed = np.where(self._random.random((_CANDIDATES, axes)) < 0.5, parents[0], parents[1])
        share = self._random.choice([0.05, 0.1, 0.3, 1.0], size=(_CANDIDATES, 1))
        reach = self._random.choice([0.1, 0.25, 0.6], size=(_CANDIDATES, 1))
        moved = self._random.normal(0.0, reach, (_CANDIDATES, axes)) * tops
        mutated = parents[0] + np.where(self._random.random((_CANDIDATES, axes)) < share, moved, 0.0)
        quarter = _CANDIDATES // 4
        shifted = parents[0][:quarter] + self._random.normal(0.0, 0.2, (quarter, 1)) * tops
        anywhere = self._random.random((quarter, axes)) * (tops + 1) - 0.5
        plans = np.vstack([crossed, mutated, shifted, anywhere])
        if len(self.path):
            guesses = self.path[self._random.integers(len(self.path), size=quarter)]
            few = self._random.random((quarter, axes)) < share[:quarter]
            moved = self._random.normal(0.0, 0.1, (quarter, axes)) * tops
            plans = np.vstack([plans, self.path, guesses + np.where(few, moved, 0.0)])
        return self._unseen(self._sensible(np.clip(np.rint(plans), 0, tops).astype(np.int64)), taken)

    def _sensible(self, plans: Whole) -> Whole:
        """Those that are not estimated to lose more than the path's heaviest plan, which is hardly a detector; all of
        them where none is left."""
        if not len(self.path):
            return plans
        usual = self.features.lost(plans) <= self.features.lost(self.path).max()
        return plans[usual[:, 0]] if usual.any() else plans

    def _steps(self, plan: Whole) -> Whole:
        """All plans that differ from ``plan`` in one axis by one, two or four levels."""
        tops = self._tops
        steps = [sign * size for size in (1, 2, 4) for sign in (-1, 1)]
        plans = np.repeat(plan[None, :], len(steps) * len(tops), axis=0)
        for index, step in enumerate(steps):
            rows = np.arange(index * len(tops), (index + 1) * len(tops))
            plans[rows, np.arange(len(tops))] += step
        return np.clip(plans, 0, tops)

    def _unseen(self, plans: Whole, taken: set[tuple[int, ...]]) -> Whole:
        """Different plans that are not taken; where there is none, random ones until there is."""
        fresh = [plan for plan in dict.fromkeys(map(tuple, plans.tolist())) if plan not in taken]
        while not fresh:
            drawn = (self._random.random((100, len(self._tops))) * (self._tops + 1)).astype(np.int64)
            fresh = [plan for plan in dict.fromkeys(map(tuple, drawn.tolist())) if plan not in taken]
        return np.array(fresh, dtype=np.int64)

    def _thinned(self, evidence: Evidence) -> Evidence:
        """At most ``MOST_POINTS`` trials: layer by layer of the non-dominated sort, then the latest."""
        count = len(evidence.levels)
        if count <= MOST_POINTS:
            return evidence
        left = np.arange(count)
        kept: list[int] = []
        while len(kept) < MOST_POINTS // 2:
            best = non_dominated(evidence.losses[left])
            kept.extend(left[best].tolist())
            left = left[~best]
        chosen = np.sort(np.concatenate([kept, left[-(MOST_POINTS - len(kept)) :]])[:MOST_POINTS]).astype(int)
        return Evidence(
            evidence.levels[chosen],
            evidence.losses[chosen],
            evidence.variances[chosen],
            evidence.violations[chosen],
            evidence.pending,
            evidence.accuracies,
        )


class _Score:
    """Expected improvement of the hypervolume's mean over the corners, in units of each corner's box, times the chance
    that every bound is kept."""

    def __init__(
        self,
        models: list[Surrogate],
        design: FeatureMatrix,
        objectives: int,
        corners: Array,
        floors: Callable[[Whole], Array],
        seen: list[View],
    ) -> None:
        self._models = models
        self._seen = seen
        self._floors = floors
        self._objectives = objectives
        means = np.stack([m.predict(view(design))[0] for m, view in zip(models, seen, strict=True)], axis=1)
        feasible = (means[:, objectives:] <= 0).all(axis=1)
        losses = means[:, :objectives]
        usable = np.flatnonzero(feasible) if feasible.any() else np.arange(len(means))
        self.best = usable[non_dominated(losses[usable])]
        boxes = [free_cells(losses[feasible], corner) for corner in corners]
        volumes = np.maximum(corners - losses.min(axis=0), 1e-12).prod(axis=1)
        self._lower, self._upper = (np.vstack(bounds) for bounds in zip(*boxes, strict=True))
        weights = np.array(list(_OF_USE.values())) / volumes
        self._weights = np.repeat(weights, [len(lower) for lower, _ in boxes])

    def __call__(self, design: FeatureMatrix, plans: Whole) -> Array:
        predicted = [model.predict(view(design)) for model, view in zip(self._models, self._seen, strict=True)]
        means = np.stack([mean for mean, _ in predicted], axis=1)
        spreads = np.stack([spread for _, spread in predicted], axis=1)
        gain = expected_improvement(
            means[:, : self._objectives],
            spreads[:, : self._objectives],
            self._floors(plans),
            self._lower,
            self._upper,
            self._weights,
        )
        chance = log_ndtr(-means[:, self._objectives :] / spreads[:, self._objectives :]).sum(axis=1)
        return np.asarray(np.log(np.maximum(gain, 1e-300)) + chance)


def corners_of(losses: Array, accuracies: Sequence[int] = ()) -> Array:
    """The corners (k, m) from which hypervolume counts, one for each of `_OF_USE`: a little beyond the worst of every
    objective, with at least that share of the best accuracy."""
    worst, best = losses.max(axis=0), losses.min(axis=0)
    corners = np.tile(worst + 0.01 * np.maximum(worst - best, 1e-9), (len(_OF_USE), 1))
    for column in accuracies:
        least = [best[column] * share if share else np.inf for share in _OF_USE]
        corners[:, column] = np.minimum(corners[:, column], least)
    return corners


def _whole(design: FeatureMatrix) -> FeatureMatrix:
    return design


def _models(
    design: FeatureMatrix, targets: Array, extra: Array, hyper: list[Array], seen: list[View]
) -> list[Surrogate]:
    return [
        Surrogate(seen[column](design), targets[:, column], extra[:, column], parameters)
        for column, parameters in enumerate(hyper)
    ]
