"""Checks of a dataset before any work starts: one clear line instead of a traceback minutes later."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from paretoprune.base.errors import one_line
from paretoprune.pruning.data import class_folders
from paretoprune.pruning.data.labels import read_labels
from paretoprune.pruning.data.reading import image_paths, label_paths, places_of, read_dataset
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.yolo.loading import input_channels
from paretoprune.pruning.yolo.saving import task_of
from paretoprune.pruning.yolo.tasks import is_single_class
from paretoprune.pruning.yolo.ultralytics_logging import quiet_ultralytics

_SHOWN = 20  # class names in an error


def dataset_file(data: str | Path, task: str = "detect") -> Path:
    """The data.yaml that `data` names: a path, a folder with one, or a name Ultralytics knows (`coco8.yaml`).

    For the task `classify` it is the folder that holds train/<class>/ and val/<class>/.
    Raises PruningError if there is none. Nothing is downloaded.
    """
    from ultralytics.data.utils import find_dataset_yaml
    from ultralytics.utils.checks import check_file

    if task == "classify":
        return class_folders.folder_of(data)
    with quiet_ultralytics():
        try:
            found = check_file(str(data), download=False, hard=False)
            path = Path(found) if isinstance(found, str) and found else None
            if path is not None and path.is_dir():
                path = find_dataset_yaml(path)
        except (OSError, ValueError, AssertionError) as error:
            raise PruningError(one_line(f"the dataset '{data}' cannot be read: {error}")) from error
    if path is None or not path.is_file():
        raise PruningError(f"a dataset is a data.yaml, but there is no file '{data}': give the path of an existing one")
    return path


def check_dataset(data: str | Path, model: nn.Module) -> list[str]:
    """Raise PruningError, in one line, if `model` cannot be trained and validated on `data`.

    Checked: the yaml is there and readable; its train and val images are there, as Ultralytics finds them, and some of
    them have objects that it takes; there are as many classes as the model has, in the same order; keypoints and images
    have the model's shape and channels. For a classifier: the folders of the classes are there and are the model's.
    Quick where the labels are good: it reads one of each split.

    Returns lines about what is passed over or taken on trust: a test split without labels, other names of the classes.
    """
    task = task_of(model)
    if task == "classify":
        class_folders.check(data, dict(model.names))  # type: ignore[arg-type]
        if input_channels(model) != 3:
            raise PruningError(
                "Ultralytics reads a classifier's images in colours, 3 channels, but the model takes "
                f"{input_channels(model)}: train one for colours"
            )
        return class_folders.remarks(data)
    path = dataset_file(data)
    content = read_dataset(path)
    remarks = _check_classes(path, content, model)
    _check_channels(path, content, model)
    for split in ("train", "val", "test"):
        why = _refusal(path, content, split, model)
        if why is not None and split != "test":
            raise PruningError(why)
        if why is not None and content.get(split):
            remarks.append(f"{why}; until then the test split is left out")
    return remarks


def check_classes(data: str | Path, model: nn.Module) -> None:
    """Raise PruningError unless the classes of `data` are the model's; nothing else is looked at."""
    if task_of(model) == "classify":
        class_folders.check(data, dict(model.names))  # type: ignore[arg-type]
    else:
        path = dataset_file(data)
        _check_classes(path, read_dataset(path), model)


def _refusal(path: Path, content: Mapping[str, Any], split: str, model: nn.Module) -> str | None:
    """Why `model` cannot use a split: it has no images, or its labels are not there or not usable."""
    places = content.get(split)
    if not places:
        return f"a dataset has train and val images, but '{path}' says nothing for '{split}': add the key"
    images = image_paths(places)
    if not images:
        missing = [place for place in places_of(places) if not place.exists()] or list(places_of(places))
        return f"'{split}' of '{path}' must hold images, but got none in '{missing[0]}': correct the path"
    task = task_of(model)
    why = read_labels(images, content, task, is_single_class(model)).refusal(len(images), task)
    return None if why is None else f"labels of '{split}' of '{path}' {why}"


def dataset_places(data: str | Path) -> list[str]:
    """The paths that training and validation on `data` read: the yaml, the images' places and their labels' folders."""
    path = Path(data)
    if path.is_dir() and not list(path.glob("*.y*ml")):
        return [str(place) for place in (path / "train", path / "val") if place.is_dir()]
    path = dataset_file(data)
    content = read_dataset(path)
    found = [str(path)]
    for split in ("train", "val"):
        for place in places_of(content.get(split)):
            labels = {Path(label).parent for label in label_paths(image_paths(str(place))[:1])}
            found += [str(place), *(str(folder) for folder in labels if folder.is_dir())]
    return list(dict.fromkeys(found))


def class_counts(data: str | Path, model: nn.Module, single_class: bool = False) -> tuple[int, int]:
    """(classes of `model`, classes of `data`; 1 where all are to be one). Raises PruningError for unreadable data."""
    task = task_of(model)
    path = dataset_file(data, task)
    if task == "classify":
        return _classes_of(model), sum(place.is_dir() for place in (path / "train").iterdir())
    return _classes_of(model), 1 if single_class else int(read_dataset(path)["nc"])


def has_split(data: str | Path, split: str, model: nn.Module) -> bool:
    """Whether the dataset names images for `split` ("test") with labels by which `model` can be judged."""
    if task_of(model) == "classify":
        return class_folders.has_classes(data, split)
    path = dataset_file(data)
    return _refusal(path, read_dataset(path), split, model) is None


def image_files(data: str | Path, split: str, most: int | None = None) -> list[Path]:
    """The first images of a split, at most so many; [] where there are none. Not for classifiers' folders."""
    return [Path(image) for image in image_paths(read_dataset(dataset_file(data)).get(split))[:most]]


def validation_images(data: str | Path, model: nn.Module) -> list[Path]:
    """The images of the validation split, of a classifier's folder too; [] where there are none."""
    if task_of(model) == "classify" and Path(data).suffix not in (".yaml", ".yml"):
        folder = class_folders.validation_folder(dataset_file(data, "classify"))
        return list(class_folders.images_by_class(folder)) if folder else []
    return image_files(data, "val")


def training_images(data: str | Path, model: nn.Module, most: int) -> int:
    """Images of the training split, at most so many."""
    if task_of(model) == "classify":
        return sum(1 for _ in islice(class_folders.images_by_class(dataset_file(data, "classify") / "train"), most))
    return len(image_files(data, "train", most))


def _classes_of(model: nn.Module) -> int:
    head: Any = list(model.model)[-1]  # type: ignore[arg-type]
    return int(getattr(head, "nc", len(getattr(model, "names", ()))))


def _check_classes(path: Path, content: dict[str, Any], model: nn.Module) -> list[str]:
    head: Any = list(model.model)[-1]  # type: ignore[arg-type]
    has, got = _classes_of(model), int(content["nc"])
    as_one = is_single_class(model) and has == 1
    if has != got and not as_one:
        raise PruningError(
            f"the dataset's classes must be the model's, but '{path}' has {got} and the model {has}: "
            "give the data.yaml it was trained on, or train the model on this one first"
        )
    shape, wanted = content.get("kpt_shape"), getattr(head, "kpt_shape", None)
    if wanted is not None and list(wanted) != list(shape or ()):
        raise PruningError(
            f"the dataset's keypoints must be the model's, but '{path}' says kpt_shape {shape} and the model has "
            f"{list(wanted)}: correct kpt_shape"
        )
    return [] if as_one else _check_names(path, dict(content["names"]), dict(model.names))  # type: ignore[arg-type]


def _check_channels(path: Path, content: Mapping[str, Any], model: nn.Module) -> None:
    """By `channels` (3 where the yaml says nothing) Ultralytics reads images in grey, in colours, or as they are."""
    takes, has = input_channels(model), int(content["channels"])
    if has != takes:
        how = {1: " (its images are then read in grey)", 3: " (its images are then read in colours)"}.get(takes, "")
        raise PruningError(
            f"the dataset's images must have the model's channels, but '{path}' has {has} and the model takes {takes}: "
            f"give the data.yaml it was trained on, or say `channels: {takes}` there{how}"
        )
    for image in (image_paths(content.get(split))[:1] for split in ("train", "val") if takes not in (1, 3)):
        why = read_image(Path(image[0]), takes)[1] if image else ""
        if why:
            raise PruningError(
                f"the dataset's images must have the model's channels, but '{image[0]}' {why}: correct it"
            )


def read_image(path: Path, channels: int) -> tuple[Any, str]:
    """An image as Ultralytics reads it, (height, width, channels) in 8 bits; None and why where that cannot be."""
    import cv2
    from ultralytics.utils.patches import imread

    flags = {1: cv2.IMREAD_GRAYSCALE, 3: cv2.IMREAD_COLOR}.get(channels, cv2.IMREAD_UNCHANGED)
    try:
        image = imread(path, flags)
    except (cv2.error, OSError, ValueError) as error:
        return None, f"cannot be read ({one_line(error, 80)})"
    if image is None:
        return None, "cannot be read as an image"
    has = image.shape[2]
    return (image, "") if has == channels else (None, f"has {has} channels, not {channels}")


def _check_names(path: Path, dataset: Mapping[int, str], model: Mapping[int, str]) -> list[str]:
    """PruningError where a class has another number than in the model; a line where it only has another name.

    Upper and lower case, spaces and punctuation are no difference, and numbers in place of names fit every name.
    """
    ours, theirs = ({number: _plain(name) for number, name in sorted(names.items())} for names in (dataset, model))
    differing = [number for number in ours if ours[number] != theirs.get(number)]
    numbered = [_only_numbers(names) for names in (ours, theirs)]
    if not differing or all(numbered):
        return []
    if any(ours[number] in theirs.values() for number in differing):
        raise PruningError(
            f"the dataset's classes must be in the model's order, but '{path}' has {_listed(dataset, differing)} and "
            f"the model {_listed(model, differing)}: correct the order of `names` (and the labels' numbers with it)"
        )
    if any(numbered):
        return []
    first = differing[0]
    more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
    return [f"classes are taken by their numbers: '{path}' calls {first} '{dataset[first]}', the model "
            f"'{model.get(first)}'{more}"]  # fmt: skip


def _plain(name: object) -> str:
    return re.sub(r"[\W_]+", "", str(name).casefold()) or str(name)


def _only_numbers(names: Mapping[int, str]) -> bool:
    """Whether classes are called by their numbers, counted from 0 or 1: `0`, `class_0`, `item1` ..."""
    return any(
        all(
            re.fullmatch(rf"(class|cls|item|object|obj|label)?0*{number + first}", name)
            for number, name in names.items()
        )
        for first in (0, 1)
    )


def _listed(names: Mapping[int, str], differing: list[int]) -> str:
    """The names in their order; of many those that differ, with their numbers."""
    if len(names) <= _SHOWN:
        return "[" + ", ".join(names[number] for number in sorted(names)) + "]"
    shown = ", ".join(f"{number}: {names.get(number)}" for number in differing[:_SHOWN])
    return "{" + shown + (", ..." if len(differing) > _SHOWN else "") + "}"
