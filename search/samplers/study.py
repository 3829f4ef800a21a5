"""The Optuna study of a run: suggestions as levels of the space, every result added exactly once, no plan twice.

No Ray here: `search.sweep.tune_searcher` adapts it. The study lives in ``study.journal`` (optuna-dashboard opens it)
but is never the truth: it is rebuilt from the run's records at every start, so a driver that died leaves no trial
RUNNING.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from paretoprune.pruning.plan import Plan
from paretoprune.search.errors import TrialError
from paretoprune.search.samplers.initial_plans import PLAN
from paretoprune.search.samplers.observations import MAXIMIZED, VARIANCES, Observation
from paretoprune.search.samplers.prior import Prior
from paretoprune.search.samplers.warm_start import InitialPlan
from paretoprune.search.space.space import Levels, Space

if TYPE_CHECKING:
    import optuna

STUDY_NAME = "paretoprune"
MOST_REFUSALS = 20  # then a plan near the last one is tried all the same; it is measured, and not trained if too slow
FARTHEST = 10  # random steps an axis: then all plans were seen
RE_ASKS = 3  # a sampler that has converged repeats itself: after this many repeats a neighbour is taken instead


@dataclass(frozen=True)
class Suggestion:
    """A plan to evaluate. ``number`` is the study's own; ``provenance`` says who proposed it."""

    number: int
    levels: Levels
    provenance: str


class SearchStudy:
    """Asks and tells in the terms of a :class:`Space`.

    Values told are metrics; the directions come from ``results.store.objectives`` alone.
    With one trial at a time, equal seeds give equal suggestions.
    """

    def __init__(
        self,
        space: Space,
        objectives: Mapping[str, str],
        sampler: str = "gp",
        seed: int = 0,
        starts: Sequence[InitialPlan] = (),
        journal: Path | None = None,
        refusal: Callable[[Plan], str] | None = None,
        prior: Prior | None = None,
    ) -> None:
        """``objectives``: name -> "max" or "min", in order. ``journal``: file, replaced; None keeps it in memory.

        ``refusal``: why a plan is not worth trying; "" where it is. ``prior``: see there; our sampler begins with it.
        """
        import optuna

        from paretoprune.search.samplers.factory import make_sampler

        self._space = space
        self._objectives = dict(objectives)
        self._starts = list(starts)
        self._refusal = refusal or (lambda plan: "")
        self._generator = random.Random(seed)
        self._sampler_name = sampler
        self._seen: set[Levels] = set()
        self._running: dict[int, optuna.Trial] = {}
        self._distributions: dict[str, optuna.distributions.IntDistribution] = {
            name: optuna.distributions.IntDistribution(0, size - 1) for name, size in space.sizes.items()
        }
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self.study = optuna.create_study(
                study_name=STUDY_NAME,
                storage=_journal_storage(journal),
                sampler=make_sampler(
                    sampler, self._distributions, space, seed, max(2, len(self._starts) + 1), prior or Prior()
                ),
                directions=["maximize" if way == MAXIMIZED else "minimize" for way in self._objectives.values()],
            )

    def replay(self, levels: Levels, told: Observation | None, trial_id: str) -> None:
        """Tell a trial that finished earlier, None for a failed one. Its plan is not asked again."""
        import optuna

        values = None if told is None else self._values(told.metrics)
        self._seen.add(levels)
        self.study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.COMPLETE if values else optuna.trial.TrialState.FAIL,
                values=values,
                params=self._params(levels),
                distributions=dict(self._distributions),
                user_attrs={"trial_id": trial_id, "provenance": "replayed", **self._variances(told)},
                constraints=dict(told.constraints) if told else None,
            )
        )

    def skip(self, levels: Levels) -> None:
        """Never ask for this plan: what it gives is measured elsewhere."""
        self._seen.add(levels)

    def ask(self, trial_id: str = "") -> Suggestion | None:
        """The next plan that was not asked before and is not refused: the warm start first; None when every plan of the
        space was. Plans that the user gave are never refused.

        ``trial_id`` is noted in the study, so that a dashboard and the records can be read together.
        """
        while self._starts:
            start = self._starts.pop(0)
            levels = start.revised(self._accuracies()) if start.revised else start.levels
            refused = start.provenance != PLAN and self._refusal(self._space.plan(levels))
            if levels not in self._seen and not refused:
                return self.ask_for(levels, start.provenance, trial_id)
        if len(self._seen) >= self._space.count():
            return None
        repeats = refusals = 0
        while repeats < RE_ASKS and refusals < MOST_REFUSALS:
            trial = self.study.ask(dict(self._distributions))
            levels = self._space.canonical(tuple(trial.params[axis.name] for axis in self._space.axes))
            refused = "" if levels in self._seen else self._refusal(self._space.plan(levels))
            if levels not in self._seen and not refused:
                return self._start(trial, levels, self._sampler_name, trial_id)
            repeats, refusals = (repeats, refusals + 1) if refused else (repeats + 1, refusals)
            self._seen.add(levels)
            self._drop(trial, refused or "equal plan was evaluated before")
        near = self._unseen_near(levels)
        return None if near is None else self.ask_for(near, "random", trial_id)

    def ask_for(self, levels: Levels, provenance: str, trial_id: str = "") -> Suggestion:
        """Start a trial of exactly these levels (warm start, a trial that another driver left unfinished)."""
        self.study.enqueue_trial(self._params(levels))
        return self._start(self.study.ask(dict(self._distributions)), levels, provenance, trial_id)

    def tell(self, number: int, told: Observation) -> None:
        """Finish a trial; :class:`TrialError` (and FAIL in the study) where an objective is not finite."""
        import optuna

        trial = self._running.pop(number)
        try:
            values = self._values(told.metrics)
        except TrialError:
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
            raise
        for name, value in self._variances(told).items():
            trial.set_user_attr(name, value)
        for name, violation in told.constraints.items():
            trial.set_constraint(name, violation)
        self.study.tell(trial, values)

    def fail(self, number: int, reason: str) -> None:
        """Finish a trial as failed; the sampler learns nothing from it, its plan is not asked again."""
        self._drop(self._running.pop(number), reason)

    def close(self) -> None:
        """Fail what still runs: a trial left RUNNING would be waited for by every sampler for ever."""
        for number in list(self._running):
            self.fail(number, "the sweep ended before this trial")

    def _start(self, trial: optuna.Trial, levels: Levels, provenance: str, trial_id: str) -> Suggestion:
        self._seen.add(levels)
        trial.set_user_attr("trial_id", trial_id)
        trial.set_user_attr("provenance", provenance)
        self._running[trial.number] = trial
        return Suggestion(trial.number, levels, provenance)

    def _drop(self, trial: optuna.Trial, reason: str) -> None:
        import optuna

        trial.set_user_attr("reason", reason)
        self.study.tell(trial, state=optuna.trial.TrialState.FAIL)

    def _unseen_near(self, levels: Levels) -> Levels | None:
        """A plan not seen yet, as few random steps from ``levels`` as were found; None where none was."""
        for steps in range(1, FARTHEST * len(levels)):
            for _ in range(20 * len(levels)):
                near = list(levels)
                for _ in range(steps):
                    index = self._generator.randrange(len(near))
                    near[index] += self._generator.choice((-1, 1))
                candidate = self._space.canonical(
                    tuple(min(max(level, 0), axis.size - 1) for level, axis in zip(near, self._space.axes, strict=True))
                )
                if candidate not in self._seen:
                    return candidate
        return None

    def _params(self, levels: Levels) -> dict[str, int]:
        return {axis.name: level for axis, level in zip(self._space.axes, levels, strict=True)}

    def _accuracies(self) -> dict[Levels, float]:
        """Of all plans that are known; empty where no objective is one."""
        way = next((i for i, way in enumerate(self._objectives.values()) if way == MAXIMIZED), None)
        done = [trial for trial in self.study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
        return (
            {} if way is None else {tuple(t.params[name] for name in self._distributions): t.values[way] for t in done}
        )

    def _variances(self, told: Observation | None) -> dict[str, list[float]]:
        if told is None or not told.variances:
            return {}
        return {VARIANCES: [float(told.variances.get(name, 0.0)) for name in self._objectives]}

    def _values(self, metrics: Mapping[str, object]) -> list[float]:
        values = []
        for name in self._objectives:
            value = metrics.get(name)
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise TrialError(f"the objective {name} must be a finite number, got {value!r}")
            values.append(float(value))
        return values


def _journal_storage(journal: Path | None) -> optuna.storages.BaseStorage:
    from optuna.storages import InMemoryStorage, JournalStorage

    from paretoprune.search.samplers.journal import SingleWriterJournalBackend

    if journal is None:
        return InMemoryStorage()
    # A driver killed while writing leaves its lock behind; the run folder's own lock says that none is alive now.
    for leftover in journal.parent.glob(journal.name + "*"):
        leftover.unlink()
    return JournalStorage(SingleWriterJournalBackend(journal))
