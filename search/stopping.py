"""When a trial is stopped: asynchronous successive halving by non-dominated depth, among trials of like latency.

At each rung a trial's *depth* is the number of trials that reached the rung and are no slower and no less accurate, and
better in one of the two. A trial goes on if nobody dominates it, or if few enough of its neighbours in latency lie less
deep than it does. Depth alone would thin out the front's crowded middle, accuracy alone would kill its fast end; the
neighbourhood makes every stretch of latency keep its best.

Pure functions of what is known at a rung: the order of arrival plays no part beyond that, and equal knowledge gives
equal decisions. (Syne Tune's MOASHA takes the indices of a non-dominated sort for ranks, and stops most newcomers that
dominate everything; see Schmucker et al., "Multi-objective asynchronous successive halving", 2021, for the idea.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from search.rungs import RungReport

LATENCY, WORK = "latency_ms", "gflops"


@dataclass(frozen=True)
class StoppingRule:
    """About one trial in ``reduction`` goes on from a rung; ``neighbours``: trials that one is compared with.

    Where fewer than ``neighbours`` others have reached a rung, nobody is stopped there.
    """

    reduction: float = 3.0
    neighbours: int = 8

    def stops(self, report: RungReport, others: Iterable[RungReport]) -> bool:
        """Whether the trial of ``report`` ends, given what all trials told (its own and other rungs' are left out).

        Costs are compared by latency, or by GFLOPs where the trial's latency is not known yet.
        """
        cost = LATENCY if LATENCY in report.costs else WORK
        peers = [
            other
            for other in others
            if other.epochs == report.epochs and other.trial_id != report.trial_id and cost in other.costs
        ]
        if len(peers) < self.neighbours:
            return False
        own = _depth(report, peers, cost)
        if own == 0:
            return False
        everyone = [report, *peers]
        near = sorted(peers, key=lambda peer: (_distance(peer, report, cost), peer.trial_id))[: self.neighbours]
        ahead = sum(_depth(peer, everyone, cost) < own for peer in near)
        return ahead >= math.ceil((self.neighbours + 1) / self.reduction)


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


def _depth(report: RungReport, others: Sequence[RungReport], cost: str) -> int:
    """How many of the others dominate it."""
    return sum(_dominates(other, report, cost) for other in others)


def _dominates(one: RungReport, other: RungReport, cost: str) -> bool:
    """No slower, no less accurate, and better in one of the two."""
    a, b = one.costs[cost], other.costs[cost]
    return a <= b and one.accuracy >= other.accuracy and (a < b or one.accuracy > other.accuracy)


def _distance(one: RungReport, other: RungReport, cost: str) -> float:
    """In the logarithm, so that a tenth counts alike at 2 ms and at 20 ms."""
    return abs(math.log(max(one.costs[cost], 1e-12)) - math.log(max(other.costs[cost], 1e-12)))
