"""The latency model against devices of known laws, and against brute force."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping

import numpy as np
import pytest

from paretoprune.pruning.errors import PlanError, PruningError
from paretoprune.pruning.graph.geometry import FloatArray, NetworkGeometry
from paretoprune.pruning.graph.geometry_reading import read_geometry
from paretoprune.pruning.latency.model import MeasuredPlan, fit_latency_model
from paretoprune.pruning.plan import Plan
from paretoprune.pruning.surgery.layer_table import build_layer_table
from tests.pruning.masking import build

Law = Callable[[NetworkGeometry, FloatArray], FloatArray]


@pytest.fixture(scope="module")
def geometry() -> NetworkGeometry:
    model = build("yolov8n")
    return read_geometry(model, build_layer_table(model), 64)


def random_plans(geometry: NetworkGeometry, count: int, seed: int) -> list[dict[str, float]]:
    rng = np.random.default_rng(seed)
    plans = []
    for _ in range(count):
        level = rng.uniform(0, 0.6)
        ratios = {g.name: 1 - max(8, 8 * round(g.channels * (1 - rng.uniform(0, level)) / 8)) / g.channels
                  for g in geometry.groups}  # fmt: skip
        plans.append({g.layers[0]: max(0.0, ratios[g.name]) for g in geometry.groups})
    return plans


def uneven_cpu(geometry: NetworkGeometry, shares: FloatArray) -> FloatArray:
    """Every layer has a speed of its own, up to threefold apart, and so have its activations; a tenth is overhead."""
    rng = np.random.default_rng(5)
    macs = geometry.macs(shares) * rng.uniform(1, 3, len(geometry.convs))
    written = (
        geometry.widths(shares)[0] * [c.out_pixels for c in geometry.convs] * rng.uniform(1, 3, len(geometry.convs))
    )
    return np.asarray(0.1 * 6e7 + macs.sum(axis=1) + 20 * written.sum(axis=1))


def launch_bound_gpu(geometry: NetworkGeometry, shares: FloatArray) -> FloatArray:
    """Hardly anything but launches."""
    return np.asarray(1 + 0.03 * geometry.macs(shares).sum(axis=1) / geometry.macs(np.ones_like(shares)).sum(axis=1))


def staircase(geometry: NetworkGeometry, shares: FloatArray) -> FloatArray:
    """Widths cost as much as the next multiple of 16."""
    outputs, _ = geometry.widths(shares)
    return np.asarray((geometry.macs(shares) * np.ceil(outputs / 16) * 16 / outputs).sum(axis=1))


def measured(
    geometry: NetworkGeometry, law: Law, count: int, seed: int, noise: float = 0.01
) -> tuple[list[MeasuredPlan], FloatArray]:
    """Plans measured on the device of `law`, and their true ratios."""
    plans = random_plans(geometry, count, seed)
    true = law(geometry, geometry.shares(plans)) / law(geometry, geometry.shares([{}]))
    seen = true * np.exp(np.random.default_rng(seed + 1).normal(0, noise, count))
    return [MeasuredPlan(Plan(p), float(y), 1.96 * noise) for p, y in zip(plans, seen, strict=True)], true


def whole_predict(geometry: NetworkGeometry, shares: FloatArray) -> FloatArray:
    """Beside the network what no width changes, 0.6 of the unpruned one: pre- and post-processing."""
    return uneven_cpu(geometry, shares) + 0.6 * uneven_cpu(geometry, np.ones((1, shares.shape[1])))


@pytest.mark.parametrize("law", [uneven_cpu, launch_bound_gpu, staircase, whole_predict])
def test_it_foretells_plans_it_has_not_seen(geometry: NetworkGeometry, law: Law) -> None:
    known, _ = measured(geometry, law, 40, seed=0)
    others, true = measured(geometry, law, 100, seed=9)
    model = fit_latency_model(geometry, known)
    foretold = model.predict([plan.plan for plan in others])
    assert np.median(np.abs(foretold.ratio / true - 1)) < 0.015
    seen = np.array([plan.latency_ratio for plan in others])
    covered = (foretold.low <= seen) & (seen <= foretold.high)
    assert covered.mean() > 0.9
    assert np.median((foretold.high - foretold.low) / foretold.ratio) < 0.12
    assert model.error.plans == 40
    assert model.error.median < 0.02
    assert model.error.median < model.error.p95 < 0.06


@pytest.mark.parametrize("law", [uneven_cpu, launch_bound_gpu, staircase])
def test_the_latency_itself_is_known_better_than_one_measurement_tells(geometry: NetworkGeometry, law: Law) -> None:
    """With measurements as blurred as a busy machine's, thirty of them know more than one."""
    noise = 0.04
    known, _ = measured(geometry, law, 30, seed=0, noise=noise)
    others, true = measured(geometry, law, 200, seed=9, noise=noise)
    foretold = fit_latency_model(geometry, known).predict([plan.plan for plan in others])
    assert (np.abs(true / foretold.ratio - 1) <= foretold.halfwidth).mean() > 0.9
    seen = np.array([plan.latency_ratio for plan in others])
    assert ((foretold.low <= seen) & (seen <= foretold.high)).mean() > 0.9
    assert np.median(foretold.halfwidth) < 1.96 * noise
    assert (foretold.halfwidth * foretold.ratio <= (foretold.high - foretold.low) / 2 + 1e-9).all()


def test_each_precision_has_speeds_of_its_own(geometry: NetworkGeometry) -> None:
    """int8 makes the convolutions three times as fast, all else a fifth slower. Of what was never measured it says that
    it does not know."""
    fp32, _ = measured(geometry, uneven_cpu, 20, seed=0)
    base = float(uneven_cpu(geometry, geometry.shares([{}]))[0])

    def in_int8(plans: list[dict[str, float]]) -> FloatArray:
        whole = uneven_cpu(geometry, geometry.shares(plans))
        macs = geometry.macs(geometry.shares(plans)).sum(axis=1)
        return np.asarray((1.2 * (whole - macs) + macs / 3) / base)

    plans, others = random_plans(geometry, 20, seed=3), random_plans(geometry, 60, seed=9)
    noise = np.exp(np.random.default_rng(1).normal(0, 0.01, 20))
    int8 = [
        MeasuredPlan(Plan(plan, precision="int8"), float(ratio), 0.0196)
        for plan, ratio in zip(plans, in_int8(plans) * noise, strict=True)
    ]
    model = fit_latency_model(geometry, [*fp32, *int8])
    foretold = model.predict([Plan(plan, precision="int8") for plan in others])
    assert np.median(np.abs(foretold.ratio / in_int8(others) - 1)) < 0.02
    wide, known = model.predict([Plan(others[0], precision="fp16")]), model.predict([Plan(others[0])])
    assert wide.halfwidth[0] > 5 * known.halfwidth[0]


def test_a_device_that_is_bound_by_launches_is_foretold_flat(geometry: NetworkGeometry) -> None:
    known, _ = measured(geometry, launch_bound_gpu, 20, seed=0, noise=0.003)
    half = {layer: 0.5 for group in geometry.groups for layer in group.layers}
    foretold = fit_latency_model(geometry, known).predict([Plan({}), Plan(half)])
    assert foretold.ratio == pytest.approx([1.0, 0.98], abs=0.01)


def test_the_error_is_that_of_leaving_each_plan_out(geometry: NetworkGeometry) -> None:
    known, _ = measured(geometry, uneven_cpu, 12, seed=3, noise=0.02)
    model = fit_latency_model(geometry, known)
    errors = []
    for i, plan in enumerate(known):
        without = fit_latency_model(geometry, known[:i] + known[i + 1 :], scales=model.scales)
        errors.append(abs(float(without.predict([plan.plan]).ratio[0]) / plan.latency_ratio - 1))
    assert model.error.median == pytest.approx(np.median(errors), rel=1e-6)
    assert model.error.p95 == pytest.approx(np.quantile(errors, 0.95), rel=1e-6)
    assert str(model.error) == (
        f"{np.median(errors):.1%} median, {np.quantile(errors, 0.95):.1%} 95th percentile, "
        "over 12 plans, each left out once"
    )


def test_a_doubtful_measurement_counts_less(geometry: NetworkGeometry) -> None:
    known, _ = measured(geometry, uneven_cpu, 20, seed=0)
    wrong, sure = known[0].plan, known[1:]
    off = 1.3 * known[0].latency_ratio

    def foretold(halfwidth: float) -> float:
        model = fit_latency_model(geometry, [MeasuredPlan(wrong, off, halfwidth), *sure])
        return float(model.predict([wrong]).ratio[0])

    assert abs(foretold(0.5) - known[0].latency_ratio) < 0.5 * abs(foretold(0.001) - known[0].latency_ratio)


def test_far_from_what_was_measured_the_interval_is_wider(geometry: NetworkGeometry) -> None:
    light, _ = measured(geometry, uneven_cpu, 30, seed=0)
    heavy: Mapping[str, float] = {layer: 0.875 for g in geometry.groups if g.channels >= 64 for layer in g.layers}
    found = fit_latency_model(geometry, light).predict([light[0].plan, Plan(heavy)])
    halfwidth = (found.high - found.low) / 2
    assert halfwidth[1] > 2 * halfwidth[0]
    assert (found.low > 0).all()


def test_what_cannot_be_fitted_says_so(geometry: NetworkGeometry) -> None:
    known, _ = measured(geometry, uneven_cpu, 8, seed=0)
    with pytest.raises(PruningError, match="needs at least 6 measured plans, but got 5"):
        fit_latency_model(geometry, known[:5])
    with pytest.raises(PruningError, match=r"must be a positive number, but got 0\.0"):
        fit_latency_model(geometry, [*known, MeasuredPlan(Plan({}), 0.0)])
    with pytest.raises(PlanError, match=r"model\.99"):
        fit_latency_model(geometry, known).predict([Plan({"model.99": 0.1})])


def test_it_needs_no_torch() -> None:
    """The driver of a search foretells plans."""
    code = "import sys, paretoprune.pruning.latency.model; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
