"""Memory that stays with the process while it is timed."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_ALL = 2**30
_USUAL_MMAP, _USUAL_TRIM = 32 * 2**20, 64 * 2**20  # where glibc's own adjustment ends in a process with large tensors


@contextmanager
def malloc_trim_disabled() -> Iterator[None]:
    """The C library keeps freed memory inside this context, and gives it back to the system at its end.

    Left to itself glibc hands the top of its heap back after an inference or not, as the addresses happen to lie when a
    network is opened. Where it does, every inference pays for the page faults: yolov8n at 320 pixels on a CPU took
    24.3 ms in some sessions and 21.7 ms in others, with 1,000 to 1,900 page faults an inference or none, and two
    measurements of the same two networks differed by 12 %. Elsewhere than with glibc nothing is done.
    """
    library = _glibc()
    if library is None:
        yield
        return
    library.mallopt(_MMAP_THRESHOLD, _USUAL_MMAP)  # the most that arenas of threads hold in one piece
    library.mallopt(_TRIM_THRESHOLD, _ALL)
    try:
        yield
    finally:
        library.mallopt(_MMAP_THRESHOLD, _USUAL_MMAP)
        library.mallopt(_TRIM_THRESHOLD, _USUAL_TRIM)
        gc.collect()
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
