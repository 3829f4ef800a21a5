"""Axes of depth: which branches a plan removes whole.

A level is a set of branches, and each level of an axis removes more than the one before it. Branches with a shortcut
have an axis of two levels each, where they are few; else one a block, which gives them up from the last one on. Those
without a shortcut take what is behind them along, so they have one axis a block; where a block's units have branches of
their own, these go first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paretoprune.pruning.plan import Plan

if TYPE_CHECKING:
    from paretoprune.pruning.graph.branches import Branch, Branches

MOST_SINGLE = 12  # axes of one branch each: with more the sampler's model has more unknowns than a run has trials


@dataclass(frozen=True)
class DepthAxis:
    """``steps``: the branches that each level removes; none at level 0."""

    name: str
    steps: tuple[tuple[str, ...], ...]

    @property
    def size(self) -> int:
        """How many levels there are (at least 2)."""
        return len(self.steps)

    def uniform(self, ratio: float) -> int:
        """Nothing is removed: a ratio is of channels."""
        return 0

    def nearest(self, plan: Plan) -> int:
        """The level that differs from ``plan`` in the fewest branches (the lower one of two)."""
        own = {name for step in self.steps for name in step}
        wanted = own.intersection(plan.branches)
        return min(range(self.size), key=lambda level: len(wanted.symmetric_difference(self.steps[level])))


def depth_axes(branches: Branches, allowed: Callable[[str], bool]) -> list[DepthAxis]:
    """The axes of a model's branches that may be removed; ``allowed``: whether one may be, by its name."""
    free = {name for name, branch in branches.by_name.items() if branch.removable and allowed(name)}
    single = [name for name in free if branches.by_name[name].residual and not _inside(name, free)]
    axes = []
    for chain in branches.chains:
        members = [b for b in chain.branches if b.name in free and not _inside(b.name, free)]
        residual = [b.name for b in members if b.residual]
        if len(single) <= MOST_SINGLE:
            axes += [DepthAxis(f"depth.{name}", ((), (name,))) for name in residual]
        elif residual:
            axes.append(DepthAxis(f"depth.{chain.name}", _from_the_last(residual)))
        names = {b.name for b in members if not b.residual}
        tail = [branches.by_name[name] for name in branches.by_name if name in names]
        tail = [b for b in tail if names.issuperset(b.needs)]
        if tail:
            axes.append(DepthAxis(f"depth.{chain.name}.tail", tuple(_tail_steps(tail, branches, free))))
    return axes


def _inside(name: str, others: set[str]) -> bool:
    """Whether it lies in another branch: then it is a step of that one's axis."""
    return any(name.startswith(f"{other}.") for other in others)


def _from_the_last(names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(names[len(names) - count :]) for count in range(len(names) + 1))


def _tail_steps(tail: Sequence[Branch], branches: Branches, free: set[str]) -> list[tuple[str, ...]]:
    """From the last one on: the branches inside it one after the other, then all of it."""
    steps: list[tuple[str, ...]] = [()]
    for branch in reversed(tail):
        gone = steps[-1]
        inner = [name for name in branches.by_name if name in free and name.startswith(f"{branch.name}.")]
        steps += [(*gone, *inside) for inside in _from_the_last(inner)[1:]]
        steps.append((*gone, branch.name))
    return steps
