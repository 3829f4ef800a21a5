"""The warm start: plans that are good guesses before anything was tried.

Uniform: one ratio over all layers. Measured on a synthetic front, this start alone beats
a sampler without it for the first hundreds of trials; it is also what people do by hand.

By sensitivity: widths that leave a share of the multiply-adds at the least estimated loss
(`pruning.importance.allocation`). Measured on a blood-cell detector with 63 % of the multiply-adds left, refitted,
before any epoch: 0.601 mAP50-95 where the uniform plan has 0.573 (unpruned 0.612).

Where the input's size may be chosen, the cut is shared between it and the widths, by what each has cost so far: the
unpruned network at smaller sizes is measured beside the first trials. On VOC (yolov8n at 320 px, unpruned 0.540,
refitted, no gradient step) half of the multiply-adds give 0.423 by widths alone, 0.457 at 288 px, 0.495 at 256 px and
0.472 by the size alone; the built-in detector (0.905 at 160 px) loses 0.033 by the size at 64 %, 0.003 by widths at
69 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any, TypeVar

import numpy as np

from paretoprune.base.image_size import ImageSize, area_of
from paretoprune.pruning.plan import Plan
from paretoprune.search.space.space import Levels, Space

LIGHTEST, HEAVIEST = 0.1, 0.6
# Then the sampler knows more. On the synthetic problem it has 0.71 of the front after 25 trials and 0.82 after 50 with
# 5 uniform plans, 0.68 and 0.80 with 11; with 4, 6, 8 and 16 plans by sensitivity 0.74, 0.82, 0.83 and 0.85 after 6
# trials, 0.86, 0.87, 0.87 and 0.88 after 12, 0.93, 0.92, 0.91 and 0.90 after 25.
MOST_STEPS, MOST_SENSIBLE = 5, 6
PRIOR_WEIGHT = 0.0625  # of the guess that widths cost as much as the size: that of a plan whose widths leave 0.61
UNIFORM, SENSITIVITY = "ladder", "sensitivity"

T = TypeVar("T")


@dataclass(frozen=True)
class InitialPlan:
    """A plan to try before the sampler is asked; ``provenance`` goes into its record.

    ``revised``: its levels in the light of the accuracies (higher is better) of plans that are known when its turn
    comes; None where they do not matter.
    """

    levels: Levels
    provenance: str
    revised: Callable[[Mapping[Levels, float]], Levels] | None = field(default=None, compare=False)


def warm_start(space: Space, trials: int, sensitivity: Sequence[Mapping[str, Any]] = ()) -> list[InitialPlan]:
    """The initial plans of a run of ``trials`` trials, from the middle of their range outwards.

    ``sensitivity``: rows of ``baseline.json`` (``keep``, ``ratios``), each the best plan of widths that leaves so much
    work; it becomes a plan of as much work in all (see `SensitivityPath`). With them, the first 6 trials come from
    them, from the middles of equal parts of the path, and precisions take turns along it, so that each is tried from
    light to heavy. Without them, a quarter of the trials, at most 5, are uniform, which on VOC and COCO keep a tenth
    of the accuracy of plans by sensitivity with as much work. A sweep that ends early has the whole front in outline.
    """
    unpruned, starts = space.uniform(0.0), []
    if sensitivity:
        path = SensitivityPath(space, sensitivity)
        for turn, row in enumerate(_spread(path.rows, min(MOST_SENSIBLE, trials))):
            precision = turn % max(1, len(space.precisions))
            its = partial(path.levels, float(row["keep"]), precision)
            starts.append(InitialPlan(its({}), SENSITIVITY, its if space.image_sizes else None))
    else:
        starts = [InitialPlan(levels, UNIFORM) for levels in ladder_plans(space, trials)]
    first: dict[Levels, InitialPlan] = {}
    for start in _halving(starts):
        if start.levels != unpruned:
            first.setdefault(start.levels, start)
    return list(first.values())[:trials]


class SensitivityPath:
    """Plans of least estimated loss, where the input's size may take a part of the cut: which one is by what is known.

    What a cut costs is taken to grow with the square of the logarithm of the work: VOC's yolov8n loses 0.029, 0.108,
    0.262 by widths that leave 0.7, 0.5, 0.3 of the work (exponent 1.9), the built-in detector 0.033 and 0.193 by sizes
    of 0.64 and 0.36 (2.1).
    """

    def __init__(self, space: Space, sensitivity: Sequence[Mapping[str, Any]]) -> None:
        self.rows = sorted(sensitivity, key=lambda row: -float(row["keep"]))
        self._space = space
        sizes: tuple[ImageSize, ...] = space.image_sizes or (1,)
        self._areas = np.array([area_of(size) / area_of(sizes[0]) for size in sizes])
        self._precisions = range(max(1, len(space.precisions)))
        self._places = {
            self._plan(row, size, precision): (row, size, precision)
            for row, size, precision in product(range(len(self.rows)), range(len(sizes)), self._precisions)
        }

    def levels(self, work: float, precision: int, known: Mapping[Levels, float]) -> Levels:
        """The plan that leaves the share ``work`` of the multiply-adds at the least expected loss of accuracy."""
        by_size, by_width = self._costs(known)
        allowed = np.flatnonzero(self._areas >= work - 1e-9)  # a smaller input leaves less with all channels
        cut = np.log(work / self._areas[allowed])
        size = int(allowed[np.argmin(by_size[allowed] + by_width * cut**2)])
        rest = work / self._areas[size]
        row = min(range(len(self.rows)), key=lambda row: abs(float(self.rows[row]["keep"]) - rest))
        return self._plan(row, size, precision)

    def _costs(self, known: Mapping[Levels, float]) -> tuple[np.ndarray, float]:
        """Accuracy that every size costs, and what widths cost that divide the work by e. Where nothing is known both
        cost the same, in a unit of its own."""
        squares = np.log(self._areas) ** 2
        lost: dict[int, list[float]] = {}
        for size, precision in product(range(1, len(self._areas)), self._precisions):
            if (drop := self._drop(known, self._unpruned(size, precision), precision)) is not None:
                lost.setdefault(size, []).append(drop)
        if not lost:
            return squares, 1.0
        measured = {size: max(0.0, float(np.mean(drops))) for size, drops in lost.items()}
        over = list(measured)
        slope = float(squares[over] @ list(measured.values()) / (squares[over] @ squares[over]))
        by_size = np.array([measured.get(size, slope * square) for size, square in enumerate(squares)])
        by_size = np.maximum.accumulate(by_size)  # a smaller size that seems better is noise
        above, below = PRIOR_WEIGHT * slope, PRIOR_WEIGHT
        for levels, (row, size, precision) in self._places.items():
            if (drop := self._drop(known, levels, precision)) is not None:
                square = math.log(float(self.rows[row]["keep"])) ** 2
                above, below = above + square * (drop - by_size[size]), below + square**2
        return by_size, max(above / below, 1e-9)

    def _drop(self, known: Mapping[Levels, float], levels: Levels, precision: int) -> float | None:
        """From the unpruned network of the run's size in the same precision; None where either is not known."""
        whole = self._unpruned(0, precision)
        return known[whole] - known[levels] if levels in known and whole in known else None

    def _plan(self, row: int, size: int, precision: int) -> Levels:
        return self._at(self.rows[row]["ratios"], size, precision)

    def _unpruned(self, size: int, precision: int) -> Levels:
        return self._at({}, size, precision)

    def _at(self, ratios: Mapping[str, float], size: int, precision: int) -> Levels:
        space = self._space
        imgsz = space.image_sizes[size] if space.image_sizes else None
        return space.nearest(
            Plan(ratios, imgsz=imgsz, precision=space.precisions[precision] if space.precisions else None)
        )


def ladder_ratios(trials: int) -> list[float]:
    """The ratios to try when a run has ``trials`` trials in all: about a quarter of them, at least 2, at most 5."""
    steps = min(MOST_STEPS, max(2, round(trials / 4)), trials)
    if steps == 1:
        return [(LIGHTEST + HEAVIEST) / 2]
    return [LIGHTEST + (HEAVIEST - LIGHTEST) * step / (steps - 1) for step in range(steps)]


def ladder_plans(space: Space, trials: int) -> list[Levels]:
    """Different plans of the ladder, lightest first; bounds may make steps equal, and those are left out once seen."""
    plans = [space.uniform(ratio) for ratio in ladder_ratios(trials)]
    unpruned = space.uniform(0.0)
    return [plan for plan in dict.fromkeys(plans) if plan != unpruned]


def _spread(path: Sequence[T], count: int) -> list[T]:
    """``count`` items of the path: the middles of as many equal parts. Its ends are worth little: the one is hardly
    pruned, the other hardly a detector."""
    count = min(count, len(path))
    return [path[int((part + 0.5) * len(path) / count)] for part in range(count)]


def _halving(items: Sequence[T]) -> list[T]:
    """The middle one, then the middle ones of the two halves, the later half first, and so on."""
    found, parts = [], [(0, len(items))]
    for low, high in parts:  # grows meanwhile
        if low < high:
            middle = (low + high) // 2
            found.append(items[middle])
            parts += [(middle + 1, high), (low, middle)]
    return found
