"""Effect of each layer on the objectives, from a run's trials: which cost accuracy, which reduce latency or size.

An additive model, ratio by ratio, fitted to all trials of one fidelity. Importances of the usual kind (functional
ANOVA, PED-ANOVA) rank axes by spread of the outcome over the space; here the question is the effect of a tenth of a
layer's channels on each of the run's objectives, with the uncertainty that some dozen trials leave. Both rank alike if
the outcome is about additive; `explained` measures how additive it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paretoprune.base.image_size import area_of
from paretoprune.results.selection.selection import comparable
from paretoprune.results.store.objectives import DEFAULT_OBJECTIVES, direction, words
from paretoprune.results.store.records import TrialRecord, TrialState

FEWEST_TRIALS = 8
TENTH = 0.1
TRUSTED = 0.3  # share of the spread predicted below which the layers' figures are called unreliable

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Effect:
    """What removing a tenth of a layer's channels does to one objective, by the trials: mean and standard deviation.

    In the objective's unit: below 0 is a loss of accuracy, or a gain in latency, size or work. `share`: of the modelled
    spread over the trials, in [0, 1], summing to 1 over all layers.
    """

    per_tenth: float
    per_tenth_sd: float
    share: float


@dataclass(frozen=True)
class LayerInsight:
    """One layer, with its effect on each objective of the run."""

    layer: str
    block: int | None
    mean_ratio: float
    effects: Mapping[str, Effect]


@dataclass(frozen=True)
class Insight:
    """All layers that the trials varied, those that cost most of the first accuracy among the objectives first.

    `explained`: objective -> share of its spread that the additive model predicts for held-out trials (at most 1;
    around 0 or below: the layers' figures mean nothing). `trials`: completed ones that it was fitted to.
    """

    layers: tuple[LayerInsight, ...]
    explained: Mapping[str, float]
    trials: int

    @property
    def objectives(self) -> tuple[str, ...]:
        """The objectives of the effects, in the run's order."""
        return tuple(self.explained)

    @property
    def reading(self) -> str:
        """Reliability of the layers' effects, in one or two sentences."""
        told = " and ".join(
            f"{max(0.0, share):.0%} of the spread in {words(name)[0]}" for name, share in self.explained.items()
        )
        text = f"The layers' effects predict {told} of held-out trials."
        weak = [words(name)[0] for name, share in self.explained.items() if share < TRUSTED]
        return f"{text} The figures for {' and '.join(weak)} are not to be relied on." if weak else text


def insight(
    records: Sequence[TrialRecord], baseline: Mapping[str, Any], objectives: Sequence[str] = DEFAULT_OBJECTIVES
) -> Insight | None:
    """By the comparable trials and, for what epochs do not change, those that were stopped or beyond the bounds too.

    None below `FEWEST_TRIALS` completed ones, or where they all leave every layer whole.
    """
    trained = [r for r in comparable(records) if all(r.number(name) is not None for name in objectives)]
    alive = [record for record in records if record.state is not TrialState.FAILED]
    leaders = _leaders(alive, baseline)
    if len(trained) < FEWEST_TRIALS or not leaders:
        return None
    fits = {}
    for name in objectives:
        pairs = [(r, r.number(name)) for r in (trained if direction(name) == "max" else alive)]
        known = [(record, value) for record, value in pairs if value is not None]
        subjects = [record for record, _ in known]
        # What the input's size and the precision do must not be laid on the layers
        areas = np.array([[float(area_of(record.imgsz or baseline.get("imgsz") or 0))] for record in subjects])
        beside = areas / max(1.0, float(areas.max())) if np.ptp(areas) else np.empty((len(areas), 0))
        others = sorted({record.precision for record in subjects if record.precision})
        beside = np.hstack([beside, *([[float(r.precision == its)] for r in subjects] for its in others)])
        fits[name] = _fit(_ratios(subjects, leaders), np.array([value for _, value in known]), beside)
    blocks = {row["layer"]: row.get("block") for row in baseline.get("layers") or []}
    means = _ratios(alive, leaders).mean(axis=0)
    layers = [
        LayerInsight(layer, blocks.get(layer), float(means[i]), {name: fit.effect(i) for name, fit in fits.items()})
        for i, layer in enumerate(leaders)
    ]
    first = next((name for name in objectives if direction(name) == "max"), objectives[0])
    ordered = tuple(sorted(layers, key=lambda item: item.effects[first].per_tenth))
    return Insight(ordered, {name: fit.explained for name, fit in fits.items()}, len(trained))


@dataclass(frozen=True)
class _Fit:
    """Weights of the ratios, their standard deviations and shares, and the share of the spread predicted."""

    weights: Array
    spreads: Array
    shares: Array
    explained: float

    def effect(self, index: int) -> Effect:
        """Of one ratio."""
        return Effect(TENTH * float(self.weights[index]), TENTH * float(self.spreads[index]), float(self.shares[index]))


def _fit(ratios: Array, values: Array, beside: Array) -> _Fit:
    """`ratios` (n, d), `values` (n,), `beside` (n, k): what else explains them and is not told of. Bayesian ridge
    regression (Bishop, "Pattern Recognition and Machine Learning", section 3.5): the trials are often fewer than the
    layers, and the penalty is found from the data."""
    from sklearn.linear_model import BayesianRidge
    from sklearn.model_selection import KFold, cross_val_predict

    layers, ratios = ratios.shape[1], np.hstack([ratios, beside])
    model = BayesianRidge().fit(ratios, values)
    spread = float(np.var(values))
    folds = KFold(min(10, len(values)), shuffle=True, random_state=0)
    left_out = cross_val_predict(BayesianRidge(), ratios, values, cv=folds)
    explained = 1.0 - float(np.mean((values - left_out) ** 2)) / spread if spread > 0 else 0.0
    parts = (np.square(model.coef_) * ratios.var(axis=0))[:layers]
    total = float(parts.sum())
    shares = parts / total if total > 0 else np.zeros_like(parts)
    return _Fit(np.asarray(model.coef_), np.sqrt(np.diag(model.sigma_)), shares, explained)


def _leaders(records: Sequence[TrialRecord], baseline: Mapping[str, Any]) -> list[str]:
    """The first layer of every group that the trials vary; layers of one group move together and count once."""
    varied = {layer for record in records for layer in record.ratios}
    groups = [list(group["layers"]) for group in baseline.get("groups") or []]
    grouped = {layer for group in groups for layer in group}
    groups += [[layer] for layer in sorted(varied - grouped)]
    leaders = [next((layer for layer in group if layer in varied), None) for group in groups]
    return [layer for layer in leaders if layer is not None]


def _ratios(records: Sequence[TrialRecord], layers: Sequence[str]) -> Array:
    return np.array([[record.ratios.get(layer, 0.0) for layer in layers] for record in records])
