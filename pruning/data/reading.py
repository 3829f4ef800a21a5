"""A dataset as Ultralytics itself reads it, with the changes of `yolo.dataset_patches`."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ultralytics.data.base import BaseDataset
from ultralytics.data.utils import check_det_dataset, img2label_paths

from paretoprune.base.errors import one_line
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.yolo.ultralytics_logging import quiet_ultralytics

SPLITS = ("train", "val", "test")


def read_dataset(path: Path) -> dict[str, Any]:
    """A data.yaml with its paths made absolute, in Ultralytics' own reading; its `download` entry is never run.

    Raises PruningError where it is no dataset description or its validation images are not there.
    """
    if path.suffix not in {".yaml", ".yml"}:
        raise PruningError(f"a dataset is a data.yaml, but got '{path}': give the .yaml file")
    with quiet_ultralytics():
        try:
            return dict(check_det_dataset(str(path), autodownload=False))
        except FileNotFoundError as error:
            missing = str(error).split("\n")[0].split("missing path")[-1].strip()
            raise PruningError(
                one_line(f"images of '{path}' must exist, but got {missing}: correct its paths, or fetch the images")
            ) from error
        except Exception as error:  # yaml's own errors, KeyError, TypeError, SyntaxError: whatever the file provokes
            raise PruningError(one_line(f"'{path}' is not a dataset description: {error}")) from error


def image_paths(places: Any) -> list[str]:
    """The images of a split (a place or a list of them: folders, files that list images), as Ultralytics finds them.

    In its order; [] where there are none.
    """
    if not places:
        return []
    reader = SimpleNamespace(prefix="", fraction=1.0)
    state = random.getstate()  # it draws a few images to time their reading
    with quiet_ultralytics():
        try:
            return BaseDataset.get_img_files(reader, places)  # type: ignore[arg-type]
        except FileNotFoundError:
            return []
        finally:
            random.setstate(state)


def label_paths(images: Sequence[str]) -> list[str]:
    """Where Ultralytics looks for the labels of images."""
    return [str(path) for path in img2label_paths(list(images))]


def places_of(split: Any) -> Iterator[Path]:
    """The folders and lists that a split is made of."""
    return (Path(place) for place in (split if isinstance(split, list) else [split]) if place)
