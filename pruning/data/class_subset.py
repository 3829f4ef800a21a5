"""Some of a dataset's classes as a dataset of its own: a small file, read wherever this project reads a dataset.

The user's images, labels and caches stay as they are and where they are. Objects of the other classes are left out as
the labels are read, those of the kept ones numbered anew; an image without any is then one of background. Of a
classifier's folder the images of the other classes are left out.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from paretoprune.base.atomic import write_text
from paretoprune.pruning.data import class_folders
from paretoprune.pruning.data.dataset import check_classes, dataset_file
from paretoprune.pruning.data.reading import read_dataset
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.yolo.dataset_patches import LABEL_CLASSES, LABEL_NUMBERS
from paretoprune.pruning.yolo.saving import task_of


def class_subset(data: str | Path, model: nn.Module, kept: Sequence[int], folder: Path) -> str:
    """Write the dataset of these rising numbers of the classes of `data` into `folder`; what to give as `data` for it.

    `model`: of all classes. Raises PruningError unless the dataset's classes are the model's. Stock Ultralytics refuses
    what is written: it would take the labels' numbers for those of the kept classes.
    """
    check_classes(data, model)
    if task_of(model) != "classify":
        return _write_yaml(dataset_file(data), kept, folder)
    names = class_folders.numbered(data, dict(model.names))  # type: ignore[arg-type]
    return _write_list(class_folders.folder_of(data), [names[number] for number in kept], folder)


def subset_names(data: str | Path) -> list[str]:
    """The names of the classes of a dataset that `class_subset` wrote; [] of any other."""
    if str(data).endswith(class_folders.CLASS_LIST):
        return list(json.loads(Path(data).read_text(encoding="utf-8"))["classes"])
    content = read_dataset(Path(data)) if Path(data).is_file() and Path(data).suffix == ".yaml" else {}
    return list(content["names"].values()) if LABEL_NUMBERS in content else []


def source_of(subset: Path) -> str:
    """The dataset that `class_subset` wrote some classes of: its data.yaml, or a classifier's folder."""
    content = yaml.safe_load(subset.read_text(encoding="utf-8"))
    return str(content.get("folder") or content["source"])


def moved_subset(subset: Path, data: str | Path) -> str:
    """The same classes of the same dataset, which lies at `data` now; written beside `subset`."""
    content = yaml.safe_load(subset.read_text(encoding="utf-8"))
    if "folder" in content:
        return _write_list(class_folders.folder_of(data), content["classes"], subset.parent)
    return _write_yaml(dataset_file(data), content[LABEL_NUMBERS], subset.parent)


def _write_list(place: Path, classes: Sequence[str], folder: Path) -> str:
    text = json.dumps({"folder": str(place), "classes": list(classes)})
    return str(write_text(folder / f"{_stem(place)}{class_folders.CLASS_LIST}", text))


def _write_yaml(place: Path, kept: Sequence[int], folder: Path) -> str:
    whole = read_dataset(place)  # its paths are absolute
    numbers = whole.get(LABEL_NUMBERS) or range(len(whole["names"]))  # it may be some classes itself
    if kept[-1] >= len(numbers):
        raise PruningError(f"class {kept[-1]} is kept, but '{place}' has {len(numbers)}: give the whole dataset")
    content: dict[str, Any] = {"source": str(place.absolute())}
    content |= {name: value for name, value in whole.items() if name not in ("path", "yaml_file", "source")}
    content["names"] = [whole["names"][number] for number in kept]
    content[LABEL_NUMBERS] = [numbers[number] for number in kept]
    content[LABEL_CLASSES] = content["nc"] = whole.get(LABEL_CLASSES) or len(numbers)
    if isinstance(whole.get("kpt_names"), Mapping):
        content["kpt_names"] = {new: whole["kpt_names"][old] for new, old in enumerate(kept)}
    return str(write_text(folder / f"{_stem(place)}.yaml", yaml.safe_dump(content, sort_keys=False)))


def _stem(place: Path) -> str:
    """A name by where the dataset lies, which is written into the file."""
    return f"data-{hashlib.sha256(os.fsencode(place.absolute())).hexdigest()[:8]}"
