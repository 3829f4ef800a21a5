"""Files of arrays that may come from anywhere: nothing in them is unpickled, and they take no memory that they lack."""

from __future__ import annotations

import io
import math
import zipfile
from pathlib import Path

import numpy as np


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays by name that `np.savez` wrote to `path`.

    Raises OSError where it cannot be read, ValueError where it is no such file, holds Python objects, or says that it
    is larger than it is.
    """
    content = path.read_bytes()  # whole: where numpy cannot read a torn file, it leaves it open
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > len(content):
                raise ValueError("unpacks to more than it holds")
            for entry in archive.infolist():
                with archive.open(entry) as stream:
                    version = np.lib.format.read_magic(stream)
                    first = version == (1, 0)
                    formats = np.lib.format
                    read = formats.read_array_header_1_0 if first else formats.read_array_header_2_0
                    shape, _, dtype = read(stream)
                if math.prod(shape) * dtype.itemsize > entry.file_size:
                    raise ValueError("has an array that is longer than its bytes")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, KeyError, EOFError, MemoryError, RecursionError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} must hold arrays, but {error}; it is made anew where it is removed") from None
