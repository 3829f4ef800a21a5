"""Our sampler behind Optuna's interface: :mod:`search.samplers.candidates` asked with what the study knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from paretoprune.search.samplers.candidates import CandidateGenerator, Evidence, Whole
from paretoprune.search.samplers.features import PlanFeatures
from paretoprune.search.samplers.observations import VARIANCES

FEWEST = 2  # finished trials; on the synthetic problem the model does as well from the start as after random plans


class GPHypervolumeSampler(BaseSampler):
    """Suggests whole-numbered parameters, each from 0 to its size - 1; at random until two trials have finished.

    One belongs to one study.
    """

    def __init__(
        self, distributions: Mapping[str, IntDistribution], features: PlanFeatures, seed: int, path: Whole
    ) -> None:
        self._distributions = dict(distributions)
        self._proposer = CandidateGenerator(features, seed, path)
        self._fallback = RandomSampler(seed=seed)
        self._known: dict[int, tuple[int, ...]] = {}  # levels by trial: they do not change, and trials become many

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All axes at once."""
        return dict(self._distributions)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The proposal; nothing at the beginning, and nothing for a plan that was given (a warm start's)."""
        if "fixed_params" in trial.system_attrs:
            return {}
        others = [item for item in study.get_trials(deepcopy=False) if item.number != trial.number]
        finished = [item for item in others if item.state is TrialState.COMPLETE]
        if len(finished) < FEWEST:
            return {}
        taken = {self._levels(item) for item in others if len(item.params) == len(self._distributions)}
        running = [item for item in others if item.state is TrialState.RUNNING and item.params]
        levels = self._proposer.propose(self._evidence(study, finished, running), taken)
        return dict(zip(self._distributions, levels, strict=True))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """At random."""
        return self._fallback.sample_independent(study, trial, param_name, param_distribution)

    def _evidence(self, study: Study, finished: list[FrozenTrial], running: list[FrozenTrial]) -> Evidence:
        signs = np.array([-1.0 if way == StudyDirection.MAXIMIZE else 1.0 for way in study.directions])
        names = sorted({name for item in finished for name in item.constraints})
        width = len(self._distributions)
        return Evidence(
            levels=np.array([self._levels(item) for item in finished], dtype=np.int64),
            losses=np.array([item.values for item in finished]) * signs,
            variances=np.array([item.user_attrs.get(VARIANCES) or [0.0] * len(signs) for item in finished]),
            # A trial without a constraint (the unpruned model of an old run) is taken to keep it just so.
            violations=np.array([[item.constraints.get(name, 0.0) for name in names] for item in finished]).reshape(
                len(finished), len(names)
            ),
            pending=np.array([self._levels(item) for item in running], dtype=np.int64).reshape(-1, width),
            accuracies=np.flatnonzero(signs < 0).tolist(),
        )

    def _levels(self, trial: FrozenTrial) -> tuple[int, ...]:
        """Of a trial that has all its parameters."""
        if trial.number not in self._known:
            self._known[trial.number] = tuple(trial.params[name] for name in self._distributions)
        return self._known[trial.number]
