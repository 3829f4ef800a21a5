"""The search space: which widths, branches, input sizes and precisions a plan may choose, as whole-numbered axes.

An axis is one prunable group, or one block, or branches that are removed whole, or the size of the input, or the
precision. Its variable is a *level*: level 0 is the greatest width (size) allowed, each further level the next one in
steps of ``round_to``. Widths are thus the real variables (no two levels give the same plan), and an axis with a single
width does not exist: it would be a dead dimension to the sampler. Only widths inside a removed branch make no
difference (`Space.canonical`).
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from paretoprune.base.image_size import ImageSize, area_of, height_width, larger_side, read_size, size_text
from paretoprune.pruning.graph.patterns import governing, means
from paretoprune.pruning.plan import Plan
from paretoprune.search.config.sections import SpaceSection
from paretoprune.search.errors import SpaceError
from paretoprune.search.space.depth import DepthAxis, depth_axes

if TYPE_CHECKING:
    from paretoprune.pruning.graph.branches import Branches

Levels = tuple[int, ...]

MOST_SIZES = 5  # each is one more measurement of the unpruned model before a front can be judged
SMALLEST_SIZE = 0.6  # of the run's; below it a detector loses more than widths would cost (docs/search.md)


class GroupLike(Protocol):
    """What the space needs to know of a group (see ``pruning.graph.layers.Group``)."""

    @property
    def id(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def block(self) -> int: ...
    @property
    def layers(self) -> Sequence[str]: ...
    @property
    def channels(self) -> int: ...
    def widths(self, round_to: int) -> Sequence[int]: ...


class LayerLike(Protocol):
    """What the space needs to know of a layer (see ``pruning.graph.layers.Layer``)."""

    @property
    def name(self) -> str: ...
    @property
    def block(self) -> int: ...


class TableLike(Protocol):
    """What the space needs to know of a model (see ``pruning.graph.layers.LayerTable``)."""

    @property
    def layers(self) -> Sequence[LayerLike]: ...
    @property
    def groups(self) -> Sequence[GroupLike]: ...


@dataclass(frozen=True)
class GroupChoice:
    """A group with the widths the configuration leaves it, greatest first."""

    name: str
    block: int
    layers: tuple[str, ...]
    channels: int
    widths: tuple[int, ...]

    def nearest(self, ratio: float) -> int:
        """The allowed width whose ratio is nearest to ``ratio`` (the wider one of two equally near)."""
        return self.widths[self.level(ratio)]

    def level(self, ratio: float) -> int:
        """The index of that width."""
        above = bisect_left(self._ratios, ratio)
        if above == 0:
            return 0
        if above == len(self._ratios):
            return above - 1
        return above - 1 if ratio - self._ratios[above - 1] <= self._ratios[above] - ratio else above

    @cached_property
    def _ratios(self) -> list[float]:
        """Of the widths, rising. Kept: a run of thousands of trials asks some hundred thousand times at its start."""
        return [self.ratio(width) for width in self.widths]

    def ratio(self, width: int) -> float:
        """Fraction of channels removed at ``width``, in [0, 1)."""
        return round(1.0 - width / self.channels, 6)


@dataclass(frozen=True)
class Axis:
    """One variable of the search. ``groups[0]`` leads: the levels are its widths; the others follow by ratio."""

    name: str
    groups: tuple[GroupChoice, ...]

    @property
    def size(self) -> int:
        """How many levels there are (at least 2)."""
        return len(self.groups[0].widths)

    def widths(self, level: int) -> dict[str, int]:
        """Group name -> width at ``level``."""
        leader = self.groups[0]
        width = leader.widths[level]
        ratio = leader.ratio(width)
        return {leader.name: width, **{group.name: group.nearest(ratio) for group in self.groups[1:]}}

    def uniform(self, ratio: float) -> int:
        """The level nearest to ``ratio``."""
        return self.groups[0].level(ratio)

    def nearest(self, plan: Plan) -> int:
        """The level nearest to ``plan``, by the groups that are not inside a branch that it removes."""
        left = [group for group in self.groups if _left(group.layers, plan.branches)]
        ratios = {g.name: next((plan.ratios[layer] for layer in g.layers if layer in plan.ratios), 0.0) for g in left}
        if not left or left[0] is self.groups[0]:
            return self.groups[0].level(ratios[left[0].name]) if left else 0
        apart = [
            sum(abs(g.ratio(widths[g.name]) - ratios[g.name]) for g in left)
            for widths in map(self.widths, range(self.size))
        ]
        return apart.index(min(apart))


def _left(layers: Sequence[str], branches: Sequence[str]) -> list[str]:
    """The layers outside these branches."""
    return [layer for layer in layers if not any(layer.startswith(f"{branch}.") for branch in branches)]


@dataclass(frozen=True)
class SizeAxis:
    """The size of the input: the run's own, then smaller ones, their areas falling."""

    sizes: tuple[ImageSize, ...]
    name: str = "imgsz"

    @property
    def size(self) -> int:
        """How many levels there are (at least 2)."""
        return len(self.sizes)

    def uniform(self, ratio: float) -> int:
        """The run's own size."""
        return 0

    def nearest(self, plan: Plan) -> int:
        """The level nearest to ``plan``, by the side of a square of its area (the larger one of two equally near)."""
        wanted = plan.imgsz or self.sizes[0]
        side = math.sqrt(area_of(wanted))
        return min(
            range(self.size), key=lambda i: (abs(math.sqrt(area_of(self.sizes[i])) - side), self.sizes[i] != wanted)
        )


@dataclass(frozen=True)
class PrecisionAxis:
    """What the network's file computes in: the run's own precision, then the others in the order that was given."""

    precisions: tuple[str, ...]
    name: str = "precision"

    @property
    def size(self) -> int:
        """How many levels there are (at least 2)."""
        return len(self.precisions)

    def uniform(self, ratio: float) -> int:
        """The run's own precision."""
        return 0

    def nearest(self, plan: Plan) -> int:
        """The level of the plan's precision; of one that is not among them the run's own."""
        return self.precisions.index(plan.precision) if plan.precision in self.precisions else 0


@dataclass(frozen=True)
class Space:
    """All axes (of widths, of depth, the size, the precision) and the groups that were left out with the reason."""

    axes: tuple[Axis | DepthAxis | SizeAxis | PrecisionAxis, ...]
    left_out: Mapping[str, str]

    @property
    def width_axes(self) -> tuple[Axis, ...]:
        """The axes of widths."""
        return tuple(axis for axis in self.axes if isinstance(axis, Axis))

    @property
    def depth_axes(self) -> tuple[DepthAxis, ...]:
        """The axes of branches."""
        return tuple(axis for axis in self.axes if isinstance(axis, DepthAxis))

    @property
    def image_sizes(self) -> tuple[ImageSize, ...]:
        """The sizes of the input that plans choose from, the run's own first; () where that is the only one."""
        return next((axis.sizes for axis in self.axes if isinstance(axis, SizeAxis)), ())

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions that plans choose from, the run's own first; () where that is the only one."""
        return next((axis.precisions for axis in self.axes if isinstance(axis, PrecisionAxis)), ())

    @property
    def unpruned(self) -> list[Plan]:
        """The unpruned network at every size and in every precision, the run's own first."""
        sizes, precisions = (None, *self.image_sizes[1:]), (None, *self.precisions[1:])
        return [Plan({}, imgsz=size, precision=precision) for precision in precisions for size in sizes]

    @property
    def sizes(self) -> dict[str, int]:
        """Axis name -> number of levels."""
        return {axis.name: axis.size for axis in self.axes}

    def plan(self, levels: Levels) -> Plan:
        """The plan of ``levels``: ratios by layer, exactly what the widths realise (layers that keep all channels are
        absent, and those in removed branches), these branches, and size and precision where they are not the run's."""
        ratios: dict[str, float] = {}
        imgsz, precision, branches = None, None, list[str]()
        for axis, level in zip(self.axes, levels, strict=True):
            if isinstance(axis, SizeAxis):
                imgsz = axis.sizes[level] if level else None
            elif isinstance(axis, PrecisionAxis):
                precision = axis.precisions[level] if level else None
            elif isinstance(axis, DepthAxis):
                branches += axis.steps[level]
            else:
                widths = axis.widths(level)
                for group in axis.groups:
                    if widths[group.name] < group.channels:
                        ratios.update(dict.fromkeys(group.layers, group.ratio(widths[group.name])))
        left = {layer: ratios[layer] for layer in _left(list(ratios), branches)}
        return Plan(left, {}, imgsz, tuple(branches), precision)

    def canonical(self, levels: Levels) -> Levels:
        """Of all levels that give the same plan (they differ in widths inside removed branches), one."""
        return self.nearest(self.plan(levels)) if self.depth_axes else levels

    def levels_of(self, plan: Plan) -> Levels | None:
        """The levels that give ``plan`` (absent layers count as 0), None where no plan of this space is equal."""
        levels = self.nearest(plan)
        realised = self.plan(levels)
        cut = {layer: ratio for layer, ratio in plan.ratios.items() if ratio > 0}
        same = realised.ratios.keys() == cut.keys() and all(abs(realised.ratios[n] - cut[n]) < 1e-4 for n in cut)
        same = same and realised.imgsz == (None if self.image_sizes[:1] == (plan.imgsz,) else plan.imgsz)
        same = same and realised.precision == (None if self.precisions[:1] == (plan.precision,) else plan.precision)
        return levels if same and set(realised.branches) == set(plan.branches) else None

    def uniform(self, ratio: float) -> Levels:
        """The plan nearest to one ``ratio`` everywhere, within every axis's bounds, whole, at the run's own size and in
        its own precision."""
        return tuple(axis.uniform(ratio) for axis in self.axes)

    def nearest(self, plan: Plan) -> Levels:
        """The plan nearest to ``plan``, layer by layer (absent ones count as 0), within every axis's bounds."""
        return tuple(axis.nearest(plan) for axis in self.axes)

    def random_narrower(self, generator: random.Random) -> Levels:
        """Levels drawn among those that narrow every axis."""
        return tuple(generator.randrange(1, axis.size) for axis in self.axes)

    def random(self, generator: random.Random) -> Levels:
        """A plan drawn uniformly."""
        return tuple(generator.randrange(axis.size) for axis in self.axes)

    def count(self) -> int:
        """How many levels there are in all; different plans are fewer where branches may leave (`canonical`)."""
        total = 1
        for axis in self.axes:
            total *= axis.size
        return total


def image_sizes(own: ImageSize, wanted: Sequence[ImageSize] | None, stride: int) -> tuple[ImageSize, ...]:
    """The sizes of the input that a search may choose, their areas falling; ``own``, the run's, is always the first.

    ``wanted`` None: what lies below ``own`` down to 0.6 of it in steps of ``stride`` (the network's largest, 32 at
    least), evenly chosen where that are more than 5; of a rectangle's the longer side takes every step, and the other
    one the step that keeps the shape best. Raises :class:`SpaceError` for a size whose area is not
    below the run's, and for one that is no multiple of the stride.
    """
    if wanted is None:
        every = [size for size in _same_shape(own, stride) if _is_within(size, own)] or [own]
        count = min(MOST_SIZES, len(every))
        return tuple(every[round(step * (len(every) - 1) / max(1, count - 1))] for step in range(count))
    for size in wanted:
        if size != own and area_of(size) >= area_of(own):
            pair = "" if isinstance(own, int) else " (a rectangle is [height, width] there)"
            raise SpaceError(
                f"space.imgsz: every size must be at most the run's {size_text(own)} px, but got {size_text(size)}; "
                f"leave it out{pair}, or give a greater --imgsz"
            )
        below = tuple(max(stride, side // stride * stride) for side in height_width(size))
        if below != height_width(size):
            raise SpaceError(
                f"space.imgsz: every size must be a multiple of {stride}, the largest stride of the "
                f"model, but got {size_text(size)}; give {size_text(read_size(below))}"
            )
    return tuple(sorted({own, *wanted}, key=lambda size: (area_of(size), height_width(size)), reverse=True))


def _same_shape(own: ImageSize, stride: int) -> Iterator[ImageSize]:
    for longer in range(larger_side(own), 0, -stride):
        shares = (longer * side / larger_side(own) / stride for side in height_width(own))
        yield read_size([max(1, math.floor(share + 0.5)) * stride for share in shares])


def _is_within(size: ImageSize, own: ImageSize) -> bool:
    sides = zip(height_width(size), height_width(own), strict=True)
    return all(side >= SMALLEST_SIZE * its for side, its in sides)


def build_space(
    table: TableLike,
    section: SpaceSection,
    first_only: bool = False,
    sizes: Sequence[ImageSize] = (),
    branches: Branches | None = None,
    precisions: Sequence[str] = (),
) -> Space:
    """The space of ``section`` over a model's groups; ``first_only``: of each block the first one that is left.

    ``branches``: of the model, where plans may remove them. ``sizes``: of the input, the run's own first
    (see :func:`image_sizes`), ``precisions``: of their files, the run's own first; an axis where they are several.

    Raises :class:`SpaceError` where a block or a pattern matches nothing, or where no axis is left.
    """
    names = {layer.name for layer in table.layers}
    check_patterns(names, section)
    _check_blocks(table, section)
    choices: list[GroupChoice] = []
    left_out: dict[str, str] = {}
    for group in table.groups:
        choice, reason = _choice(group, section, names)
        if choice is not None and first_only and any(chosen.block == group.block for chosen in choices):
            choice, reason = None, "strategy sequential cuts the first layer of a block only"
        if choice is None:
            left_out[group.name] = reason
        else:
            choices.append(choice)
    axes = _axes(choices, section.granularity)
    if not axes:
        raise SpaceError(
            f"nothing is left to prune: all {len(table.groups)} groups are left out "
            f"({_summary(left_out)}); widen space.blocks, space.exclude, the ratios, or lower space.round_to"
        )
    depth = [] if branches is None else depth_axes(branches, lambda name: _may_leave(name, names, section))
    size = [SizeAxis(tuple(sizes))] if len(sizes) > 1 else []
    precision = [PrecisionAxis(tuple(precisions))] if len(precisions) > 1 else []
    return Space((*axes, *depth, *size, *precision), left_out)


def _may_leave(branch: str, names: Collection[str], section: SpaceSection) -> bool:
    """Whether a branch lies in a block that may be pruned, and none of its layers is to keep its width."""
    if section.blocks is not None and int(branch.split(".")[1]) not in section.blocks:
        return False
    inside = [name for name in names if name.startswith(f"{branch}.")]
    return not any(means(pattern, layer, names) for pattern in section.exclude for layer in inside)


def _axes(choices: Sequence[GroupChoice], granularity: str) -> list[Axis]:
    if granularity == "layer":
        return [Axis(choice.name, (choice,)) for choice in choices]
    blocks: dict[int, list[GroupChoice]] = {}
    for choice in choices:
        blocks.setdefault(choice.block, []).append(choice)
    axes = []
    for block, members in sorted(blocks.items()):
        # The group with most widths leads, so that every level changes at least its width.
        members.sort(key=lambda choice: -len(choice.widths))
        axes.append(Axis(f"model.{block}", tuple(members)))
    return axes


def _choice(group: GroupLike, section: SpaceSection, names: Collection[str]) -> tuple[GroupChoice | None, str]:
    if section.blocks is not None and group.block not in section.blocks:
        return None, "its block is not in space.blocks"
    for pattern in section.exclude:
        if any(means(pattern, layer, names) for layer in group.layers):
            return None, f"excluded by {pattern}"
    key = governing(section.layer_bounds, group.layers, names)
    low, high = (section.min_ratio, section.max_ratio) if key is None else section.layer_bounds[key]
    allowed = [w for w in group.widths(section.round_to) if low - 1e-9 <= 1.0 - w / group.channels <= high + 1e-9]
    if len(allowed) < 2:
        return None, f"no two widths in steps of {section.round_to} lie between ratio {low:g} and {high:g}"
    return GroupChoice(group.name, group.block, tuple(group.layers), group.channels, tuple(allowed)), ""


def check_patterns(names: Collection[str], section: SpaceSection) -> None:
    """Every pattern of ``section`` matches one of ``names``; :class:`SpaceError` names the first that does not."""
    for setting, patterns in (
        ("space.exclude", list(section.exclude)),
        ("space.layer_bounds", list(section.layer_bounds)),
    ):
        for pattern in patterns:
            if not any(means(pattern, name, names) for name in names):
                raise SpaceError(
                    f"{setting}: the pattern {pattern!r} matches no layer; list them with `paretoprune layers MODEL`"
                )


def _check_blocks(table: TableLike, section: SpaceSection) -> None:
    blocks = sorted({group.block for group in table.groups})
    unknown = [block for block in section.blocks or [] if block not in blocks]
    if unknown:
        raise SpaceError(
            f"space.blocks: block {unknown[0]} has nothing to prune; blocks that have are "
            f"{', '.join(str(block) for block in blocks)}"
        )


def _summary(left_out: Mapping[str, str]) -> str:
    reasons = list(left_out.values())
    return "; ".join(f"{reasons.count(reason)} because {reason}" for reason in dict.fromkeys(reasons)) or "none found"
