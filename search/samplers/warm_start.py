"""The warm start: plans that are good guesses before anything was tried.

Uniform: one ratio over all layers. Measured on a synthetic front, this start alone beats
a sampler without it for the first hundreds of trials; it is also what people do by hand.

By sensitivity: widths that leave a share of the multiply-adds at the least estimated loss
(`pruning.importance.allocation`). Measured on a blood-cell detector with 63 % of the multiply-adds left, refitted,
before any epoch: 0.601 mAP50-95 where the uniform plan has 0.573 (unpruned 0.612).

Where the input's size may be chosen, the cut is shared between it and the widths. On VOC (yolov8n at 320 px, unpruned
0.540, refitted, no gradient step) half of the multiply-adds give 0.423 by widths alone, 0.457 at 288 px, 0.495 at 256
px and 0.472 by the size alone; a third gives 0.295, 0.361, 0.414, 0.434 at 224 px and 0.428. So the size takes most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from paretoprune.base.image_size import ImageSize, area_of
from paretoprune.pruning.plan import Plan
from paretoprune.search.space.space import Levels, Space

LIGHTEST, HEAVIEST = 0.1, 0.6
# Then the sampler knows more. On the synthetic problem it has 0.71 of the front after 25 trials and 0.82 after 50 with
# 5 uniform plans, 0.68 and 0.80 with 11; with 4, 6, 8 and 16 plans by sensitivity 0.74, 0.82, 0.83 and 0.85 after 6
# trials, 0.86, 0.87, 0.87 and 0.88 after 12, 0.93, 0.92, 0.91 and 0.90 after 25.
MOST_STEPS, MOST_SENSIBLE = 5, 6
SIZE_SHARE = 0.8  # of the logarithm of the work that is left; the widths take the rest
UNIFORM, SENSITIVITY = "ladder", "sensitivity"

T = TypeVar("T")


@dataclass(frozen=True)
class InitialPlan:
    """A plan to try before the sampler is asked; ``provenance`` goes into its record."""

    levels: Levels
    provenance: str


def warm_start(space: Space, trials: int, sensitivity: Sequence[Mapping[str, Any]] = ()) -> list[InitialPlan]:
    """The initial plans of a run of ``trials`` trials, from the middle of their range outwards.

    ``sensitivity``: rows of ``baseline.json`` (``keep``, ``ratios``), each the best plan of widths that leaves so much
    work; it becomes a plan of as much work in all (see `_shared`). With them, the first 6 trials come from them,
    from the middles of equal parts of the path, and precisions take turns along it, so that each is tried from light to
    heavy. Without them, a quarter of the trials, at most 5, are uniform, which on VOC and COCO keep a tenth of the
    accuracy of plans by sensitivity with as much work. A sweep that ends early has the whole front in outline.
    """
    rows = sorted(sensitivity, key=lambda row: -float(row["keep"]))
    path = [_shared(space, rows, float(row["keep"])) for row in rows]
    precisions = space.precisions or (None,)
    if rows:
        spread = enumerate(_spread(path, min(MOST_SENSIBLE, trials)))
        chosen = [space.nearest(replace(plan, precision=precisions[n % len(precisions)])) for n, plan in spread]
    else:
        chosen = ladder_plans(space, trials)
    unpruned, provenance = space.uniform(0.0), SENSITIVITY if rows else UNIFORM
    different = dict.fromkeys(levels for levels in _halving(chosen) if levels != unpruned)
    return [InitialPlan(levels, provenance) for levels in different][:trials]


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


def _shared(space: Space, rows: Sequence[Mapping[str, Any]], work: float) -> Plan:
    """A plan that leaves the share ``work`` of the multiply-adds: a smaller input takes most of the cut, as far
    as the space has one, the widths of the row of nearest ``keep`` the rest."""
    sizes: tuple[ImageSize, ...] = space.image_sizes or (1,)
    areas = [area_of(size) / area_of(sizes[0]) for size in sizes]
    allowed = [level for level, area in enumerate(areas) if area >= work]  # a smaller one leaves less with all channels
    level = min(allowed, key=lambda i: abs(math.log(areas[i]) - SIZE_SHARE * math.log(work)))
    row = min(rows, key=lambda row: abs(float(row["keep"]) - work / areas[level]))
    return Plan(row["ratios"], imgsz=sizes[level] if level else None)


def _spread(path: Sequence[Plan], count: int) -> list[Plan]:
    """``count`` plans of the path: the middles of as many equal parts. Its ends are worth little: the one is hardly
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
