"""Widths that follow sensitivity: which layers to cut for a given saving, from one importance pass.

Scores of a data-driven criterion (Taylor) estimate the loss that removing a channel costs, on one scale for the whole
network. Choosing widths is then a knapsack: spend as little loss as possible for a given share of multiply-adds. It is
solved by a Lagrangian: for a price per multiply-add every group takes the width that is cheapest, given the others'
widths (a convolution's cost is the product of its inputs and outputs), until nothing changes; the price is bisected.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from pruning.errors import PlanError
from pruning.geometry_reading import positions
from pruning.layers import ALWAYS, Group, LayerTable

_SWEEPS = 6  # rounds of coordinate descent; the widths settle after two or three
_BISECTIONS = 40


@dataclass(frozen=True)
class ConvCost:
    """One convolution's multiply-adds at full width, for one image."""

    name: str
    macs: float


def conv_costs(model: nn.Module, table: LayerTable, imgsz: int) -> tuple[ConvCost, ...]:
    """Multiply-adds of every convolution that a forward pass of one `imgsz` square image reaches."""
    found = []
    for name, seen in positions(model, list(table.convs), imgsz).items():
        conv: Any = model.get_submodule(name)
        uses = seen.read if isinstance(conv, nn.ConvTranspose2d) else seen.written
        found.append(ConvCost(name, float(conv.weight.numel()) * uses))
    return tuple(found)


class _Network:
    """Shares of channels that stay, per group, and what the convolutions cost under them."""

    def __init__(self, table: LayerTable, costs: tuple[ConvCost, ...]) -> None:
        group_of_class = np.full(table.class_count, -1)
        for group in table.groups:
            for part in group.parts:
                group_of_class[part] = group.id
        count = len(table.groups)
        self.macs = np.array([c.macs for c in costs])
        self.outputs = np.array([self._shares(table.convs[c.name].outputs, group_of_class, count) for c in costs])
        self.inputs = np.array(
            [
                self._shares(
                    np.full(1, ALWAYS) if table.convs[c.name].depthwise else table.convs[c.name].inputs,
                    group_of_class,
                    count,
                )
                for c in costs
            ]
        )
        reads_or_writes = (self.outputs != 0) | (self.inputs != 0)
        self._of_group = [self._rows(np.flatnonzero(reads_or_writes[:, g]), g) for g in range(count)]
        together = reads_or_writes[:, :count].T @ reads_or_writes[:, :count]
        self.neighbours = [set(np.flatnonzero(row).tolist()) - {g} for g, row in enumerate(together)]

    def _rows(self, rows: np.ndarray, group: int) -> tuple[np.ndarray, ...]:
        """(macs, outputs, inputs, this group's outputs, its inputs) of these convolutions."""
        outputs, inputs = self.outputs[rows], self.inputs[rows]
        return self.macs[rows], outputs, inputs, outputs[:, group].copy(), inputs[:, group].copy()

    @staticmethod
    def _shares(classes: np.ndarray, group_of_class: np.ndarray, count: int) -> np.ndarray:
        """Share of the channels that belongs to each group; the last entry is the share nobody may cut."""
        owners = np.where(group_of_class[classes] < 0, count, group_of_class[classes])
        return np.bincount(owners, minlength=count + 1) / len(classes)

    def cost(self, stays: np.ndarray) -> float:
        """Multiply-adds when group g keeps the share `stays[g]`; shape (groups + 1,), the last entry 1."""
        return float(self.macs @ ((self.outputs @ stays) * (self.inputs @ stays)))

    def slope(self, group: int, stays: np.ndarray) -> tuple[float, float]:
        """(c1, c2): the cost is a constant + c1 x + c2 x^2 of this group's share x, the others' as in `stays`."""
        macs, outputs, inputs, out1, in1 = self._of_group[group]
        out0, in0 = outputs @ stays - out1 * stays[group], inputs @ stays - in1 * stays[group]
        return macs @ (out0 * in1 + out1 * in0), macs @ (out1 * in1)


def share_of_macs(table: LayerTable, costs: tuple[ConvCost, ...], widths: Mapping[int, int]) -> float:
    """Multiply-adds of the network with these widths by group id, over the unpruned network's."""
    network, stays = _Network(table, costs), np.ones(len(table.groups) + 1)
    whole = network.cost(stays)
    for group, width in widths.items():
        stays[group] = width / table.groups[group].channels
    return network.cost(stays) / whole


def allocate(
    table: LayerTable,
    scores: np.ndarray,
    costs: tuple[ConvCost, ...],
    keep: float,
    round_to: int = 8,
    floors: Mapping[int, int] | None = None,
) -> dict[int, int] | None:
    """Widths by group id whose multiply-adds are at most `keep` times the unpruned network's, at the least loss.

    Args:
        scores: loss per class when it is removed, shape (class_count,), on one scale for all layers.
        keep: share of multiply-adds that stays, in (0, 1].
        floors: smallest width allowed per group id; the smallest of `Group.widths` where not given.

    Returns:
        The narrower groups' widths; None where even the smallest allowed widths leave more than `keep`.

    Raises:
        PlanError: `keep` is outside (0, 1].
    """
    if not 0 < keep <= 1:
        raise PlanError(f"the share of multiply-adds to keep must lie in (0, 1], but got {keep}.")
    network = _Network(table, costs)
    options = [_options(g, scores, round_to, (floors or {}).get(g.id, 1)) for g in table.groups]
    whole = network.cost(np.ones(len(table.groups) + 1))
    at_price = partial(_cheapest, network, options)
    low, high = 0.0, 1e-12
    while network.cost(at_price(high)) > keep * whole:
        high *= 4
        if high > 1e12:
            return None
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if network.cost(at_price(middle)) > keep * whole else (low, middle)
    stays = at_price(high)
    widths = {g.id: round(float(stays[g.id]) * g.channels) for g in table.groups}
    return {g: w for g, w in widths.items() if w < table.groups[g].channels}


def _options(group: Group, scores: np.ndarray, round_to: int, floor: int) -> tuple[np.ndarray, np.ndarray]:
    """The shares a group may keep, and the loss each costs: the sum of the scores of the channels it removes."""
    widths = [w for w in group.widths(round_to) if w >= floor or w == group.channels]
    ascending = [np.concatenate([[0.0], np.cumsum(np.sort(scores[part]))]) for part in group.parts]
    losses = [
        sum(a[len(p) - k] for a, p, k in zip(ascending, group.parts, group.kept_per_part(w), strict=True))
        for w in widths
    ]
    return np.array(widths) / group.channels, np.array(losses)


def _cheapest(network: _Network, options: list[tuple[np.ndarray, np.ndarray]], price: float) -> np.ndarray:
    stays = np.ones(len(options) + 1)
    stale = set(range(len(options)))  # groups whose choice may no longer be the cheapest
    for _ in range(_SWEEPS):
        for group, (shares, losses) in enumerate(options):
            if group not in stale:
                continue
            stale.remove(group)
            c1, c2 = network.slope(group, stays)
            share = shares[(losses + price * ((c2 * shares + c1) * shares)).argmin()]
            if share != stays[group]:
                stays[group] = share
                stale |= network.neighbours[group]
        if not stale:
            break
    return stays
