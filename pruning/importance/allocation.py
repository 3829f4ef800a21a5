"""Widths that follow sensitivity: which layers to cut for a given saving, from one importance pass.

Scores of a data-driven criterion (Taylor) estimate the loss that removing a channel costs, on one scale for the whole
network. Choosing widths is then a knapsack: spend as little loss as possible for a given share of multiply-adds, or of
parameters. It is solved by a Lagrangian: for a price per multiply-add every group takes the width that is cheapest,
given the others' widths (a convolution's cost is the product of its inputs and outputs), until nothing changes; the
price is bisected. That reaches the convex hull of the trade-off only, so what is left of the budget is then spent on
the widest gain for its cost, one width step after the other, until no step fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from torch import nn

from paretoprune.base.image_size import ImageSize
from paretoprune.pruning.errors import PlanError
from paretoprune.pruning.graph.geometry_reading import positions
from paretoprune.pruning.graph.layers import ALWAYS, Group, LayerTable

Unit = Literal["macs", "params"]
UNITS: tuple[Unit, ...] = ("macs", "params")

_SWEEPS = 6  # rounds of coordinate descent; the widths settle after two or three
_BISECTIONS = 40


_FIXED = np.full(1, ALWAYS)  # a side that no plan narrows


@dataclass(frozen=True)
class Cost:
    """What something costs at full width; it falls with the shares of the channels that stay on both of its sides.

    `outputs`, `inputs`: the classes of the channels of a side, shape (channels,).
    """

    name: str
    amount: float
    outputs: np.ndarray
    inputs: np.ndarray


def conv_costs(model: nn.Module, table: LayerTable, imgsz: ImageSize) -> tuple[Cost, ...]:
    """Multiply-adds of every convolution that a forward pass of one image of this size reaches."""
    found = []
    for name, seen in positions(model, list(table.convs), imgsz).items():
        conv: Any = model.get_submodule(name)
        uses = seen.read if isinstance(conv, nn.ConvTranspose2d) else seen.written
        channels = table.convs[name]
        inputs = _FIXED if channels.depthwise else channels.inputs
        found.append(Cost(name, float(conv.weight.numel()) * uses, channels.outputs, inputs))
    return tuple(found)


def parameter_costs(model: nn.Module, table: LayerTable) -> tuple[Cost, ...]:
    """Every parameter tensor's numbers, as Ultralytics counts them; what no plan narrows among them."""
    sides: dict[str, tuple[np.ndarray, np.ndarray]] = {name: (c, _FIXED) for name, (_, c) in table.vectors.items()}
    for name, channels in table.convs.items():
        sides[f"{name}.weight"] = channels.outputs, _FIXED if channels.depthwise else channels.inputs
        sides[f"{name}.bias"] = channels.outputs, _FIXED
    for name, inputs in table.linears.items():
        sides[f"{name}.weight"] = table.features[name], inputs
        sides[f"{name}.bias"] = table.features[name], _FIXED
    for name, classes in table.norms.items():
        sides[f"{name}.weight"] = sides[f"{name}.bias"] = classes, _FIXED
    whole = _FIXED, _FIXED
    return tuple(Cost(name, float(p.numel()), *sides.get(name, whole)) for name, p in model.named_parameters())


class _Network:
    """Shares of channels that stay, per group, and what the network costs under them."""

    def __init__(self, table: LayerTable, costs: tuple[Cost, ...]) -> None:
        group_of_class = np.full(table.class_count, -1)
        for group in table.groups:
            for part in group.parts:
                group_of_class[part] = group.id
        count = len(table.groups)
        self.amounts = np.array([c.amount for c in costs])
        self.outputs = np.array([self._shares(c.outputs, group_of_class, count) for c in costs])
        self.inputs = np.array([self._shares(c.inputs, group_of_class, count) for c in costs])
        reads_or_writes = (self.outputs != 0) | (self.inputs != 0)
        self._of_group = [self._rows(np.flatnonzero(reads_or_writes[:, g]), g) for g in range(count)]
        together = reads_or_writes[:, :count].T @ reads_or_writes[:, :count]
        self.neighbours = [set(np.flatnonzero(row).tolist()) - {g} for g, row in enumerate(together)]

    def _rows(self, rows: np.ndarray, group: int) -> tuple[np.ndarray, ...]:
        """(amounts, outputs, inputs, this group's outputs, its inputs) of these costs."""
        outputs, inputs = self.outputs[rows], self.inputs[rows]
        return self.amounts[rows], outputs, inputs, outputs[:, group].copy(), inputs[:, group].copy()

    @staticmethod
    def _shares(classes: np.ndarray, group_of_class: np.ndarray, count: int) -> np.ndarray:
        """Share of the channels that belongs to each group; the last entry is the share nobody may cut."""
        owners = np.where(group_of_class[classes] < 0, count, group_of_class[classes])
        return np.bincount(owners, minlength=count + 1) / len(classes)

    def each(self, stays: np.ndarray) -> np.ndarray:
        """Every cost when group g keeps the share `stays[g]`, shape (groups + 1,), the last entry 1."""
        found: np.ndarray = self.amounts * (self.outputs @ stays) * (self.inputs @ stays)
        return found

    def cost(self, stays: np.ndarray) -> float:
        """All of them together."""
        return float(self.each(stays).sum())

    def slope(self, group: int, stays: np.ndarray) -> tuple[float, float]:
        """(c1, c2): the cost is a constant + c1 x + c2 x^2 of this group's share x, the others' as in `stays`."""
        amounts, outputs, inputs, out1, in1 = self._of_group[group]
        out0, in0 = outputs @ stays - out1 * stays[group], inputs @ stays - in1 * stays[group]
        return amounts @ (out0 * in1 + out1 * in0), amounts @ (out1 * in1)


def costs_left(table: LayerTable, costs: tuple[Cost, ...], widths: Mapping[int, int]) -> np.ndarray:
    """Each of the costs in the network with these widths by group id, shape (costs,)."""
    stays = np.ones(len(table.groups) + 1)
    for group, width in widths.items():
        stays[group] = width / table.groups[group].channels
    return _Network(table, costs).each(stays)


def share_left(table: LayerTable, costs: tuple[Cost, ...], widths: Mapping[int, int]) -> float:
    """What the network with these widths by group id costs, over the unpruned network."""
    return float(costs_left(table, costs, widths).sum()) / sum(cost.amount for cost in costs)


def narrowest(table: LayerTable, round_to: int) -> dict[int, int]:
    """The smallest width that every group may have, by group id."""
    return {group.id: min(group.widths(round_to)) for group in table.groups}


def allocate(
    table: LayerTable,
    scores: np.ndarray,
    costs: tuple[Cost, ...],
    keep: float,
    round_to: int = 8,
    floors: Mapping[int, int] | None = None,
) -> dict[int, int] | None:
    """Widths by group id that cost at most `keep` times what the unpruned network does, at the least loss.

    No wider width of any group would fit, but where it brings nothing (its channels' scores are not above 0).

    Args:
        scores: loss per class when it is removed, shape (class_count,), on one scale for all layers.
        costs: multiply-adds (`conv_costs`) or parameters (`parameter_costs`).
        keep: share of them that stays, in (0, 1].
        floors: smallest width allowed per group id; the smallest of `Group.widths` where not given.

    Returns:
        The narrower groups' widths; None where even the smallest allowed widths leave more than `keep`.

    Raises:
        PlanError: `keep` is outside (0, 1].
    """
    if not 0 < keep <= 1:
        raise PlanError(f"the share to keep must lie in (0, 1], but got {keep}.")
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
    _spend(network, options, stays, keep * whole)
    widths = {g.id: round(float(stays[g.id]) * g.channels) for g in table.groups}
    return {g: w for g, w in widths.items() if w < table.groups[g].channels}


def _options(group: Group, scores: np.ndarray, round_to: int, floor: int) -> tuple[np.ndarray, np.ndarray]:
    """The shares a group may keep, and the loss each costs."""
    losses = width_losses(group, scores, round_to)
    allowed = {w: loss for w, loss in losses.items() if w >= floor or w == group.channels}
    return np.array(list(allowed)) / group.channels, np.array(list(allowed.values()))


def width_losses(group: Group, scores: np.ndarray, round_to: int) -> dict[int, float]:
    """The widths that a group may have, falling, and what each costs: the sum of the scores of the channels that go."""
    ascending = [np.concatenate([[0.0], np.cumsum(np.sort(scores[part]))]) for part in group.parts]
    return {
        w: float(sum(a[len(p) - k] for a, p, k in zip(ascending, group.parts, group.kept_per_part(w), strict=True)))
        for w in group.widths(round_to)
    }


def _spend(network: _Network, options: list[tuple[np.ndarray, np.ndarray]], stays: np.ndarray, most: float) -> None:
    """Widen `stays`, in place, by the step that brings most for its cost, as long as one fits into `most`."""
    while True:
        left = most - network.cost(stays)
        best, chosen = 0.0, None
        for group, (shares, losses) in enumerate(options):
            now = int(np.flatnonzero(shares == stays[group])[0])
            if now == 0:  # the shares descend from 1
                continue
            c1, c2 = network.slope(group, stays)
            x, y = stays[group], shares[now - 1]
            price, gain = c1 * (y - x) + c2 * (y**2 - x**2), losses[now] - losses[now - 1]
            if price <= left and gain / max(price, 1e-30) > best:
                best, chosen = gain / max(price, 1e-30), (group, y)
        if chosen is None:
            return
        stays[chosen[0]] = chosen[1]


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
