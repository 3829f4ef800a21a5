"""What makes a dataset the same one: its classes, and of every image its name, its size and its labels' content.

Nothing in it says where the dataset lies or when its files were written, so a copy elsewhere is the same dataset.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

READERS = 8
"""Threads that read labels: over a network, or from a disk, one alone mostly waits."""
_ABOUT = ("kpt_shape", "flip_idx", "channels")  # entries of a data.yaml by which labels or images are read

Row = tuple[str, int, str]
"""An image: its path below the folder that all of the split's images share, its bytes, the digest of its labels."""


class SplitIdentity(BaseModel):
    """`images`: how many. `digest`: of all their rows."""

    model_config = ConfigDict(frozen=True)

    images: int
    digest: str


class DatasetIdentity(BaseModel):
    """A dataset's identity without its images' rows, which would make a run's baseline.json long.

    `about`: what else its description says of labels and images. `splits`: train, val and, where there is one, test.
    """

    model_config = ConfigDict(frozen=True)

    classes: list[str]
    about: dict[str, Any]
    splits: dict[str, SplitIdentity]


Rows = dict[str, list[Row]]
"""Of every split its images' rows, sorted."""

Classes = dict[str, list[tuple[str, ...]]]
"""Of every split the classes of each row's image, as the dataset writes them: a label's number, a folder's name."""


def identify(data: str | Path, task: str) -> tuple[DatasetIdentity, Rows, Classes]:
    """The identity of the dataset `data` for a model of `task`, the rows behind it, and the classes of each row.

    Reads every label file and asks for every image's size. Raises PruningError for a dataset that cannot be read.
    """
    from paretoprune.pruning.data import class_folders
    from paretoprune.pruning.data.dataset import dataset_file
    from paretoprune.pruning.data.reading import SPLITS, image_paths, label_paths, read_dataset
    from paretoprune.pruning.yolo.dataset_patches import LABEL_NUMBERS

    rows: Rows = {}
    kinds: Classes = {}
    place = dataset_file(data, task)
    if task == "classify":
        classes, about = class_folders.classes_of(place / "train"), {}
        folders = {"train": place / "train", "val": class_folders.validation_folder(place), "test": place / "test"}
        for split, folder in folders.items():
            if folder is not None and folder.is_dir():
                images = [str(path) for path in class_folders.images_by_class(folder)]
                rows[split], kinds[split] = _rows(images, (), str(folder))
    else:
        content = read_dataset(place)
        classes = [content["names"][number] for number in sorted(content["names"])]
        about = {name: content[name] for name in (*_ABOUT, LABEL_NUMBERS) if content.get(name) is not None}
        for split in SPLITS:
            images = image_paths(content.get(split))
            if images:
                rows[split], kinds[split] = _rows(images, label_paths(images))
        if LABEL_NUMBERS in content:
            wanted = {str(number) for number in content[LABEL_NUMBERS]}
            kinds = {split: [tuple(wanted.intersection(its)) for its in found] for split, found in kinds.items()}
    splits = {split: SplitIdentity(images=len(found), digest=_digest(found)) for split, found in rows.items()}
    return DatasetIdentity(classes=classes, about=about, splits=splits), rows, kinds


def names_of(images: Sequence[str], root: str | None = None) -> list[str]:
    """Each image's path below `root`, or below the folder that all of them share."""
    images = [os.path.abspath(image) for image in images]  # noqa: PTH100  not resolved: links are part of the dataset
    # Seldom more than a few folders, and a common path of 100,000 takes a second
    root = os.path.abspath(root) if root else os.path.commonpath({os.path.dirname(i) for i in images} or ["/"])  # noqa: PTH100, PTH120
    return [image[len(root) :].lstrip(os.sep) for image in images]


def _rows(
    images: Sequence[str], labels: Sequence[str], root: str | None = None
) -> tuple[list[Row], list[tuple[str, ...]]]:
    """The rows of images and the classes of each; without labels these are its first folder below `root`."""
    names = names_of(images, root)
    with ThreadPool(READERS) as pool:
        sizes = pool.map(_size, images, chunksize=256)
        read = (
            pool.map(_label, labels, chunksize=256)
            if labels
            else [("", (name.partition(os.sep)[0],)) for name in names]
        )
    found = sorted(zip(names, sizes, read, strict=True))
    return [(name, size, said) for name, size, (said, _) in found], [kinds for _, _, (_, kinds) in found]


def _size(image: str) -> int:
    try:
        return os.stat(image).st_size  # noqa: PTH116  a Path for each of 100,000 takes as long as the question itself
    except OSError:  # a list names it, but it is not there
        return -1


def _label(label: str) -> tuple[str, tuple[str, ...]]:
    """A digest of a label file's bytes, and the classes in it; one that is missing or empty says the same: nothing is
    there."""
    try:
        with open(label, "rb") as file:  # noqa: PTH123
            content = file.read()
    except OSError:
        return "", ()
    if not content.strip():
        return "", ()
    kinds = {line.split(None, 1)[0] for line in content.splitlines() if line.strip()}
    said = hashlib.blake2b(content, digest_size=8).hexdigest()
    return said, tuple(sorted(kind.decode("ascii", "replace") for kind in kinds))


def _digest(rows: Iterable[Row]) -> str:
    whole = hashlib.sha256()
    for row in rows:
        whole.update(json.dumps(row).encode())
    return whole.hexdigest()[:16]


def rows_to_bytes(rows: Rows) -> bytes:
    """For a file beside the identity; the same rows give the same bytes."""
    return gzip.compress(json.dumps(rows).encode(), mtime=0)


def rows_from_bytes(content: bytes) -> Rows:
    """Inverse of `rows_to_bytes`; {} where the content is damaged: it only says which files differ."""
    try:
        found = json.loads(gzip.decompress(content))
        return {
            split: [(str(name), int(size), str(said)) for name, size, said in rows] for split, rows in found.items()
        }
    except (OSError, EOFError, ValueError, TypeError, AttributeError):
        return {}


def differences(old: DatasetIdentity, new: DatasetIdentity, old_rows: Rows, new_rows: Rows) -> list[str]:
    """What differs, a few words for each, the gravest first; [] for the same dataset.

    A test split that was added is no difference: nothing of the old one was judged by it.
    """
    found = []
    if old.classes != new.classes:
        found.append(f"classes differ ({_listed(old.classes)} then, {_listed(new.classes)} now)")
    found += [
        f"{name} differs ({old.about.get(name)} then, {new.about.get(name)} now)"
        for name in sorted({*old.about, *new.about})
        if old.about.get(name) != new.about.get(name)
    ]
    for split, before in old.splits.items():
        now = new.splits.get(split)
        if now is None:
            found.append(f"there are no images of {split} ({before.images} then)")
        elif now.digest != before.digest:
            found += _differing_rows(split, old_rows.get(split), new_rows.get(split)) or [
                f"images or labels of {split} differ ({before.images} images then, {now.images} now)"
            ]
    return found


def _differing_rows(split: str, old: Sequence[Row] | None, new: Sequence[Row] | None) -> list[str]:
    """[] where one of them is not known."""
    if not old or not new:
        return []
    before, now = ({name: (size, said) for name, size, said in rows} for rows in (old, new))
    both = [name for name in before if name in now]
    kinds = {
        f"labels of {split} changed": [name for name in both if before[name][1] != now[name][1]],
        f"images of {split} changed": [name for name in both if before[name][0] != now[name][0]],
        f"images of {split} are gone": [name for name in before if name not in now],
        f"images of {split} are new": [name for name in now if name not in before],
    }
    found = [f"{len(names)} {what}, first: {names[0]}" for what, names in kinds.items() if names]
    if not found and Counter(old) != Counter(new):
        found.append(f"images of {split} are listed another number of times")
    return found


def _listed(names: Sequence[str], most: int = 20) -> str:
    return "[" + ", ".join(names[:most]) + (", ..." if len(names) > most else "") + "]"
