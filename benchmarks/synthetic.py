"""A pruning problem whose front is known exactly, for measuring searchers without a network.

A chain of convolutions: latency is a staircase of tiles, input channels times output channels; accuracy falls with
what every layer loses, and more where neighbours lose together. Both couple neighbours only, so that dynamic
programming over the chain finds the whole front. A smaller input divides the latency and loses accuracy, in one problem
more than in another. What a searcher sees of accuracy and latency is noisy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paretoprune.results.selection.pareto import hypervolume, non_dominated
from paretoprune.search.samplers.prior import Prior, path_levels
from paretoprune.search.space.space import Axis, GroupChoice, Levels, SizeAxis, Space

Array = NDArray[np.float64]

BASELINE_ACCURACY = 0.6
LATENCY_MS = 20.0
SIZES = (320, 288, 256, 224)
AREAS = tuple((size / SIZES[0]) ** 2 for size in SIZES)
_COARSE = 20000  # steps of latency that the dynamic programme tells apart
_CHANNELS = (16, 32, 32, 64, 64, 64, 128, 128, 128, 192, 256, 256)


@dataclass(frozen=True)
class SyntheticProblem:
    """``costs[i][a, b]``: latency (ms) of layer i with its predecessor at level a and itself at level b; ``losses``
    alike, without unit. ``fixed_ms``: latency of what is not pruned. ``size_losses[s]``: what the input's size adds to
    the loss. Accuracy is 0.6 / (1 + (loss / 2)^1.5)."""

    space: Space
    costs: tuple[Array, ...]
    losses: tuple[Array, ...]
    size_losses: Array
    fixed_ms: float
    accuracy_noise: float
    latency_noise: float
    sensitivity: tuple[dict[str, Any], ...]
    prior: Prior

    def truth(self, levels: Levels) -> tuple[float, float]:
        """mAP50-95 and latency (ms) without noise."""
        loss, latency, before = float(self.size_losses[levels[-1]]), self.fixed_ms, 0
        for index, level in enumerate(levels[:-1]):
            loss += float(self.losses[index][before, level])
            latency += float(self.costs[index][before, level])
            before = level
        return accuracy_of(loss), latency * AREAS[levels[-1]]

    def observe(self, levels: Levels, random: np.random.Generator) -> dict[str, float]:
        """One noisy evaluation, as a record's metrics."""
        accuracy, latency = self.truth(levels)
        noisy = accuracy + random.normal(0.0, self.accuracy_noise)
        measured = latency * (1.0 + random.normal(0.0, self.latency_noise))
        return {"map50_95": max(0.0, noisy), "latency_ms": measured}

    def share(self, plans: list[Levels], front: Array, least: float = 0.0) -> float:
        """Hypervolume of the plans' true values over that of ``front`` (k, 2: accuracy, latency in ms), beyond the
        share ``least`` of the unpruned accuracy."""
        return volume([self.truth(plan) for plan in plans], least) / volume(front.tolist(), least)


def accuracy_of(loss: float) -> float:
    """mAP50-95 at a summed loss: flat at first, then a collapse, as measured on pruned detectors."""
    return float(BASELINE_ACCURACY / (1.0 + (loss / 2.0) ** 1.5))


def volume(values: list[tuple[float, float]] | list[list[float]], least: float = 0.0) -> float:
    """Hypervolume (mAP x ms) beyond the share ``least`` of the unpruned accuracy and the unpruned latency."""
    losses = np.array([[-accuracy, latency] for accuracy, latency in values])
    return hypervolume(losses, np.array([-least * BASELINE_ACCURACY, LATENCY_MS]))


def make_problem(layers: int = 24, seed: int = 0, noise: float = 1.0, tile: int = 16) -> SyntheticProblem:
    """A problem of ``layers`` axes; ``noise`` scales 0.006 mAP and 1 % of latency (standard deviations).

    ``tile``: channels in which latency moves; widths move by 8.
    """
    random = np.random.default_rng(1000 + seed)
    channels = [_CHANNELS[index * len(_CHANNELS) // layers] for index in range(layers)]
    choices = [
        GroupChoice(name, i, (name,), count, tuple(width for width in range(count, 0, -8) if width >= 0.3 * count))
        for i, (name, count) in enumerate((f"model.{i}.conv", count) for i, count in enumerate(channels))
    ]
    space = Space((*(Axis(choice.name, (choice,)) for choice in choices), SizeAxis(SIZES)), {})
    work = random.lognormal(0.0, 0.7, layers)  # pixels and kernels differ from layer to layer
    hurt = random.lognormal(0.0, 1.0, layers)
    powers = random.uniform(1.2, 2.5, layers)
    couplings = random.lognormal(-0.5, 1.0, layers)
    costs, losses = [], []
    for i, choice in enumerate(choices):
        previous = choices[i - 1] if i else GroupChoice("input", -1, (), 3, (3,))
        tiles_in = np.ceil(np.array(previous.widths) / tile)[:, None]
        tiles_out = np.ceil(np.array(choice.widths) / tile)[None, :]
        full = tiles_in[0, 0] * tiles_out[0, 0]
        costs.append(work[i] * tiles_in * tiles_out / full)
        cut = 1.0 - np.array(choice.widths)[None, :] / choice.channels
        cut_before = 1.0 - np.array(previous.widths)[:, None] / previous.channels
        losses.append((hurt[i] * cut ** powers[i] + couplings[i] * cut * cut_before) * 8.0 / layers)
    variable = sum(float(cost[0, 0]) for cost in costs)
    scale = 0.85 * LATENCY_MS / variable
    costs = [cost * scale for cost in costs]
    # Half of the area costs as much as a loss of 0.3 to 1.6 (of ten problems nine)
    size_losses = 0.7 * random.lognormal(0.0, 0.5) * -np.log2(AREAS)
    rows, known = _estimated(space, costs, losses, random)
    return SyntheticProblem(
        space, tuple(costs), tuple(losses), size_losses, 0.15 * LATENCY_MS, 0.006 * noise, 0.01 * noise,
        tuple(rows), Prior(known, path_levels(space, rows)),
    )  # fmt: skip


def _estimated(
    space: Space, costs: list[Array], losses: list[Array], random: np.random.Generator
) -> tuple[list[dict[str, Any]], tuple[Array, ...]]:
    """What a network's removal scores would say: plans of least estimated loss for 16 shares of the latency, as rows of
    ``baseline.json``, and each layer's loss alone, wrong by a factor of its own (log-normal, 0.5) and
    of its level (0.1).
    """
    known = tuple(loss[0] * random.lognormal(0.0, 0.5) * random.lognormal(0.0, 0.1, loss.shape[1]) for loss in losses)
    whole = sum(float(cost[0, 0]) for cost in costs)
    found = {}
    for price in np.geomspace(0.005, 5.0, 400):
        levels = [int(np.argmin(loss + price * cost[0])) for loss, cost in zip(known, costs, strict=True)]
        left = sum(float(cost[a, b]) for cost, a, b in zip(costs, [0, *levels], levels, strict=False))
        found[left / whole] = levels
    rows = []
    for keep in np.linspace(0.95, 0.2, 16):
        nearest = min(found, key=lambda share: abs(share - keep))
        rows.append({"keep": nearest, "ratios": space.plan((*found[nearest], 0)).ratios})
    return rows, known


def exact_front(problem: SyntheticProblem) -> Array:
    """Accuracy and latency (k, 2) of the front, by dynamic programming over the chain.

    State: the last layer's level and the latency so far in ``_COARSE`` steps, rounded down each time, so that latencies
    are a little too low (at most one step a layer) and the shares reported a little too low as well.
    """
    step = LATENCY_MS / _COARSE
    best = np.full((1, _COARSE + 1), np.inf)
    best[0, int(problem.fixed_ms / step)] = 0.0
    for cost, loss in zip(problem.costs, problem.losses, strict=True):
        shifts = np.floor(cost / step).astype(int)
        following = np.full((cost.shape[1], _COARSE + 1), np.inf)
        for before in range(cost.shape[0]):
            for level in range(cost.shape[1]):
                shift = shifts[before, level]
                moved = best[before, : _COARSE + 1 - shift] + loss[before, level]
                np.minimum(following[level, shift:], moved, out=following[level, shift:])
        best = following
    losses = best.min(axis=0)
    reached = np.flatnonzero(np.isfinite(losses))
    points = np.array(
        [
            [-accuracy_of(losses[index] + lost), index * step * area]
            for lost, area in zip(problem.size_losses, AREAS, strict=True)
            for index in reached
        ]
    )
    front = points[non_dominated(points)]
    return np.column_stack([-front[:, 0], front[:, 1]])
