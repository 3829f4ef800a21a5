"""Which images of a dataset Ultralytics passed over as corrupt: it says so once, in a log, when it reads the labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paretoprune.pruning.data.dataset import dataset_file
from paretoprune.pruning.data.reading import image_paths, label_paths, read_dataset
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.yolo.dataset_patches import is_image_list
from paretoprune.pruning.yolo.label_cache import load_labels

_SAYS = "ignoring corrupt"


def ignored_images(data: str | Path) -> list[str]:
    """A line for each, as Ultralytics noted it beside the labels; [] before the first training, or where nothing is.

    Such an image is in no training and no validation, of the unpruned network neither, so figures stay comparable.
    """
    try:
        content = read_dataset(dataset_file(data))
    except PruningError:  # not a dataset of label files
        return []
    lines = [line for split in ("train", "val") for line in _noted(content.get(split))]
    return [line.strip() for line in dict.fromkeys(lines) if _SAYS in line]


def _noted(places: Any) -> list[str]:
    if is_image_list(places):
        cache: Path | None = Path(places).with_suffix(".cache")
    else:
        images = image_paths(places)
        cache = Path(label_paths(images[:1])[0]).parent.with_suffix(".cache") if images else None  # one for the split
    if cache is None:
        return []
    try:
        return [str(line) for line in load_labels(cache).get("msgs", ())]
    except Exception:  # noqa: BLE001  none, or a damaged one: it is made anew
        return []
