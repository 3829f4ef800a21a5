"""A network cut to a share of its multiply-adds or parameters: what each block lost, and a speed that is predicted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from paretoprune.pruning.budget.budget import Budget, Cut, budget_for_speedup, cut_to, predicted_at
from paretoprune.pruning.builtin import BASELINE
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.importance.allocation import Unit
from paretoprune.pruning.latency.model import LatencyModel, MeasuredPlan, fit_latency_model
from paretoprune.pruning.plan import Plan
from paretoprune.pruning.surgery.layer_table import build_layer_table
from paretoprune.pruning.workbench import Workbench
from tests.pruning.recovery_material import shapes_dataset

pytestmark = pytest.mark.slow

IMGSZ = 64


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    """With scores drawn by lot, as a criterion of one scale for all layers gives them."""
    data = shapes_dataset(tmp_path_factory.mktemp("budget") / "shapes", train=4)
    bench = Workbench(str(BASELINE), str(data), IMGSZ, calibration_images=4, importance="taylor")
    bench.scores = np.random.default_rng(0).random(bench.table.class_count)
    return bench


@pytest.fixture(scope="module")
def cut(bench: Workbench) -> Cut:
    return cut_to(bench, Budget(0.4), recover="bn")


def test_the_blocks_add_up_to_the_network(bench: Workbench, cut: Cut) -> None:
    """Channels and multiply-adds as the cut network itself has them; the loss is that of the removed channels."""
    after = build_layer_table(cut.model)
    own = Workbench(str(BASELINE), imgsz=IMGSZ, importance="l2")
    own.model, own.table = cut.model, after
    macs = {cost.name: cost.amount for cost in own.conv_costs}
    assert sum(block.macs for block in cut.blocks) == pytest.approx(sum(macs.values()), rel=1e-9)
    assert cut.macs_kept == pytest.approx(sum(macs.values()) / sum(c.amount for c in bench.conv_costs))
    params = [sum(p.numel() for p in model.parameters()) for model in (bench.model, cut.model)]
    assert cut.params_kept == pytest.approx(params[1] / params[0], rel=1e-12)
    for block in cut.blocks:
        convs = [n for n in after.convs if after.by_name[after.layer_of[n]].block == block.block and n in macs]
        assert block.channels == sum(len(after.convs[n].outputs) for n in convs)
        assert block.macs == pytest.approx(sum(macs[n] for n in convs))
    assert [block.kind for block in cut.blocks[-2:]] == ["C2f", "Detect"]


def test_the_loss_of_a_cut_in_one_step_is_that_of_the_channels_removed(bench: Workbench) -> None:
    cut = cut_to(bench, Budget(0.9), recover="none")
    removed = np.ones(bench.table.class_count, dtype=bool)
    for name, channels in bench.table.convs.items():
        removed[channels.outputs[list(cut.plan.kept.get(name, range(len(channels.outputs))))]] = False
    of_a_layer = np.unique(np.concatenate([part for group in bench.table.groups for part in group.parts]))
    expected = bench.loss_scores[of_a_layer][removed[of_a_layer]].sum()
    assert sum(block.loss for block in cut.blocks) == pytest.approx(expected)


@pytest.mark.parametrize("unit", ["macs", "params"])
def test_the_budget_is_met_within_a_step(bench: Workbench, unit: Unit) -> None:
    cut = cut_to(bench, Budget(0.6, unit), recover="none")
    kept = cut.macs_kept if unit == "macs" else cut.params_kept
    assert 0.59 < kept <= 0.6
    with torch.no_grad():
        assert torch.isfinite(cut.model(torch.zeros(1, 3, IMGSZ, IMGSZ))[0]).all()


def test_what_it_does_is_said_in_order(bench: Workbench) -> None:
    said: list[str] = []
    cut_to(bench, Budget(0.9), recover="bn", report=said.append)
    begins = ["reading 4 calibration", "scoring channels on 4", "cutting", "recovering"]
    places = [next(i for i, line in enumerate(said) if line.startswith(begin)) for begin in begins]
    assert places == sorted(places)


@pytest.mark.parametrize("share", [0.0, 1.01, -1.0, float("nan")])
def test_a_share_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(PruningError, match=r"parameters to keep must lie in \(0, 1\], but got"):
        Budget(share, "params")


def test_out_of_reach_says_what_the_narrowest_widths_leave(bench: Workbench) -> None:
    with pytest.raises(
        PruningError, match=r"the narrowest widths \(multiples of 8\) leave 0\.\d+; keep more"
    ) as caught:
        cut_to(bench, Budget(0.01), recover="none")
    least = float(str(caught.value).split("leave ")[1].split(";")[0])
    assert bench.allocated(least * 1.001) is not None
    assert bench.allocated(least * 0.999) is None


@pytest.fixture(scope="module")
def model(bench: Workbench) -> LatencyModel:
    """Of a machine on which latency is 0.3 + 0.7 times the multiply-adds."""
    geometry, random, plans = bench.geometry, np.random.default_rng(0), []
    for share in np.linspace(0.1, 0.95, 12):
        ratios = bench.allocated(float(share)) or {}
        shaken = {layer: float(np.clip(r + random.normal(0, 0.02), 0, 0.95)) for layer, r in ratios.items()}
        macs = geometry.macs(geometry.shares([{}, shaken])).sum(axis=1)
        plans.append(MeasuredPlan(Plan(shaken), float(0.3 + 0.7 * macs[1] / macs[0]), 0.005))
    return fit_latency_model(geometry, plans)


@pytest.mark.parametrize("speedup", [1.2, 1.7])
def test_a_speed_is_reached_by_the_largest_share_that_predicts_it(
    bench: Workbench, model: LatencyModel, speedup: float
) -> None:
    budget = budget_for_speedup(bench, model, speedup)
    assert 1 / float(predicted_at(bench, model, budget.share).ratio[0]) >= speedup
    assert budget.share == pytest.approx((1 / speedup - 0.3) / 0.7, rel=0.05)  # as that machine has it


def test_a_speed_out_of_reach_says_what_is_predicted(bench: Workbench, model: LatencyModel) -> None:
    with pytest.raises(
        PruningError, match=r"4 times as fast, but with the narrowest widths .* times \(.* is predicted"
    ):
        budget_for_speedup(bench, model, 4)


def test_calibration_says_nothing_where_it_is_good(tmp_path: Path) -> None:
    from paretoprune.pruning.builtin.dataset import build_dataset

    data = build_dataset(tmp_path / "digits", train=16, val=1)
    assert Workbench(str(BASELINE), str(data), 160, importance="l2").shortcomings() == []
