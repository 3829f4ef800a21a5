"""What a run's trials say about the layers: which cost accuracy, which buy latency; and how the front grew.

An additive model, ratio by ratio, fitted to all trials of one fidelity. Importances of the usual kind (functional
ANOVA, PED-ANOVA) rank axes by spread of the outcome over the space; here the question is what a tenth of a layer's
channels costs and brings, in mAP and in milliseconds, with the uncertainty that some dozen trials leave. Both rank
alike where the outcome is about additive, and how well it is says `explained`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from results.accuracy import accuracy_name
from results.records import TrialRecord, TrialState
from results.selection import comparable

FEWEST_TRIALS = 8
TENTH = 0.1
TRUSTED = 0.3  # share of the spread foretold below which the layers' figures are called unreliable

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LayerInsight:
    """What removing a tenth of a layer's channels does, by the trials: mean and standard deviation.

    `accuracy_per_tenth` (mAP50-95 or top-1) and `latency_per_tenth_ms`: below 0 is a loss of accuracy, a gain in speed.
    `accuracy_share`, `latency_share`: of the modelled spread over the trials, in [0, 1], summing to 1 over all layers.
    """

    layer: str
    block: int | None
    mean_ratio: float
    accuracy_per_tenth: float
    accuracy_per_tenth_sd: float
    accuracy_share: float
    latency_per_tenth_ms: float
    latency_per_tenth_sd_ms: float
    latency_share: float


@dataclass(frozen=True)
class Insight:
    """All layers that the trials varied, those that cost most accuracy first.

    `accuracy_explained`, `latency_explained`: share of the spread that the additive model foretells for trials left out
    (at most 1; around 0 or below: the layers' figures mean nothing). `trials`: that it was fitted to.
    """

    layers: tuple[LayerInsight, ...]
    accuracy_explained: float
    latency_explained: float
    trials: int

    @property
    def reading(self) -> str:
        """How far the layers' figures can be trusted, in one or two sentences."""
        shares = {"accuracy": self.accuracy_explained, "latency": self.latency_explained}
        told = " and ".join(f"{max(0.0, share):.0%} of the spread in {name}" for name, share in shares.items())
        text = f"Layer by layer, the trials foretell {told} of trials left out."
        weak = [name for name, share in shares.items() if share < TRUSTED]
        return f"{text} The figures for {' and '.join(weak)} are not to be relied on." if weak else text


def insight(records: Sequence[TrialRecord], baseline: Mapping[str, Any]) -> Insight | None:
    """By the comparable trials and those that were stopped, for latency.

    None below `FEWEST_TRIALS` completed and measured ones, or where they all leave every layer whole.
    """
    trained = comparable(records)
    measured = [r for r in records if r.state is not TrialState.FAILED and r.number("latency_ms") is not None]
    leaders = _leaders(measured, baseline)
    if min(len(trained), len(measured)) < FEWEST_TRIALS or not leaders:
        return None
    name = accuracy_name(trained[0].metrics)
    accuracy = _fit(_ratios(trained, leaders), np.array([r.metrics[name] for r in trained]))
    latency = _fit(_ratios(measured, leaders), np.array([r.metrics["latency_ms"] for r in measured]))
    blocks = {row["layer"]: row.get("block") for row in baseline.get("layers") or []}
    means = _ratios(measured, leaders).mean(axis=0)
    layers = [
        LayerInsight(
            layer=layer, block=blocks.get(layer), mean_ratio=float(means[i]),
            accuracy_per_tenth=TENTH * float(accuracy.weights[i]), accuracy_share=float(accuracy.shares[i]),
            accuracy_per_tenth_sd=TENTH * float(accuracy.spreads[i]),
            latency_per_tenth_ms=TENTH * float(latency.weights[i]), latency_share=float(latency.shares[i]),
            latency_per_tenth_sd_ms=TENTH * float(latency.spreads[i]),
        )
        for i, layer in enumerate(leaders)
    ]  # fmt: skip
    ordered = tuple(sorted(layers, key=lambda item: item.accuracy_per_tenth))
    return Insight(ordered, accuracy.explained, latency.explained, len(trained))


@dataclass(frozen=True)
class _Fit:
    """Weights (d,) of the ratios, their standard deviations and shares, and the share of the spread foretold."""

    weights: Array
    spreads: Array
    shares: Array
    explained: float


def _fit(ratios: Array, values: Array) -> _Fit:
    """Bayesian ridge regression (Bishop, "Pattern Recognition and Machine Learning", section 3.5): the trials are often
    fewer than the layers, and the penalty is found from the data."""
    from sklearn.linear_model import BayesianRidge
    from sklearn.model_selection import KFold, cross_val_predict

    model = BayesianRidge().fit(ratios, values)
    spread = float(np.var(values))
    folds = KFold(min(10, len(values)), shuffle=True, random_state=0)
    left_out = cross_val_predict(BayesianRidge(), ratios, values, cv=folds)
    explained = 1.0 - float(np.mean((values - left_out) ** 2)) / spread if spread > 0 else 0.0
    parts = np.square(model.coef_) * ratios.var(axis=0)
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
