"""A classifier's dataset: a folder with train/<class>/ and val/<class>/, as Ultralytics reads it. Checked, never made.

Ultralytics itself downloads a dataset that it does not find and splits a folder that has no train/ by copying it; here
both are errors of one line.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from paretoprune.pruning.errors import PruningError

CLASS_LIST = ".classes.json"
"""Ends the name of a file that says a dataset's folder (`folder`) and those of its classes that are used
(`classes`)."""
_VALIDATION = ("val", "validation", "valid", "test")  # the first of these that is there, as Ultralytics chooses


def folder_of(data: str | Path) -> Path:
    """The folder that `data` names: a path, or the name of one in Ultralytics' datasets folder; absolute.

    Of some of a dataset's classes (`data.class_subset`) it is a folder of links beside the file that says them.
    Raises PruningError where there is none.
    """
    from ultralytics.utils import DATASETS_DIR

    if str(data).endswith(CLASS_LIST):
        return _linked(Path(data))
    for place in (Path(data).expanduser(), DATASETS_DIR / str(data)):
        if place.is_dir():
            return place.resolve()
    what = "a file" if Path(data).exists() else "not there"
    raise PruningError(
        f"a classifier's dataset is a folder with train/<class>/ and val/<class>/, but '{data}' is {what}: give the "
        "path of the folder"
    )


def _linked(file: Path) -> Path:
    """A dataset's folder with links to the images of some classes, made at the first call."""
    text = file.read_text(encoding="utf-8")
    target = file.parent / f"{file.name.removesuffix(CLASS_LIST)}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    if target.is_dir():
        return target.resolve()
    content = json.loads(text)
    root = folder_of(content["folder"])
    with tempfile.TemporaryDirectory(prefix=".new-", dir=file.parent) as scratch:
        made = Path(scratch, "made")
        made.mkdir()
        for split in {"train", getattr(validation_folder(root), "name", "val"), "test"}:
            for image in images_by_class(root / split) if (root / split).is_dir() else ():
                place = image.relative_to(root)
                if place.parts[1] in content["classes"]:  # of links to folders Ultralytics sees no image
                    (made / place.parent).mkdir(parents=True, exist_ok=True)
                    (made / place).symlink_to(image)
        try:
            made.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first
                raise
    return target.resolve()


def numbered(data: str | Path, names: Mapping[int, str]) -> list[str]:
    """The class folders of `data`, which `check` found good, in the order of the model's classes."""
    from ultralytics.nn.autobackend import check_class_names

    found = classes_of(folder_of(data) / "train")
    read = check_class_names(dict(enumerate(found)))
    readable = {read[number]: folder for number, folder in enumerate(found)}
    known = check_class_names(dict(names))
    return [readable[known[number]] for number in sorted(known)] if set(known.values()) == set(readable) else found


def check(data: str | Path, names: Mapping[int, str]) -> None:
    """Raise PruningError unless `data` has training and validation images of the classes `names` (number -> name).

    Folders that share no name with the model are taken in alphabetical order, as Ultralytics does (a model that was
    never told its classes' names calls them 0, 1, 2 ...); their number must be the model's.
    """
    folder = folder_of(data)
    train, val = folder / "train", validation_folder(folder)
    if not train.is_dir() or val is None:
        missing = "train/" if not train.is_dir() else "val/"
        raise PruningError(
            f"a classifier's dataset has train/<class>/ and val/<class>/, but '{folder}' has no {missing}"
        )
    for place in (train, val):
        if next(images_by_class(place), None) is None:
            raise PruningError(f"'{place}' must hold images in a folder a class, but got none: correct the path")
    _check_classes(folder, classes_of(train), names)
    _check_validation(val, classes_of(train), names)


def validation_folder(folder: Path) -> Path | None:
    """The folder of the validation images below a dataset's, as Ultralytics chooses it."""
    return next((folder / name for name in _VALIDATION if (folder / name).is_dir()), None)


def images_by_class(split: Path) -> Iterator[Path]:
    """The images below a split's class folders, at any depth, in the order of their paths."""
    from ultralytics.data.utils import IMG_FORMATS

    for name in classes_of(split):
        for folder, _, files in sorted(os.walk(split / name, followlinks=True)):
            yield from (Path(folder, file) for file in sorted(files) if file.rpartition(".")[-1].lower() in IMG_FORMATS)


def has_classes(data: str | Path, split: str) -> bool:
    """Whether the dataset has a folder for `split` with images sorted into classes."""
    folder = folder_of(data) / split
    return folder.is_dir() and next(images_by_class(folder), None) is not None


def remarks(data: str | Path) -> list[str]:
    """A line where there is a test folder by which nothing can be judged."""
    test = folder_of(data) / "test"
    if not test.is_dir() or has_classes(data, "test"):
        return []
    return [f"'{test}' has no images in a folder a class; the test split is left out"]


def _check_validation(val: Path, trained: list[str], names: Mapping[int, str]) -> None:
    """The validation's folders are numbered like the training's: by name, or by all of them being there."""
    from ultralytics.nn.autobackend import check_class_names

    found = classes_of(val)
    named = set(check_class_names(dict(enumerate(trained))).values()) & set(check_class_names(dict(names)).values())
    if not set(found) & set(trained) or (not named and found != trained):
        raise PruningError(
            f"'{val}' must have the classes of 'train', but it has {', '.join(found[:5])} and that "
            f"{', '.join(trained[:5])}: name its folders as those of 'train'"
        )


def _check_classes(folder: Path, found: list[str], names: Mapping[int, str]) -> None:
    from ultralytics.nn.autobackend import check_class_names

    if len(found) != len(names):
        raise PruningError(
            f"the dataset's classes must be the model's, but '{folder}' has {len(found)} and the model {len(names)}: "
            "give the dataset it was trained on, or train the model on this one first"
        )
    known = set(check_class_names(dict(names)).values())
    readable = set(check_class_names(dict(enumerate(found))).values())  # ImageNet's folders are codes
    if known & readable and known != readable:
        raise PruningError(
            f"the dataset's classes must be the model's, but '{folder}' has '{min(readable - known)}', which the model "
            "does not know: give the dataset it was trained on, or train the model on this one first"
        )


def classes_of(split: Path) -> list[str]:
    """The names of a split's class folders, in their order."""
    return sorted(place.name for place in split.iterdir() if place.is_dir())
