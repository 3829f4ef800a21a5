"""When a trial is stopped: asynchronous successive halving by non-dominated depth, among trials of like cost.

Costs are the run's own objectives of economy: latency, or parameters, work, size, energy. At each rung a trial's
*depth* is the number of trials that reached the rung and are no costlier and no less accurate, and better in one of
these. A trial goes on if nobody dominates it, or if few enough of its neighbours in cost lie less deep than it does.
Depth alone would thin out the front's crowded middle, accuracy alone would kill its cheap end; the neighbourhood makes
every stretch of cost keep its best.

Pure functions of what is known at a rung: the order of arrival plays no part beyond that, and equal knowledge gives
equal decisions. (Syne Tune's MOASHA takes the indices of a non-dominated sort for ranks, and stops most newcomers that
dominate everything; see Schmucker et al., "Multi-objective asynchronous successive halving", 2021, for the idea.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from paretoprune.search.stopping.rungs import RungReport

LATENCY, WORK = "latency_ms", "gflops"

Costs = tuple[str, ...]


@dataclass(frozen=True)
class StoppingRule:
    """About one trial in ``reduction`` goes on from a rung; ``neighbours``: trials that one is compared with.

    ``costs``: the run's lower-is-better objectives; () where it has none, and all trials of a rung are neighbours.
    Where fewer than ``neighbours`` others have reached a rung, nobody is stopped there.
    """

    reduction: float = 3.0
    costs: Costs = (LATENCY,)
    neighbours: int = 8

    def stops(self, report: RungReport, others: Iterable[RungReport]) -> bool:
        """Whether the trial of ``report`` ends, given the reports of all trials (its own, other rungs' and other
        precisions' are left out).

        Work stands for a cost that is not known of the trial yet: latency that is measured elsewhere.
        """
        costs = tuple(dict.fromkeys(name if name in report.costs else WORK for name in self.costs))
        peers = [
            other
            for other in others
            if (other.epochs, other.precision) == (report.epochs, report.precision)
            and other.trial_id != report.trial_id
            and other.costs.keys() >= set(costs)
        ]
        if len(peers) < self.neighbours:
            return False
        own = _depth(report, peers, costs)
        if own == 0:
            return False
        everyone = [report, *peers]
        near = sorted(peers, key=lambda peer: (_distance(peer, report, costs), peer.trial_id))
        near = near[: self.neighbours] if costs else near
        ahead = sum(_depth(peer, everyone, costs) < own for peer in near)
        return ahead >= math.ceil((len(near) + 1) / self.reduction)


def rungs_of(epochs: int, reduction: float) -> tuple[int, ...]:
    """Epochs after which trials of ``epochs`` epochs may be stopped: 0, and ``epochs`` divided by powers of
    ``reduction`` down to 1; () where there is no epoch to save."""
    if epochs < 1:
        return ()
    rungs = {0}
    left = epochs / reduction
    while left >= 1:
        rungs.add(int(left))
        left /= reduction
    return tuple(sorted(rungs))


def _depth(report: RungReport, others: Sequence[RungReport], costs: Costs) -> int:
    """How many of the others dominate it."""
    return sum(_dominates(other, report, costs) for other in others)


def _dominates(one: RungReport, other: RungReport, costs: Costs) -> bool:
    """No costlier, no less accurate, and better in one of these."""
    a, b = _losses(one, costs), _losses(other, costs)
    return a != b and all(mine <= theirs for mine, theirs in zip(a, b, strict=True))


def _losses(report: RungReport, costs: Costs) -> list[float]:
    return [-report.accuracy, *(report.costs[name] for name in costs)]


def _distance(one: RungReport, other: RungReport, costs: Costs) -> float:
    """In the logarithm, so that a tenth counts alike at 2 ms and at 20 ms."""
    return math.dist(_logarithms(one, costs), _logarithms(other, costs))


def _logarithms(report: RungReport, costs: Costs) -> list[float]:
    return [math.log(max(report.costs[name], 1e-12)) for name in costs]
