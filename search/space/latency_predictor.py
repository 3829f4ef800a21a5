"""The driver's latency model: fitted on the run's finished trials, derived from the records and kept nowhere else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.graph.geometry import NetworkGeometry
from paretoprune.pruning.latency.model import FEWEST_PLANS, MeasuredPlan, fit_latency_model
from paretoprune.pruning.plan import Plan
from paretoprune.results.store.records import FORETOLD, SOURCE, TrialRecord, speedup_interval
from paretoprune.search.space.prediction import LatencyPredictor, NoPredictor, Prediction
from paretoprune.search.storage.request import plan_of

if TYPE_CHECKING:
    from paretoprune.pruning.latency.model import LatencyModel, PredictionError

MOST_PLANS = 400  # the latest ones; a fit's time grows with the cube: some tens of milliseconds here
_REFIT_GROWTH = 1.25  # refit the scales when there are this many times more plans; else only the coefficients


class RecordPredictor:
    """Fitted anew at the first question after records came; silent below ``FEWEST_PLANS`` measured plans."""

    def __init__(self, geometry: NetworkGeometry) -> None:
        self._geometry = geometry
        self._plans: list[MeasuredPlan] = []
        self._model: LatencyModel | None = None
        self._fitted_at = 0  # plans at the last fit
        self._scaled_at = 0  # plans when the scales were found

    def learn(self, record: TrialRecord) -> None:
        """Take a trial's measured latency in; one without, or with layers of another model, is passed over."""
        plan = measured_plan(record)
        if plan is not None and self._fits(plan.plan):
            self._plans.append(plan)

    def predict(self, plan: Plan) -> Prediction | None:
        """None where too little was measured, or where the plan is not this model's."""
        model = self._fitted()
        if model is None or not self._fits(plan):
            return None
        found = model.predict([plan])
        return Prediction(*(float(figure[0]) for figure in (found.ratio, found.low, found.high, found.halfwidth)))

    @property
    def error(self) -> PredictionError | None:
        """The predictions' error, by leaving out each measured plan once; None if nothing is predicted."""
        model = self._fitted()
        return None if model is None else model.error

    def _fitted(self) -> LatencyModel | None:
        count = len(self._plans)
        if count == self._fitted_at:
            return self._model
        self._fitted_at = count
        if count >= FEWEST_PLANS:
            keep = self._model is not None and count < _REFIT_GROWTH * self._scaled_at
            scales = self._model.scales if keep and self._model is not None else None
            try:
                self._model = fit_latency_model(self._geometry, self._plans[-MOST_PLANS:], scales)
            except (PruningError, np.linalg.LinAlgError):  # the search goes on with what it knew before
                return self._model
            if scales is None:
                self._scaled_at = count
        return self._model

    def _fits(self, plan: Plan) -> bool:
        known = self._geometry
        return all(layer in known.layers for layer in plan.ratios) and set(known.branches).issuperset(plan.branches)


def measured_plan(record: TrialRecord) -> MeasuredPlan | None:
    """A record's plan with its measured latency ratio; None where it has none (it failed before, or was predicted)."""
    ratio = record.number("latency_ratio")
    if ratio is None or ratio <= 0 or record.metrics.get(SOURCE) == FORETOLD:
        return None
    low, high = speedup_interval(record.metrics) or (0.0, 0.0)
    return MeasuredPlan(plan_of(record), ratio, abs(high - low) / 2 * ratio)  # of the speed-up, 1 / ratio


def make_predictor(baseline: Mapping[str, Any], records: Iterable[TrialRecord] = ()) -> LatencyPredictor:
    """The predictor of a run from the content of ``baseline.json`` and its records.

    A baseline without a geometry (an older run's, a test's) gives one that knows nothing.
    """
    content = baseline.get("geometry")
    if not content:
        return NoPredictor()
    predictor = RecordPredictor(NetworkGeometry.from_json(content))
    for record in records:
        predictor.learn(record)
    return predictor
