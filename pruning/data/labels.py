"""What a split's labels say, by Ultralytics' own reading of them, as far as it has to be known before work starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultralytics.data import utils as data_utils

from paretoprune.base.errors import one_line
from paretoprune.pruning.data.reading import label_paths
from paretoprune.pruning.yolo.dataset_patches import LABEL_CLASSES, LABEL_NUMBERS
from paretoprune.pruning.yolo.ultralytics_logging import quiet_ultralytics

_OUTLINED = {"segment", "obb"}  # tasks whose labels are outlines


@dataclass(frozen=True)
class LabelReading:
    """The labels of a split, read up to the first image with an object of the dataset's classes in it.

    `objects`: there is such an image. `files`, `empty`, `unusable`: label files that were read until then, those of
    them without such an object (`nothing`, in words), and those (or their images) that Ultralytics would pass over;
    `first`: why the first of these. `outlines`: the first objects are outlines, no boxes. `sought`: the label file that
    the first image would have.
    """

    objects: bool
    files: int
    empty: int
    unusable: int
    first: str
    outlines: bool
    sought: str
    nothing: str = "empty"

    def refusal(self, images: int, task: str) -> str | None:
        """What keeps a model of `task` from being trained or judged by these labels, to follow "labels of ... "."""
        if self.objects and task in _OUTLINED and not self.outlines:
            return f"must be outlines for the task '{task}', but got boxes: give a dataset with polygons"
        if self.objects:
            return None
        if self.unusable:
            others = f" and {self.empty} are {self.nothing}" if self.empty else ""
            return f"must be usable, but {self.unusable} of {self.files} are not{others}, the first: {self.first}"
        if self.empty:
            return f"must hold objects, but all {self.files} of them are {self.nothing}"
        near = _other_name(self.sought)
        there = f" (there is '{near}', which is no image's)" if near else ""
        return f"must lie beside its images, but none of its {images} has any{there}: put them at '{self.sought}' ..."


def read_labels(images: Sequence[str], content: Mapping[str, Any], task: str, single_class: bool) -> LabelReading:
    """Read the labels of a split's `images`, which are not none, until an object is found."""
    files = empty = unusable = 0
    first, objects, outlines = "", False, False
    nkpt, ndim = content.get("kpt_shape") or (0, 0)
    numbers = content.get(LABEL_NUMBERS)  # of the classes that are wanted, where these are not all
    nothing = "empty" if numbers is None else f"without one of {', '.join(content['names'].values())}"
    given = ("", task == "pose", content.get(LABEL_CLASSES) or len(content["names"]), nkpt, ndim, single_class)
    labels = label_paths(images)
    with quiet_ultralytics():
        for image, label in zip(images, labels, strict=True):
            if not Path(label).is_file():
                continue
            found = data_utils.verify_image_label((image, label, *given))
            files += 1
            if found[0] is None:
                unusable += 1
                first = first or f"{label if _is_readable(image) else image}: {_reason(str(found[-1]))}"
            elif len(found[1]) == 0 or (numbers is not None and not set(numbers).intersection(found[1][:, 0])):
                empty += 1
            else:
                objects, outlines = True, len(found[3]) > 0
                break
    return LabelReading(objects, files, empty, unusable, first, outlines, labels[0], nothing)


def _is_readable(image: str) -> bool:
    try:
        data_utils.check_image(image)
    except Exception:  # noqa: BLE001  whatever Ultralytics passes over
        return False
    return True


def _reason(message: str) -> str:
    """What Ultralytics says after the file's name."""
    return one_line(message.partition("ignoring corrupt image/label: ")[2] or message)


def _other_name(sought: str) -> str | None:
    """A label file in the folder of `sought` that has another name."""
    return next((path.name for path in sorted(Path(sought).parent.glob("*.txt"))), None)
