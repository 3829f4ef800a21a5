"""Samplers by name: ours and Optuna's."""

from __future__ import annotations

from collections.abc import Mapping

import optuna
from optuna.distributions import IntDistribution

from paretoprune.search.samplers.features import PlanFeatures
from paretoprune.search.samplers.gp_sampler import GPHypervolumeSampler
from paretoprune.search.samplers.prior import Prior
from paretoprune.search.space.space import Space


def make_sampler(
    name: str,
    distributions: Mapping[str, IntDistribution],
    space: Space,
    seed: int,
    startup: int,
    prior: Prior,
) -> optuna.samplers.BaseSampler:
    """A sampler by name. ``startup``: finished trials before a model-based one stops drawing randomly."""
    samplers = optuna.samplers
    if name == "gp":
        return GPHypervolumeSampler(distributions, PlanFeatures.of(space, prior), seed, prior.path)
    if name == "optuna-gp":
        return samplers.GPSampler(seed=seed, n_startup_trials=startup)
    if name == "tpe":
        return samplers.TPESampler(
            seed=seed, n_startup_trials=startup, multivariate=True, group=True, constant_liar=True
        )
    if name == "nsga2":
        return samplers.NSGAIISampler(seed=seed, population_size=20)
    assert name == "random", name
    return samplers.RandomSampler(seed=seed)
