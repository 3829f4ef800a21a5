"""What Ultralytics read from a dataset's labels, kept between processes in a file that nothing is unpickled from.

Ultralytics keeps it in `<labels>.cache`, a pickle, and unpickles whatever lies there. That file, the user's own or of
whoever packed the dataset, is neither read nor touched here: beside it goes `<labels>.paretoprune.npz`, which holds
numbers and one JSON text. 20,000 images with outlines are read back in 2 to 4 s.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from paretoprune.base.arrays import read_arrays
from paretoprune.base.atomic import whole_file

_TEXT = "text"
_ARRAY, _TUPLE, _PATH = "array", "tuple", "path"


def own_file(cache: Path) -> Path:
    """Our file for the one that Ultralytics would use."""
    return cache.with_suffix(".paretoprune.npz")


def load_labels(cache: Path) -> dict[str, Any]:
    """In place of Ultralytics' `load_dataset_cache_file`; raises where there is none or it is damaged (read anew then).

    Whether it fits the dataset the caller finds out by its `version` and `hash`.
    """
    arrays = read_arrays(own_file(Path(cache)))
    found: dict[str, Any] = _decoded(json.loads(arrays.pop(_TEXT).tobytes()), arrays)
    return found


def save_labels(prefix: str, cache: Path, content: dict[str, Any], version: str) -> None:
    """In place of Ultralytics' `save_dataset_cache_file`; as there, a place that cannot be written costs a scan."""
    from ultralytics.utils import LOGGER

    content["version"] = version
    path = own_file(Path(cache))
    try:
        arrays: defaultdict[str, list[np.ndarray]] = defaultdict(list)
        text = json.dumps(_encoded(content, arrays, defaultdict(int))).encode()
        flat = {name: np.concatenate(parts) for name, parts in arrays.items()}
        with whole_file(path) as file:
            np.savez(file, **{_TEXT: np.frombuffer(text, np.uint8)}, **flat)  # type: ignore[arg-type]
    except (OSError, TypeError, ValueError) as error:
        LOGGER.warning(f"{prefix}{path} could not be written ({error}): the labels are read again next time")


def _encoded(value: Any, arrays: defaultdict[str, list[np.ndarray]], used: defaultdict[str, int]) -> Any:
    """`value` for JSON. Arrays of one type lie end to end; in their place stand type, offset and shape."""
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            raise TypeError(f"labels must be numbers, but got {value.dtype}")
        name = value.dtype.str.strip("<|=")
        place = {_ARRAY: [name, used[name], *value.shape]}
        arrays[name].append(value.ravel())
        used[name] += value.size
        return place
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, PurePath):
        return {_PATH: str(value)}
    if isinstance(value, tuple):
        return {_TUPLE: [_encoded(item, arrays, used) for item in value]}
    if isinstance(value, list):
        return [_encoded(item, arrays, used) for item in value]
    if isinstance(value, dict):
        return {name: _encoded(item, arrays, used) for name, item in value.items()}
    return value


def _decoded(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, list):
        return [_decoded(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    if _ARRAY in value:
        name, offset, *shape = value[_ARRAY]
        return arrays[name][offset : offset + math.prod(shape)].reshape(shape)
    if _PATH in value:
        return Path(value[_PATH])
    if _TUPLE in value:
        return tuple(_decoded(item, arrays) for item in value[_TUPLE])
    return {name: _decoded(item, arrays) for name, item in value.items()}
