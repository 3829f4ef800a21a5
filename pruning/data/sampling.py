"""A sample of a dataset's images: trials train and are judged on it, so that they cost the same however large it is.

It is drawn once, by class and seed, over the images' names, so that it is the same one wherever the dataset lies, and
then laid out as a dataset of its own, which Ultralytics reads as any other.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from paretoprune.pruning.data import class_folders
from paretoprune.pruning.data.dataset import dataset_file
from paretoprune.pruning.data.identity import Classes, Rows, names_of
from paretoprune.pruning.data.reading import image_paths, read_dataset
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.yolo.dataset_patches import IMAGE_LIST

LEAST_OF_A_CLASS = 10  # images, where there are so many and the sample has room: an AP from fewer says little
_SPLITS = ("train", "val")
_BACKGROUND = "background"

Sample = dict[str, list[str]]
"""Of each split that is not used whole, the names of its images that are, as `identity.Row` has them, sorted."""


def stratified_sample(classes: Sequence[Collection[Hashable]], count: int, seed: int) -> list[int]:
    """Which `count` images are drawn, as rising indices; all of them where there are no more.

    classes: the classes of each image; an image without any is of the background, which is drawn like a class. Each
    class keeps its share of the images, and a rare one more: `LEAST_OF_A_CLASS`, or as many as there are, as long as
    that leaves half of the sample to the shares. An image of several classes counts for each; the rarest class is
    served first, since there is least to choose from (iterative stratification: Sechidis et al., ECML PKDD 2011).
    """
    total = len(classes)
    if count >= total:
        return list(range(total))
    order = [int(index) for index in np.random.default_rng(seed).permutation(total)]
    kinds = [set(its) or {_BACKGROUND} for its in classes]
    members: dict[Hashable, list[int]] = {}
    for index in order:
        for kind in kinds[index]:
            members.setdefault(kind, []).append(index)
    least = max(1, min(LEAST_OF_A_CLASS, count // (2 * len(members))))
    chosen: set[int] = set()
    served: Counter[Hashable] = Counter()
    for kind in sorted(members, key=lambda kind: (len(members[kind]), str(kind))):
        wanted = max(round(count * len(members[kind]) / total), min(least, len(members[kind])))
        for index in members[kind]:
            if served[kind] >= wanted or len(chosen) == count:
                break
            if index not in chosen:
                chosen.add(index)
                served.update(kinds[index])
    for index in order:  # shares are rounded, and images of several classes serve more than one
        if len(chosen) == count:
            break
        chosen.add(index)
    return sorted(chosen)


def draw_sample(rows: Rows, classes: Classes, counts: Mapping[str, int], seed: int) -> Sample:
    """A sample of so many images of each split; of a split with no more, or a count of 0, there is none."""
    return {
        split: [rows[split][index][0] for index in stratified_sample(classes[split], counts[split], seed)]
        for split in _SPLITS
        if 0 < counts.get(split, 0) < len(rows.get(split, ()))
    }


def sampled_dataset(data: str, task: str, sample: Sample, folder: Path) -> str:
    """The sample of the dataset `data` as a dataset below `folder`, made at the first call; returns what to give as
    `data`.

    A split that is not in `sample` is the dataset's own, except that there is no test split.
    Raises PruningError where the dataset lacks an image of the sample.
    """
    place = dataset_file(data, task)
    # By where the dataset lies, which is written into it: a run may go on when it lies elsewhere
    target = folder / hashlib.sha256(os.fsencode(place.absolute())).hexdigest()[:8]
    if not target.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as scratch:
            lay_out(place, task, _paths(place, task, sample), Path(scratch, "made"))
            try:
                Path(scratch, "made").rename(target)
            except OSError:
                if not target.is_dir():  # else another worker was first
                    raise
    return str(target if task == "classify" else target / "data.yaml")


def training_files(place: Path, task: str) -> list[str]:
    """The images of the training split of the dataset at `place` (`dataset.dataset_file`), in their order."""
    if task == "classify":
        return [str(path) for path in class_folders.images_by_class(place / "train")]
    return image_paths(read_dataset(place)["train"])


def lay_out(place: Path, task: str, images: Mapping[str, Sequence[str]], made: Path) -> None:
    """Make the folder `made` a dataset of these images of splits; the other splits are those of the dataset at `place`.

    data.yaml and a list of images for each split that is given; for a classifier train/ and val/ with a folder a class,
    of links to the images.
    """
    made.mkdir()
    if task != "classify":
        content = read_dataset(place)
        kept: dict[str, Any] = {name: content[name] for name in content if name not in ("path", "test", "yaml_file")}
        for split, its in images.items():
            kept[split] = f"{split}{IMAGE_LIST}"
            (made / kept[split]).write_text(json.dumps([_absolute(image) for image in its]), encoding="utf-8")
        (made / "data.yaml").write_text(yaml.safe_dump(kept, sort_keys=False), encoding="utf-8")
        return
    for split, own in _class_folders(place).items():
        if split not in images:
            (made / split).symlink_to(own)
            continue
        for name in class_folders.classes_of(own):
            (made / split / name).mkdir(parents=True)
        for number, image in enumerate(map(_absolute, images[split])):
            label = Path(image).relative_to(own).parts[0]
            (made / split / label / f"{number:07d}{Path(image).suffix}").symlink_to(image)


def _paths(place: Path, task: str, sample: Sample) -> dict[str, list[str]]:
    """The sample's images where they lie here."""
    found = {}
    for split, wanted in sample.items():
        if task == "classify":
            root = str(_class_folders(place)[split])
            images = [str(path) for path in class_folders.images_by_class(Path(root))]
            paths = dict(zip(names_of(images, root), images, strict=True))
        else:
            images = image_paths(read_dataset(place)[split])
            paths = dict(zip(names_of(images), images, strict=True))
        missing = next((name for name in wanted if name not in paths), None)
        if missing is not None:
            raise PruningError(f"the dataset must hold the run's sample of images, but '{place}' has no '{missing}'")
        found[split] = [paths[name] for name in wanted]
    return found


def _class_folders(place: Path) -> dict[str, Path]:
    """The folders of a classifier's splits, absolute."""
    both = {"train": place / "train", "val": class_folders.validation_folder(place)}
    return {split: Path(_absolute(str(own))) for split, own in both.items() if own is not None}


def _absolute(path: str) -> str:
    return os.path.abspath(path)  # noqa: PTH100  not resolved: links are part of the dataset
