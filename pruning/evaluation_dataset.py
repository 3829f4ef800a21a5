"""Checks of a dataset before any work starts: one clear line instead of a traceback minutes later."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from pruning import class_folders
from pruning.checkpoints import task_of
from pruning.errors import PruningError
from pruning.quiet import quiet_ultralytics

_LABELLED_BY_TEXT = {"detect", "segment", "pose", "obb"}


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
            raise PruningError(_line(f"the dataset '{data}' cannot be read: {error}")) from error
    if path is None or not path.is_file():
        raise PruningError(f"a dataset is a data.yaml, but there is no file '{data}': give the path of an existing one")
    return path


def check_dataset(data: str | Path, model: nn.Module) -> None:
    """Raise PruningError, in one line, if `model` cannot be trained and validated on `data`.

    Checked: the yaml is there and readable; its train and val images are there; labels are where Ultralytics looks for
    them; there are as many classes as the model has; keypoints have the model's shape. For a classifier: the folders of
    the classes are there and are the model's. Takes well under a second, reads no image, downloads nothing.
    """
    task = task_of(model)
    if task == "classify":
        class_folders.check(data, dict(model.names))  # type: ignore[arg-type]
        return
    path = dataset_file(data)
    content = read_dataset(path)
    for split in ("train", "val"):
        _check_images(path, split, content.get(split), task)
    _check_classes(path, content, model)


def read_dataset(path: Path) -> dict[str, Any]:
    """A data.yaml with its paths made absolute, in Ultralytics' own reading; its `download` entry is never run.

    Raises PruningError where it is no dataset description or its validation images are not there.
    """
    from ultralytics.data.utils import check_det_dataset

    if path.suffix not in {".yaml", ".yml"}:
        raise PruningError(f"a dataset is a data.yaml, but got '{path}': give the .yaml file")
    with quiet_ultralytics():
        try:
            return dict(check_det_dataset(str(path), autodownload=False))
        except FileNotFoundError as error:
            missing = str(error).split("\n")[0].split("missing path")[-1].strip()
            raise PruningError(
                _line(f"images of '{path}' must exist, but got {missing}: correct its paths, or fetch the images")
            ) from error
        except Exception as error:  # yaml's own errors, KeyError, TypeError, SyntaxError: whatever the file provokes
            raise PruningError(_line(f"'{path}' is not a dataset description: {error}")) from error


def dataset_places(data: str | Path) -> list[str]:
    """The paths that training and validation on `data` read: the yaml, the images' places and their labels' folders."""
    path = Path(data)
    if path.is_dir() and not list(path.glob("*.y*ml")):
        return [str(place) for place in (path / "train", path / "val") if place.is_dir()]
    path = dataset_file(data)
    content = read_dataset(path)
    found = [str(path)]
    for split in ("train", "val"):
        places = content.get(split) or []
        for place in map(Path, places if isinstance(places, list) else [places]):
            image = first_image(place)
            found += [str(place), *([str(label_folder(image))] if image is not None else [])]
    return list(dict.fromkeys(found))


def _check_images(path: Path, split: str, places: Any, task: str) -> None:
    """At least one image in each place of a split, and a folder of labels for it."""
    if not places:
        raise PruningError(f"a dataset has train and val images, but '{path}' says nothing for '{split}': add the key")
    for place in places if isinstance(places, list) else [places]:
        image = first_image(Path(place))
        if image is None:
            raise PruningError(f"'{split}' of '{path}' must hold images, but got none in '{place}': correct the path")
        if task in _LABELLED_BY_TEXT and not label_folder(image).is_dir():
            raise PruningError(
                f"labels of '{split}' of '{path}' belong in '{label_folder(image)}', but there is no such folder: "
                "put the .txt files there"
            )


def first_image(place: Path) -> Path | None:
    """The first image of a folder (searched in depth) or of a text file that lists images; None if there is none."""
    from ultralytics.data.utils import IMG_FORMATS

    if place.is_file() and place.suffix == ".txt":
        with place.open(encoding="utf-8") as lines:
            names = [line.strip() for line in islice(lines, 100) if line.strip()]
        images = (place.parent / name if name.startswith("./") else Path(name) for name in names)
    else:
        images = (found for found in place.rglob("*.*"))
    return next((image for image in images if image.suffix[1:].lower() in IMG_FORMATS and image.is_file()), None)


def label_folder(image: Path) -> Path:
    """Where Ultralytics looks for the labels of an image."""
    from ultralytics.data.utils import img2label_paths

    return Path(img2label_paths([str(image)])[0]).parent


def class_counts(data: str | Path, model: nn.Module) -> tuple[int, int]:
    """(classes of `model`, classes of `data`). Raises PruningError for a dataset that cannot be read."""
    task = task_of(model)
    path = dataset_file(data, task)
    if task == "classify":
        return _classes_of(model), sum(place.is_dir() for place in (path / "train").iterdir())
    return _classes_of(model), int(read_dataset(path)["nc"])


def has_split(data: str | Path, split: str, task: str = "detect") -> bool:
    """Whether the dataset names images for `split` ("test") and they are there."""
    path = dataset_file(data, task)
    places = (
        (path / split if (path / split).is_dir() else None) if task == "classify" else read_dataset(path).get(split)
    )
    if not places:
        return False
    return all(first_image(Path(place)) for place in (places if isinstance(places, list) else [places]))


def image_files(data: str | Path, split: str, most: int) -> list[Path]:
    """The first images of a split, at most so many; [] where there are none. Not for classifiers' folders."""
    from ultralytics.data.utils import IMG_FORMATS

    places = read_dataset(dataset_file(data)).get(split) or []
    found: list[Path] = []
    for place in places if isinstance(places, list) else [places]:
        first = first_image(Path(place))
        folder = sorted(first.parent.iterdir()) if first else []
        found += [path for path in folder if path.suffix[1:].lower() in IMG_FORMATS]
    return found[:most]


def _classes_of(model: nn.Module) -> int:
    head: Any = list(model.model)[-1]  # type: ignore[arg-type]
    return int(getattr(head, "nc", len(getattr(model, "names", ()))))


def _check_classes(path: Path, content: dict[str, Any], model: nn.Module) -> None:
    head: Any = list(model.model)[-1]  # type: ignore[arg-type]
    has, got = _classes_of(model), int(content["nc"])
    if has != got:
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


def _line(message: str) -> str:
    """`message` on one line, without the marks Ultralytics decorates its errors with."""
    return " ".join(message.replace("❌", " ").replace("️", " ").split())
