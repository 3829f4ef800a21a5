"""The Gaussian process: its gradient, its posterior against the textbook formula, and what it can learn."""

from __future__ import annotations

import random

import numpy as np
import pytest
from scipy.optimize import check_grad

from paretoprune.search.config.sections import SpaceSection
from paretoprune.search.samplers.features import PlanFeatures
from paretoprune.search.samplers.gaussian_process import (
    FeatureMatrix,
    Surrogate,
    _kernel,
    _objective,
    _priors,
    fit_hyperparameters,
)
from paretoprune.search.space.space import build_space
from tests.search.fakes import make_table

WIDTHS = [(tuple(range(64, 16, -8)), 64), (tuple(range(96, 24, -8)), 96), ((32, 24, 16), 32)]
FEATURES = PlanFeatures.of_widths(WIDTHS)


def plans(count: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.stack([random.integers(0, size, count) for size in FEATURES.sizes], axis=1)


def some_hyper(design: FeatureMatrix, seed: int = 0) -> np.ndarray:
    means, spreads, _ = _priors(design)
    return means + 0.3 * spreads * np.random.default_rng(seed).normal(size=len(means))


def test_features_are_fractions_kept_and_whole_tiles() -> None:
    features = PlanFeatures.of_widths([((32, 24, 16, 8), 32)])
    assert features.kept[0].tolist() == [1.0, 0.75, 0.5, 0.25]
    assert features.tiled[0].tolist() == [1.0, 1.0, 0.5, 0.5]
    assert features.design(np.array([[0], [3]])).points[:, 0].tolist() == [1.0, 0.0]


def test_what_a_convolution_costs_goes_with_the_inputs_area() -> None:
    """Latency of widths and sizes in the synthetic law is learned from few plans, and foretold at all sizes."""
    space = build_space(make_table(4, channels=128), SpaceSection(), sizes=(320, 256, 192))
    features = PlanFeatures.of(space)
    assert features.sizes == tuple(axis.size for axis in space.axes)
    assert features.areas.tolist() == pytest.approx([1.0, 0.64, 0.36])
    random = np.random.default_rng(0)
    levels, unseen = (
        np.stack([random.integers(0, size, count) for size in features.sizes], axis=1) for count in (30, 60)
    )

    def latency(levels: np.ndarray) -> np.ndarray:
        tiles = np.stack([features.tiled[i][levels[:, i]] for i in range(4)], axis=1)
        return 0.1 + features.areas[levels[:, 4]] * (tiles[:, 0] * tiles[:, 1] + tiles[:, 2] * tiles[:, 3])

    design = features.design(levels)
    hyper = fit_hyperparameters(design, latency(levels), np.zeros(30))
    mean, _ = Surrogate(design, latency(levels), np.zeros(30), hyper).predict(features.design(unseen))
    assert np.abs(mean - latency(unseen)).mean() < 0.05 * latency(unseen).std()


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_is_the_slope(seed: int) -> None:
    design = FEATURES.design(plans(12, seed))
    target = np.random.default_rng(seed).normal(size=12)
    extra = np.linspace(0.0, 0.1, 12)
    means, spreads, _ = _priors(design)
    rest = (design, target, extra, means, spreads)
    error = check_grad(
        lambda hyper: _objective(hyper, *rest)[0], lambda hyper: _objective(hyper, *rest)[1], some_hyper(design, seed)
    )
    assert error < 1e-4


def test_the_posterior_is_the_textbooks() -> None:
    levels, values = plans(15), np.random.default_rng(1).normal(3.0, 2.0, 15)
    known, asked = FEATURES.design(levels), FEATURES.design(plans(5, seed=9))
    extra, hyper = np.full(15, 0.2), some_hyper(known)
    mean, spread = Surrogate(known, values, extra, hyper).predict(asked)
    scale = values.std()
    matrix = _kernel(known, known, hyper)[0] + np.diag(np.exp(hyper[-1]) + 1e-8 + extra / scale**2)
    cross = _kernel(asked, known, hyper)[0]
    assert mean == pytest.approx(values.mean() + cross @ np.linalg.solve(matrix, values - values.mean()))
    covariance = _kernel(asked, asked, hyper)[0] - cross @ np.linalg.solve(matrix, cross.T)
    assert spread == pytest.approx(scale * np.sqrt(np.diag(covariance)))


def test_an_uncertain_value_pulls_less() -> None:
    levels = plans(10)
    values = np.zeros(10)
    values[0] = 10.0
    design = FEATURES.design(levels)
    hyper = some_hyper(design)
    at = FEATURES.design(levels[:1])
    sure, _ = Surrogate(design, values, np.zeros(10), hyper).predict(at)
    doubtful, _ = Surrogate(design, values, np.array([100.0] + [0.0] * 9), hyper).predict(at)
    assert doubtful[0] < 0.5 * sure[0]


def test_a_staircase_with_products_is_learned_from_few_plans() -> None:
    def latency(levels: np.ndarray) -> np.ndarray:
        tiles = np.stack([np.ceil(np.array(widths)[levels[:, i]] / 16) for i, (widths, _) in enumerate(WIDTHS)], axis=1)
        return 3.0 * tiles[:, 0] * tiles[:, 1] + 2.0 * tiles[:, 1] * tiles[:, 2] + tiles[:, 0]

    levels, unseen = plans(30), plans(60, seed=5)
    design = FEATURES.design(levels)
    hyper = fit_hyperparameters(design, latency(levels), np.zeros(30))
    mean, _ = Surrogate(design, latency(levels), np.zeros(30), hyper).predict(FEATURES.design(unseen))
    assert np.abs(mean - latency(unseen)).mean() < 0.03 * latency(unseen).std()


def test_equal_values_everywhere_are_no_trouble() -> None:
    design = FEATURES.design(plans(8))
    values = np.full(8, 0.6)
    hyper = fit_hyperparameters(design, values, np.zeros(8))
    mean, spread = Surrogate(design, values, np.zeros(8), hyper).predict(design)
    assert mean == pytest.approx(values)
    assert np.isfinite(spread).all()


def test_the_surrogate_learns_that_each_precision_costs_something_else() -> None:
    """In bf16 a plan takes three fifths of its time, in int8 two fifths: a product, which linear features lack."""
    space = build_space(make_table(4), SpaceSection(), sizes=(320, 256), precisions=("fp32", "bf16", "int8"))
    features = PlanFeatures.of(space)
    assert features.sizes == tuple(space.sizes.values())
    generator = random.Random(0)
    plans = np.array([space.random(generator) for _ in range(120)])
    kept = 1 - plans[:, :4] / 8  # widths in steps of 8 of 64 channels
    area = np.array([1.0, 0.64])[plans[:, 4]]
    cost = np.array([1.0, 0.6, 0.4])[plans[:, 5]] * area * (kept[:, 1:] * kept[:, :-1]).sum(axis=1)
    design, others = features.design(plans[:60]), features.design(plans[60:])
    extra = np.zeros(60)
    surrogate = Surrogate(design, cost[:60], extra, fit_hyperparameters(design, cost[:60], extra))
    found, _ = surrogate.predict(others)
    assert np.median(np.abs(found / cost[60:] - 1)) < 0.03
