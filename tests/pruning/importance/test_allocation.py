"""Widths from sensitivity, against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from paretoprune.pruning.errors import PlanError
from paretoprune.pruning.graph.layers import LayerTable
from paretoprune.pruning.importance.allocation import (
    Cost,
    _cheapest,
    _Network,
    _options,
    allocate,
    conv_costs,
    parameter_costs,
    share_left,
)
from paretoprune.pruning.surgery.layer_table import build_layer_table
from paretoprune.pruning.surgery.surgery import prune
from paretoprune.pruning.yolo.loading import model_stats
from tests.pruning.masking import build

FREE = ("model.1", "model.3", "model.5")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build("yolov8n")


@pytest.fixture(scope="module")
def table(model: nn.Module) -> LayerTable:
    return build_layer_table(model)


def test_costs_are_the_stock_counts(model: nn.Module, table: LayerTable) -> None:
    macs = sum(c.amount for c in conv_costs(model, table, 128))
    assert macs * 2 / 1e9 == pytest.approx(model_stats(model, 128).gflops, rel=0.03)  # stock counts norms and acts too


@pytest.mark.parametrize("keep", [0.9, 0.6, 0.3])
def test_the_budget_is_kept_and_nearly_used(model: nn.Module, table: LayerTable, keep: float) -> None:
    scores = np.random.default_rng(0).random(table.class_count)
    widths = allocate(table, scores, conv_costs(model, table, 128), keep)
    assert widths is not None
    pruned, _ = prune(model, table, widths, scores)
    cut_table = build_layer_table(pruned)
    macs = [sum(c.amount for c in conv_costs(m, t, 128)) for m, t in ((model, table), (pruned, cut_table))]
    assert keep - 0.01 < macs[1] / macs[0] <= keep
    assert share_left(table, conv_costs(model, table, 128), widths) == pytest.approx(macs[1] / macs[0], rel=1e-12)


@pytest.mark.parametrize("name", ["yolov8n", "yolov6n", "yolo11n-cls"])
def test_parameters_are_counted_exactly(name: str) -> None:
    """Convolutions of all kinds, norms, biases, a linear layer: against the pruned network's own."""
    network = build(name)
    known = build_layer_table(network)
    rng = np.random.default_rng(2)
    widths = {g.id: int(rng.choice(g.widths(8))) for g in known.groups}
    pruned, _ = prune(network, known, widths, rng.random(known.class_count))
    before, after = (sum(p.numel() for p in m.parameters()) for m in (network, pruned))
    assert share_left(known, parameter_costs(network, known), widths) == pytest.approx(after / before, rel=1e-12)


def costs_of(unit: str, model: nn.Module, table: LayerTable) -> tuple[Cost, ...]:
    return conv_costs(model, table, 64) if unit == "macs" else parameter_costs(model, table)


@pytest.mark.parametrize("unit", ["macs", "params"])
@pytest.mark.parametrize("keep", [0.8, 0.35])
def test_no_wider_step_of_a_layer_fits(model: nn.Module, table: LayerTable, keep: float, unit: str) -> None:
    costs = costs_of(unit, model, table)
    widths = allocate(table, np.random.default_rng(4).random(table.class_count), costs, keep)
    assert widths is not None
    assert share_left(table, costs, widths) <= keep
    for group, width in widths.items():
        wider = min(w for w in table.groups[group].widths(8) if w > width)
        assert share_left(table, costs, {**widths, group: wider}) > keep


@pytest.mark.parametrize(("unit", "keep"), [("macs", 0.95), ("params", 0.99)])
def test_near_the_best_of_all_plans(model: nn.Module, table: LayerTable, unit: str, keep: float) -> None:
    """Three free layers, every combination of their widths tried."""
    free = [g for g in table.groups if g.name in FREE]
    floors = {g.id: g.channels for g in table.groups if g.name not in FREE}
    scores = np.random.default_rng(3).random(table.class_count) ** 4
    costs = costs_of(unit, model, table)

    def loss(widths: dict[int, int]) -> float:
        cut = [(g, widths.get(g.id, g.channels)) for g in free]
        return float(sum(np.sort(scores[g.parts[0]])[: g.channels - w].sum() for g, w in cut))

    def share(widths: dict[int, int]) -> float:
        return share_left(table, costs, widths)

    chosen = allocate(table, scores, costs, keep, round_to=16, floors=floors)
    assert chosen is not None
    assert set(chosen) <= {g.id for g in free}
    plans = [
        dict(zip([g.id for g in free], ws, strict=True)) for ws in itertools.product(*(g.widths(16) for g in free))
    ]
    feasible = [loss(p) for p in plans if share(p) <= keep]
    assert share(chosen) <= keep
    # A Lagrangian reaches the convex hull of the trade-off, so it may miss the optimum by one step of one layer.
    assert len(feasible) >= 8
    assert loss(chosen) <= sorted(feasible)[3]


@pytest.mark.parametrize("price", [1e-6, 1e-5, 1e-4])
def test_at_a_price_no_layer_alone_could_do_better(model: nn.Module, table: LayerTable, price: float) -> None:
    """Every other width of every group tried, at the whole network's cost."""
    scores = np.random.default_rng(1).random(table.class_count)
    network = _Network(table, conv_costs(model, table, 64))
    options = [_options(group, scores, 8, 1) for group in table.groups]
    stays = _cheapest(network, options, price)
    for group, (shares, losses) in enumerate(options):
        totals = []
        for share, loss in zip(shares, losses, strict=True):
            other = stays.copy()
            other[group] = share
            totals.append(loss + price * network.cost(other))
        assert totals[list(shares).index(stays[group])] <= min(totals) * (1 + 1e-12)
    assert (stays < 1).any()


def test_worthless_layers_go_first(model: nn.Module, table: LayerTable) -> None:
    scores = np.ones(table.class_count)
    group = table.group_of["model.6.cv2"]
    scores[group.parts[0]] = 0
    widths = allocate(table, scores, conv_costs(model, table, 64), 0.95)
    assert widths is not None
    assert widths[group.id] == min(group.widths(8))


@pytest.mark.parametrize("keep", [0.0, 1.1, -1.0])
def test_a_share_outside_its_range_is_refused(model: nn.Module, table: LayerTable, keep: float) -> None:
    with pytest.raises(PlanError, match=r"must lie in \(0, 1\]"):
        allocate(table, np.ones(table.class_count), conv_costs(model, table, 64), keep)


def test_an_unreachable_share_gives_none(model: nn.Module, table: LayerTable) -> None:
    floors = {g.id: g.channels for g in table.groups}
    assert allocate(table, np.ones(table.class_count), conv_costs(model, table, 64), 0.5, floors=floors) is None


def test_the_model_is_left_alone(model: nn.Module, table: LayerTable) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    conv_costs(model, table, 64)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
