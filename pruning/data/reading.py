"""A dataset as Ultralytics itself reads it, but from any folder, offline, and with the user's files left as they are.

`quiet_ultralytics` puts the three changes below into Ultralytics while it is open, so that evaluation, training,
calibration and this project's own checks, in whatever process, see the same images.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ultralytics.data.base import BaseDataset
from ultralytics.data.utils import check_det_dataset, img2label_paths
from ultralytics.utils import YAML

from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.yolo.ultralytics_logging import quiet_ultralytics

SPLITS = ("train", "val", "test")


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
    is taken from the nearest folder at or above the list's own that has it.
    """

    def get_img_files(self: Any, img_path: Any) -> list[str]:
        files = stock(self, img_path)
        lists = [Path(place) for place in (img_path if isinstance(img_path, list) else [img_path])]
        folders = [folder for place in lists if place.is_file() for folder in place.absolute().parents]
        return [_found(name, folders) for name in files] if folders else files

    return get_img_files


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


def one_line(message: str) -> str:
    """`message` on one line, without the marks Ultralytics decorates its errors with."""
    return " ".join(message.replace("❌", " ").replace("️", " ").split())
