"""What people do instead of a search like ours, each as a small function over our surgery: the plans they would try.

Rivals that know all their plans beforehand give a list; the others are asked one by one and told the results. All
choose among the same widths, and everything after the choice (channels within a layer, refit, fine-tuning) is the same
for all, so that only the choice of widths is compared. By hand nobody refits: rivals are better here than out there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from paretoprune.pruning.graph.geometry import NetworkGeometry
from paretoprune.search.space.space import Levels, Space

Array = npt.NDArray[np.float64]

LIGHTEST, HEAVIEST = 0.95, 0.3  # share of multiply-adds that stays, of the plans that a ranking or threshold gives
_STEPS = 60  # of the bisections


@dataclass(frozen=True)
class Problem:
    """One model's space with what the rivals look at.

    `scores[criterion][axis]`: importance of every channel of the axis's leading group; higher stays.
    `losses[axis]`: accuracy lost by that axis alone at each of its levels, without any recovery (FastNAS's curve).
    """

    space: Space
    geometry: NetworkGeometry
    scores: Mapping[str, Sequence[Array]]
    losses: Sequence[Array]

    def kept_macs(self, levels: Levels) -> float:
        """Share of the multiply-adds that stays."""
        macs = self.geometry.macs(self.geometry.shares([{}, self.space.plan(levels).ratios])).sum(axis=1)
        return float(macs[1] / macs[0])


class Rival(Protocol):
    """Proposes plans one at a time. `None`: it has no more."""

    def ask(self) -> Levels | None: ...
    def tell(self, levels: Levels, metrics: Mapping[str, float]) -> None:
        """How a plan went: `map50_95`, and `cost` over the unpruned model's."""
        ...


class Listed:
    """A rival whose plans do not depend on results, in an order that covers the range early."""

    def __init__(self, plans: Sequence[Levels]) -> None:
        different = list(dict.fromkeys(plans))
        self._plans = [different[i] for i in spread_order(len(different))]

    def ask(self) -> Levels | None:
        return self._plans.pop(0) if self._plans else None

    def tell(self, levels: Levels, metrics: Mapping[str, float]) -> None:
        """It does not listen."""


def spread_order(count: int) -> list[int]:
    """0 .. count - 1, any beginning of it evenly spread (van der Corput's sequence in base 2)."""
    bits = max(1, (count - 1).bit_length())
    reversed_bits = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(2**bits))
    return [i for i in reversed_bits if i < count]


def random_search(problem: Problem, trials: int, seed: int) -> Rival:
    """Every width at random."""
    import random

    generator = random.Random(seed)
    return Listed([problem.space.random(generator) for _ in range(trials)])


def uniform_ladder(problem: Problem, trials: int, seed: int) -> Rival:
    """One ratio for all layers, in `trials` steps: what people do by hand."""
    top = max(group.ratio(group.widths[-1]) for axis in problem.space.width_axes for group in axis.groups)
    return Listed([problem.space.uniform(top * (step + 1) / trials) for step in range(trials)])


def global_ranking(criterion: str) -> Callable[[Problem, int, int], Rival]:
    """One ranking of all channels, the lowest go, wherever they are.

    Taylor scores estimate a loss and are compared as they are (Molchanov et al. 2019); norms are first divided by their
    group's mean, as torch-pruning does it (`GroupNormImportance(normalizer="mean")`, `global_pruning=True`).
    """

    def rival(problem: Problem, trials: int, seed: int) -> Rival:
        scores = [np.asarray(s) / (1.0 if criterion == "taylor" else s.mean()) for s in problem.scores[criterion]]
        everything = np.sort(np.concatenate(scores))

        def plan(strength: float) -> Levels:
            threshold = everything[min(int(strength * len(everything)), len(everything) - 1)]
            ratios = [float((s < threshold).mean()) for s in scores]
            groups = [axis.groups[0] for axis in problem.space.width_axes]
            return tuple(g.widths.index(g.nearest(r)) for g, r in zip(groups, ratios, strict=True))

        return Listed(plans_by_cost(problem, plan, trials))

    return rival


def sensitivity_threshold(problem: Problem, trials: int, seed: int) -> Rival:
    """FastNAS's way: each layer as narrow as one threshold of lost accuracy allows, by bisection for each cost."""
    worst = [np.maximum.accumulate(losses) for losses in problem.losses]
    highest = max(float(losses[-1]) for losses in worst)

    def plan(strength: float) -> Levels:
        # Squared: most layers' curves lie near zero.
        return tuple(int(np.searchsorted(losses, strength**2 * highest, side="right")) - 1 for losses in worst)

    return Listed(plans_by_cost(problem, plan, trials))


def plans_by_cost(problem: Problem, plan: Callable[[float], Levels], count: int) -> list[Levels]:
    """Plans that leave evenly spaced shares of the multiply-adds, `plan` being heavier the greater its argument."""
    shares = np.linspace(LIGHTEST, HEAVIEST, count)
    found = []
    for share in shares:
        low, high = 0.0, 1.0
        for _ in range(_STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if problem.kept_macs(plan(middle)) > share else (low, middle)
        found.append(plan(high))
    return found


class OptunaTpe:
    """Ray's own OptunaSearch with Optuna's TPE over one ratio per layer, as people write it."""

    def __init__(self, problem: Problem, trials: int, seed: int) -> None:
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space = problem.space
        leaders = {axis.name: axis.groups[0] for axis in problem.space.width_axes}
        self._leaders = leaders
        ratios: dict[str, Any] = {
            name: optuna.distributions.FloatDistribution(g.ratio(g.widths[0]), g.ratio(g.widths[-1]))
            for name, g in leaders.items()
        }
        objectives = {"map50_95": "max", "cost": "min"}
        self._search = OptunaSearch(
            ratios,
            metric=list(objectives),
            mode=list(objectives.values()),
            sampler=optuna.samplers.TPESampler(seed=seed),
        )
        self._asked: dict[Levels, list[str]] = {}
        self._count = 0

    def ask(self) -> Levels | None:
        name = str(self._count)
        self._count += 1
        chosen: Any = self._search.suggest(name)
        levels = tuple(g.widths.index(g.nearest(float(chosen[axis]))) for axis, g in self._leaders.items())
        self._asked.setdefault(levels, []).append(name)
        return levels

    def tell(self, levels: Levels, metrics: Mapping[str, float]) -> None:
        self._search.on_trial_complete(self._asked[levels].pop(0), result=dict(metrics))


class Nsga2:
    """Optuna's NSGA-II, four generations, from a random population."""

    def __init__(self, problem: Problem, trials: int, seed: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        sampler = optuna.samplers.NSGAIISampler(seed=seed, population_size=max(4, trials // 4))
        self._study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
        self._distributions: dict[str, Any] = {
            name: optuna.distributions.IntDistribution(0, size - 1) for name, size in problem.space.sizes.items()
        }
        self._running: dict[Levels, list[Any]] = {}

    def ask(self) -> Levels | None:
        trial = self._study.ask(self._distributions)
        levels = tuple(trial.params[name] for name in self._distributions)
        self._running.setdefault(levels, []).append(trial)
        return levels

    def tell(self, levels: Levels, metrics: Mapping[str, float]) -> None:
        self._study.tell(self._running[levels].pop(0), [metrics["map50_95"], metrics["cost"]])


RIVALS: dict[str, Callable[[Problem, int, int], Rival]] = {
    "random": random_search,
    "uniform-ladder": uniform_ladder,
    "global-taylor": global_ranking("taylor"),
    "global-norm": global_ranking("l2"),
    "sensitivity-threshold": sensitivity_threshold,
    "ray-optuna-tpe": OptunaTpe,
    "nsga2": Nsga2,
}
"""Name in the table -> (problem, trials, seed) -> the rival."""
