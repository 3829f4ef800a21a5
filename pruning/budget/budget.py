"""How much of a network is to stay, and what a cut to that took from each block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import nn

from paretoprune.pruning.budget.progressive import Report, removals
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.importance.allocation import UNITS, Cost, Unit, narrowest, share_left
from paretoprune.pruning.latency.model import LatencyModel, PlanLatency
from paretoprune.pruning.plan import Plan
from paretoprune.pruning.surgery.surgery import classes_from_kept
from paretoprune.pruning.workbench import Workbench, check_recovery

_ABOVE, _LOOKS = 1.1, 100  # see `_goals`
_HALVINGS = 16  # of the share of multiply-adds: finer than one width step of any layer


@dataclass(frozen=True)
class Budget:
    """The share that stays, in (0, 1], of the multiply-adds or of the parameters.

    `enough`: what the plan's ratios have to fulfil beside it; the share then says about where to look for such a plan.
    """

    share: float
    of: Unit = "macs"
    enough: Callable[[Mapping[str, float]], bool] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise PruningError(f"the share of {self.unit} to keep must lie in (0, 1], but got {self.share}.")

    @property
    def unit(self) -> str:
        """What it is a share of, in words."""
        return {"macs": "multiply-adds", "params": "parameters"}[self.of]


@dataclass(frozen=True)
class BlockCut:
    """What one block of the network lost.

    `kind`: its module's class. `channels`, `channels_before`: of all its convolutions' outputs together. `macs`,
    `macs_before`: their multiply-adds for one image. `loss`: the scores of the channels that went, summed: the
    estimated change of the network's answer, in nats per image; channels that leave several blocks together count in
    the block that their group begins in.
    """

    block: int
    kind: str
    channels_before: int
    channels: int
    macs_before: float
    macs: float
    loss: float


@dataclass(frozen=True)
class Cut:
    """A network cut to a budget and recovered, its plan, and a row for every block that has a convolution.

    `macs_kept`, `params_kept`: what is left of the convolutions' multiply-adds and of all parameters, in (0, 1].
    """

    model: nn.Module
    plan: Plan
    blocks: tuple[BlockCut, ...]
    macs_kept: float
    params_kept: float


def cut_to(bench: Workbench, budget: Budget, recover: str = "refit", report: Report = lambda line: None) -> Cut:
    """The network with at most `budget` left, channels and widths chosen where the loss suffers least, recovered.

    `report` is told what is done.

    Raises:
        PruningError: the budget is out of reach, or there is no data to look at.
    """
    check_recovery(recover)
    report(f"reading {bench.calibration_images} calibration images of {bench.data}")
    report(f"scoring channels on {len(bench.scored_images.images)} images")
    wanted, losses = chosen_for(bench, budget, report)
    report(f"cutting {len(wanted.ratios)} layers to {budget.share:.1%} of the {budget.unit}")
    model, plan = bench.prune(wanted)
    if recover != "none":
        report(f"recovering ({recover}) on {len(bench.images)} images")
        bench.recover(model, plan, recover, report=report)
    return cut_of(bench, model, plan, losses)


def ratios_within(bench: Workbench, budget: Budget) -> dict[str, float]:
    """Ratios by layer that leave at most `budget`, cutting where the estimated loss is least, in one step.

    Raises `PruningError` where even the narrowest widths leave more.
    """
    ratios = bench.allocated(budget.share, budget.of)
    if ratios is None:
        raise _out_of_reach(bench, budget)
    return ratios


def chosen_for(bench: Workbench, budget: Budget, report: Report) -> tuple[Plan, np.ndarray]:
    """The plan that leaves at most `budget`, and what each class was estimated to cost when it left, (class_count,).

    Chosen progressively (`pruning.budget.progressive`); by a criterion without a common scale, whose scores choose
    channels but no widths, in one step. Raises `PruningError` where even the narrowest widths leave more.
    """
    if bench.importance != bench.loss_criterion:
        return Plan(ratios_within(bench, budget)), bench.loss_scores
    for removal in removals(bench, _goals(budget), bench.costs(budget.of), report):
        plan = removal.plan(bench)
        if budget.enough is None or budget.enough(plan.ratios):
            return plan, removal.losses
    raise _out_of_reach(bench, budget)


def _goals(budget: Budget) -> list[float]:
    """Falling shares at which to look: the budget's own, or from somewhat above it in steps of a hundredth."""
    if budget.enough is None:
        return [budget.share]
    return [share for k in range(_LOOKS) if (share := budget.share * _ABOVE * 0.99**k) < 1]


def _out_of_reach(bench: Workbench, budget: Budget) -> PruningError:
    least = share_left(bench.table, bench.costs(budget.of), narrowest(bench.table, bench.round_to))
    return PruningError(
        f"at most {budget.share:.4g} of the {budget.unit} shall stay, but the narrowest widths (multiples of "
        f"{bench.round_to}) leave {least:.4g}; keep more, or round to less."
    )


def cut_of(bench: Workbench, model: nn.Module, plan: Plan, losses: np.ndarray) -> Cut:
    """What `plan`, which records its kept channels, took from the unpruned network; `model`: what it gave.

    `losses`: what each class was estimated to cost, shape (class_count,).
    """
    table = bench.table
    stays = classes_from_kept(table, plan.kept)
    rows: dict[int, dict[str, float]] = {}

    def add(block: int, **values: float) -> None:
        row = rows.setdefault(block, {})
        for name, value in values.items():
            row[name] = row.get(name, 0) + value

    for cost in bench.costs("macs"):
        add(
            table.by_name[table.layer_of[cost.name]].block,
            channels_before=len(cost.outputs),
            channels=int(stays[cost.outputs].sum()),
            macs_before=cost.amount,
            macs=_left(cost, stays),
        )
    for group in table.groups:
        add(group.block, loss=sum(float(losses[part[~stays[part]]].sum()) for part in group.parts))
    modules: nn.Sequential = bench.model.model  # type: ignore[assignment]
    blocks = tuple(
        BlockCut(
            block, type(modules[block]).__name__, int(row["channels_before"]), int(row["channels"]),
            row["macs_before"], row["macs"], row.get("loss", 0.0),
        )
        for block, row in sorted(rows.items()) if "macs" in row
    )  # fmt: skip
    macs, params = (sum(_left(c, stays) for c in cs) / sum(c.amount for c in cs) for cs in map(bench.costs, UNITS))
    return Cut(model, plan, blocks, macs, params)


def _left(cost: Cost, stays: np.ndarray) -> float:
    """What a cost is when the classes `stays` (bool) are left."""
    return cost.amount * float(stays[cost.outputs].mean() * stays[cost.inputs].mean())


def budget_for_speedup(bench: Workbench, model: LatencyModel, speedup: float) -> Budget:
    """The largest share of multiply-adds at which the latency model predicts at least `speedup` times the speed.

    Channels are given up for multiply-adds, not for the model's own price of a layer: fitted on a dozen plans it knows
    the whole network's latency to a few per cent, but hardly one layer's. The share is bisected; the prediction itself
    has to reach `speedup`, not the lower end of its interval, which would cut every network that was timed in a noisy
    place more.

    Raises `PruningError` where even the narrowest widths are predicted to be slower.
    """
    # From the narrowest widths, which no share below this one reaches, up to the whole network.
    low = share_left(bench.table, bench.conv_costs, narrowest(bench.table, bench.round_to)) * (1 + 1e-9)
    found = predicted_at(bench, model, low)
    if 1 / float(found.ratio[0]) < speedup:
        reach, slow, fast = (1 / float(x[0]) for x in (found.ratio, found.high, found.low))
        raise PruningError(
            f"the network shall be {speedup:.4g} times as fast, but with the narrowest widths (multiples of "
            f"{bench.round_to}) {reach:.3g} times ({slow:.3g} to {fast:.3g}) is predicted; ask for less, or take a "
            "smaller --imgsz."
        )
    high = 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        enough = 1 / float(predicted_at(bench, model, middle).ratio[0]) >= speedup
        low, high = (middle, high) if enough else (low, middle)
    return Budget(low, enough=lambda ratios: 1 / float(model.predict([Plan(ratios)]).ratio[0]) >= speedup)


def predicted_at(bench: Workbench, model: LatencyModel, share: float) -> PlanLatency:
    """The latency of the network that keeps this share of its multiply-adds, shapes (1,)."""
    return model.predict([Plan(ratios_within(bench, Budget(share)))])
