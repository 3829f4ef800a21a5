"""How far two networks' answers to one image are apart, told by what each number of them means.

An answer is a row for each box: its coordinates, its scores, then what the task adds to it: mask coefficients,
keypoints or an angle. An end-to-end head sorts its rows by score, so that a rounding error changes their places: these
are compared with the row that they are nearest to, those of other heads with the row at the same place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from paretoprune.pruning.errors import PruningError

Array = np.ndarray[Any, Any]

CONFIDENT = 0.25
MOST_OBJECTS = 100  # whose further values are compared, the most confident ones: masks take long


@dataclass(frozen=True)
class Layout:
    """What the numbers of an answer mean. ``kind``: "" for a network without boxes; then they are compared as they are.

    end_to_end: rows of box, score, class, more; else of box, a score for each of the ``classes``, more.
    keypoints: how many a box has and values of each (two coordinates, a visibility where there are three).
    size: height and width of the image in the unit of the coordinates: pixels, or 1 where they are fractions already.
    """

    kind: str
    classes: int = 0
    end_to_end: bool = False
    keypoints: tuple[int, int] = (0, 0)
    size: tuple[float, float] = (1.0, 1.0)

    @property
    def side(self) -> float:
        """The longer one, which distances are fractions of."""
        return max(self.size)

    @property
    def centred(self) -> bool:
        """Boxes are centre, width and height; else two corners."""
        return not self.end_to_end or self.kind in ("obb", "rtdetr")


def layout_of(model: nn.Module, size: tuple[int, int]) -> Layout:
    """The layout of a network's answers to images of `size` (height, width), by its head."""
    from ultralytics.nn.modules import OBB, Detect, Pose, RTDETRDecoder, Segment

    head: Any = model.model[-1]  # type: ignore[index]
    if isinstance(head, RTDETRDecoder):
        return Layout("rtdetr", head.nc, end_to_end=True)  # its boxes are fractions already
    if not isinstance(head, Detect):
        return Layout("")
    kinds = {Segment: "segment", Pose: "pose", OBB: "obb"}
    kind = next((name for its, name in kinds.items() if isinstance(head, its)), "detect")
    keypoints = tuple(head.kpt_shape) if kind == "pose" else (0, 0)
    return Layout(kind, head.nc, bool(head.end2end), keypoints, (float(size[0]), float(size[1])))


def differences(ours: Sequence[Array], theirs: Sequence[Array], layout: Layout) -> tuple[int, float, float]:
    """(objects of ours, largest difference of a score, largest of a place as a fraction of the image's side).

    Both are a network's outputs for one image, the predictions first, then the prototypes of masks. Scores are compared
    for all boxes, the rest for objects, which are the boxes with a score above `CONFIDENT`: visibility of keypoints and
    the mean difference of a mask within its box count as scores; keypoints and what a turn does to a corner as places.
    """
    for mine, its in zip(ours, theirs, strict=False):  # a classifier's checkpoint gives logits too
        if mine.shape != its.shape:
            raise PruningError(f"both must answer alike, but the checkpoint gives {mine.shape}, the export {its.shape}")
    if not layout.kind:
        return 0, float(np.abs(ours[0] - theirs[0]).max()), 0.0
    if len(ours) != len(theirs):
        raise PruningError(
            f"both must answer alike, but the checkpoint gives {len(ours)} outputs, the export {len(theirs)}"
        )
    first, second = (_Boxes.read(answer, layout) for answer in (ours, theirs))
    objects = first.objects()
    if layout.end_to_end:
        scores = float(np.abs(np.sort(first.scores[:, 0]) - np.sort(second.scores[:, 0])).max())
        there, back = first.matched(objects, second), second.matched(second.objects(), first)
        pairs = [(first, second, *there), (second, first, *back)]
    else:
        scores = float(np.abs(first.scores - second.scores).max())
        pairs = [(first, second, objects, objects)]
    found = [one.apart(other, mine, yours) for one, other, mine, yours in pairs]
    return len(objects), max(scores, *(score for score, _ in found)), max(place for _, place in found)


@dataclass(frozen=True)
class _Boxes:
    """The rows of one answer, taken apart. ``label``: of an end-to-end head, else 0."""

    layout: Layout
    boxes: Array
    scores: Array
    label: Array
    more: Array
    prototypes: Array | None

    @classmethod
    def read(cls, answer: Sequence[Array], layout: Layout) -> _Boxes:
        rows = answer[0][0] if layout.end_to_end else answer[0][0].T
        ends = 5 if layout.end_to_end else 4 + layout.classes
        label, rest = (rows[:, 5], 6) if layout.end_to_end else (np.zeros(len(rows)), ends)
        prototypes = answer[1][0] if layout.kind == "segment" else None
        return cls(layout, rows[:, :4], rows[:, 4:ends], label, rows[:, rest:], prototypes)

    def objects(self) -> Array:
        """Numbers of the rows that are objects."""
        return np.flatnonzero(self.scores.max(axis=1) > CONFIDENT)

    def matched(self, objects: Array, other: _Boxes) -> tuple[Array, Array]:
        """``objects``, and for each the nearest row of its class in ``other``; of any class, if there is none."""
        if not len(objects):
            return objects, objects
        far = np.abs(self.boxes[objects, None] - other.boxes[None]).max(axis=2) / self.layout.side
        far = far + np.abs(self.scores[objects] - other.scores[:, 0][None])
        far = far + 10.0 * (self.label[objects, None] != other.label[None])
        return objects, far.argmin(axis=1)

    def apart(self, other: _Boxes, mine: Array, yours: Array) -> tuple[float, float]:
        """Largest difference in score and in place between my rows and the other's."""
        if not len(mine):
            return 0.0, 0.0
        most = np.argsort(-self.scores[mine].max(axis=1))[:MOST_OBJECTS]
        mine, yours = mine[most], yours[most]
        scores = [np.abs(self.scores[mine] - other.scores[yours]).max()]
        scores += [1.0] if (self.label[mine] != other.label[yours]).any() else []
        places = [np.abs(self.boxes[mine] - other.boxes[yours]).max() / self.layout.side]
        more, theirs = self.more[mine], other.more[yours]
        if self.layout.kind == "pose":
            number, values = self.layout.keypoints
            gaps = np.abs(more - theirs).reshape(-1, number, values)
            places.append(gaps[..., :2].max() / self.layout.side)
            scores += [gaps[..., 2].max()] if values == 3 else []
        if self.layout.kind == "obb":
            turn = np.abs(more[:, 0] - theirs[:, 0]) % np.pi
            turn = np.minimum(turn, np.pi - turn)
            places.append((turn * np.hypot(*self.boxes[mine, 2:].T) / 2).max() / self.layout.side)
        if self.layout.kind == "segment":
            scores += [
                _mask_gap(before, after, self._region(row))
                for row, before, after in zip(mine, self._masks(more), other._masks(theirs), strict=True)
            ]
        return float(max(scores)), float(max(places))

    def _masks(self, coefficients: Array) -> Array:
        """The probability of each pixel of the prototypes' grid to be in the object, (objects, height, width)."""
        assert self.prototypes is not None
        drawn = np.tensordot(coefficients, self.prototypes, axes=1)
        shares: Array = 0.5 * (1 + np.tanh(drawn / 2))  # the sigmoid, without an overflow
        return shares

    def _region(self, row: int) -> tuple[slice, slice]:
        """A box on the prototypes' grid, at least one pixel wide and high."""
        assert self.prototypes is not None
        height, width = self.prototypes.shape[1:]
        tall, wide = self.layout.size
        box = self.boxes[row] / (wide, tall, wide, tall)
        x0, y0, x1, y1 = (*(box[:2] - box[2:] / 2), *(box[:2] + box[2:] / 2)) if self.layout.centred else box
        return _span(y0, y1, height), _span(x0, x1, width)


def _mask_gap(before: Array, after: Array, region: tuple[slice, slice]) -> float:
    return float(np.abs(before[region] - after[region]).mean())


def _span(start: float, end: float, size: int) -> slice:
    first = int(np.clip(np.floor(start * size), 0, size - 1))
    return slice(first, int(np.clip(np.ceil(end * size), first + 1, size)))
