"""What Ultralytics does otherwise with a dataset: any folder, offline, the user's files left as they are.

`quiet_ultralytics` puts these in place while it is open, so that evaluation, training, calibration and this project's
own checks, in whatever process, see the same images.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ultralytics.utils import YAML

IMAGE_LIST = ".images.json"
"""Ends the name of a list of images that this project made (`data.sampling`): JSON, absolute paths of any bytes."""

LABEL_NUMBERS, LABEL_CLASSES = "label_numbers", "label_classes"
"""Of a data.yaml of some of a dataset's classes (`data.class_subset`): the number of each in the label files, and how
many classes these number. Its `nc` is the latter, which Ultralytics refuses by itself: it would misread the labels."""


class DatasetYaml(YAML):
    """Ultralytics' YAML reader for data.yaml files: their `path` is made absolute, their `download` is dropped.

    Ultralytics takes a relative `path` from the working directory, which is another one in a worker or at the next
    start, and runs `download` where images are missing.
    """

    @classmethod
    def load(cls, file: Any = "data.yaml", append_filename: bool = False) -> Any:
        content = super().load(file, append_filename)
        if isinstance(content, dict):
            content.pop("download", None)
            if LABEL_NUMBERS in content:
                content["nc"] = len(content[LABEL_NUMBERS])
            root = content.get("path")
            if isinstance(root, str) and root and not Path(root).is_absolute():
                content["path"] = _absolute_root(Path(file).absolute().parent, root, content)
        return content


def _absolute_root(home: Path, root: str, content: dict[str, Any]) -> str:
    """The first folder that holds the images: `root` seen from the yaml's folder `home`, from the working directory,
    from Ultralytics' folder of datasets, and from the folders above `home`; `root` itself where none does."""
    from ultralytics.utils import DATASETS_DIR

    val = content.get("val") or content.get("validation") or ()
    places = [str(place) for place in (val if isinstance(val, list) else [val])]
    for folder in (home, Path.cwd(), Path(DATASETS_DIR), *home.parents):
        found = folder / root
        # "../" as Ultralytics has it: from the root, or from beside it
        if places and all((found / p).exists() or (found / p.removeprefix("../")).exists() for p in places):
            return str(found)
    return root


def list_reader(stock: Callable[[Any, Any], list[str]]) -> Callable[[Any, Any], list[str]]:
    """Ultralytics' `get_img_files`, whose relative lines of image lists are also found from other working directories.

    Ultralytics takes a line that does not begin with "./" from the working directory. Where there is no such image, it
    is taken from the nearest folder at or above the list's own that has it. A list of our own is read as it is.
    """

    def get_img_files(self: Any, img_path: Any) -> list[str]:
        if is_image_list(img_path):
            return sorted(json.loads(Path(img_path).read_text(encoding="utf-8")))
        files = stock(self, img_path)
        lists = [Path(place) for place in (img_path if isinstance(img_path, list) else [img_path])]
        folders = [folder for place in lists if place.is_file() for folder in place.absolute().parents]
        return [_found(name, folders) for name in files] if folders else files

    return get_img_files


def is_image_list(place: Any) -> bool:
    """Whether the place of a split's images is a list of our own."""
    return str(place).endswith(IMAGE_LIST)


def label_cache_place(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Ultralytics' reading of a label cache: what a list of our own needs is kept beside it.

    Otherwise it would take the place of what all images of the folder have there, and both be read anew each time.
    """

    def load_or_scan(self: Any, cache_path: Path, cache_hash: str) -> Any:
        own = Path(self.img_path).with_suffix(".cache") if is_image_list(self.img_path) else cache_path
        return stock(self, own, cache_hash)

    return load_or_scan


def subset_reader(stock: Callable[[Any], list[dict[str, Any]]]) -> Callable[[Any], list[dict[str, Any]]]:
    """Ultralytics' `get_labels`, which of a dataset of some classes gives their objects alone, numbered anew.

    The labels are read, checked and cached as the whole dataset's: its cache is used, and stays good for it.
    """

    def get_labels(self: Any) -> list[dict[str, Any]]:
        own = self.data
        if LABEL_NUMBERS not in own:
            return stock(self)
        self.data = {**own, "names": dict.fromkeys(range(own[LABEL_CLASSES]), "")}
        try:
            labels = stock(self)
        finally:
            self.data = own
        numbers = np.full(own[LABEL_CLASSES], -1)
        numbers[own[LABEL_NUMBERS]] = np.arange(len(own[LABEL_NUMBERS]))
        return [_numbered_anew(label, numbers) for label in labels]

    return get_labels


def _numbered_anew(label: dict[str, Any], numbers: np.ndarray) -> dict[str, Any]:
    """An image's labels with the new number of each class, -1: without its objects."""
    new = numbers[label["cls"][:, 0].astype(int)]
    stays = new >= 0
    found = {**label, "cls": new[stays, None].astype(label["cls"].dtype), "bboxes": label["bboxes"][stays]}
    if label["segments"]:
        found["segments"] = [outline for outline, its in zip(label["segments"], stays, strict=True) if its]
    if label.get("keypoints") is not None:
        found["keypoints"] = label["keypoints"][stays]
    return found


def _found(name: str, folders: Sequence[Path]) -> str:
    if Path(name).is_absolute() or Path(name).is_file():
        return name
    return next((str(folder / name) for folder in folders if (folder / name).is_file()), name)


def leave_image(_image: Any, write: Callable[[Any], None]) -> None:
    """In place of Ultralytics' rewriting of a JPEG that has bytes after its end: only see whether it can be decoded."""
    write(io.BytesIO())


def image_checker(stock: Callable[[str], tuple[str, Any]]) -> Callable[[str], tuple[str, Any]]:
    """Ultralytics' `check_image`, which would say of such a JPEG that it was restored and saved."""

    def check_image(im_file: str) -> tuple[str, Any]:
        message, shape = stock(im_file)
        return (f"{im_file}: does not end as a JPEG should; read as it is" if message else ""), shape

    return check_image
